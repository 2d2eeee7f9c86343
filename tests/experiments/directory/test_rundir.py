"""A run directory keeps its files: a refused command leaves every byte of it as it was."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from datamodules.shards.synthetic import make_pair, prepare_shards
from experiments.directory import run_directory as rundir
from experiments.directory.kept import give_back, set_aside
from experiments.directory.made_of import compare, compare_all
from experiments.directory.run_directory import find_original
from experiments.run.settings import Settings, factors

#: Two steps of four samples each, and no test.
SHORT = ["data.training.samples=8", "test=false"]


def contents(folder: Path) -> dict[str, bytes]:
    """Returns the content of every file except the lock."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != "run.lock"}


def done(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "done.json").read_text())


@pytest.fixture(scope="module")
def run(run_train):
    def start(folder: Path, *words: str) -> None:
        run_train(folder, *SHORT, *words)

    return start


@pytest.fixture(scope="module")
def made(run, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "run"
    run(folder)
    assert done(folder)["steps"] == 2
    return folder


@pytest.fixture
def finished(made, tmp_path) -> Path:
    """A finished run that a test may damage."""
    folder = tmp_path / "run"
    shutil.copytree(made, folder)
    config = (folder / "config.yaml").read_text().replace(str(made), str(folder))
    (folder / "config.yaml").write_text(config)
    return folder


@pytest.fixture
def killed(finished) -> Path:
    (finished / "done.json").unlink()
    return finished


#: Changes of the weights: refused in a line that names the key and both values.
REFUSED = [
    ("optim.optimizer.lr=5e-2", "optim.optimizer.lr=0.001, this run has 0.05"),
    ("optim.scheduler.warmup=0.5", "optim.scheduler.warmup=0.1, this run has 0.5"),
    ("seed=1", "seed=0, this run has 1"),
    ("tuning.freeze=[encoder]", r"tuning.freeze=null, this run has \[encoder\]"),
    ("tuning.decay_norms_and_biases=false", "tuning.decay_norms_and_biases=true, .* false"),
    ("data.batch_size=2", "data.batch_size=4, this run has 2"),
    ("data.training.needles=2", "data.training.needles=5, this run has 2"),
    ("data.training.samples=16", "data.training.samples=8, this run has 16"),
    ("data.conversation.max_length=99", "data.conversation.max_length=2048, this run has 99"),
    ("trainer.precision=64-true", "trainer.precision=32-true, this run has 64-true"),
    ("trainer.gradient_clip_val=2.0", "trainer.gradient_clip_val=1, this run has 2:"),
    ("trainer.limit_train_batches=1", "trainer.limit_train_batches=null, this run has 1"),
    ("module.packing=512", "module.packing=null, this run has 512"),
    ("rotary=mrope", "model.rotary._target_=.*VideoRope, this run has .*MRope"),
    ("init=runs/other", r"init=null, this run has runs/other"),
    ("data.gird=1", "data.gird: .* has no argument gird: did you mean data.grid?"),
    ("optim.optimizer.lr=abc", "optim.optimizer.lr=abc must be a number"),
    ("trainer.max_steps=1", "trained up to step 2, but trainer.max_steps=1 is below"),
]

#: Changes that a later check refuses. They do not change the weights of a finished run.
REFUSED_LATER = [
    ("callbacks.x._target_=lightning.no.Such", "callbacks.x._target_=null"),
    ("callbacks.checkpoint.every_n_steps=0", "callbacks.checkpoint: every_n_steps=0 must be 1"),
    ("trainer.enable_foo=1", "trainer.enable_foo: Trainer has no argument enable_foo"),
    ("trainer.accumulate_grad_batches=3", "trainer.accumulate_grad_batches is 3"),
    ("trainer.devices=0", "trainer: .*devices=0"),
    ("tuning.checkpointing=[foo]", "tuning.checkpointing names foo"),
    ("paths.data=nowhere", r"nowhere/vniah/\S+\.tar"),
    ("logger.y={_target_: lightning_modules.loggers.csv.No}", "logger.y: "),
]


def refuse(run, folder: Path, word: str, line: str) -> None:
    before = contents(folder)
    known = ("data.gird", "callbacks.x", "trainer.enable_foo", "logger.y")
    plus = "+" if word.startswith(known) else ""
    with pytest.raises(SystemExit, match=f"error: .*{line}") as caught:
        run(folder, plus + word)
    assert "\n" not in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize(("word", "line"), REFUSED)
def test_what_a_finished_run_was_made_with_is_kept(word, line, finished, run):
    refuse(run, finished, word.lstrip("+"), line)


@pytest.mark.parametrize(("word", "line"), [REFUSED[0], *REFUSED_LATER])
def test_a_refused_command_leaves_a_killed_run_as_it_was(word, line, killed, run):
    refuse(run, killed, word, line)


def test_other_shards_of_the_same_name_change_nothing(killed, run, tmp_path, needle_shards):
    data = tmp_path / "data"
    shutil.copytree(needle_shards, data)
    shard = data / "vniah" / "needles-train.tar"
    shutil.copy(data / "vniah" / "needles-test.tar", shard)
    for index in shard.parent.glob("needles-train*idx*"):
        index.unlink()
    before = contents(killed)
    with pytest.raises(SystemExit, match="shards of the data changed since the checkpoint"):
        run(killed, f"paths.data={data}")
    assert contents(killed) == before
    run(killed, f"paths.data={data}", "data.stream.on_changed=go_on")
    assert done(killed)["steps"] == 2


def test_the_same_shards_elsewhere_are_the_same(killed, run, tmp_path, needle_shards):
    shutil.copytree(needle_shards, tmp_path / "elsewhere")
    run(killed, f"paths.data={tmp_path / 'elsewhere'}")
    assert done(killed)["steps"] == 2


@pytest.mark.parametrize(
    "words",
    [
        ["trainer.log_every_n_steps=2", "callbacks.checkpoint.every_n_steps=1", "data.audit=true"],
        ["trainer.max_steps=2", "tuning.checkpointing=[llm]", "optim.optimizer.fused=false"],
        ["trainer.val_check_interval=1.0", "callbacks.generations=null", "name=other", "tags=[x]"],
    ],
)
def test_how_a_run_is_computed_and_watched_may_change(words, killed, made, run):
    run(killed, *words)
    assert done(killed)["weights_sha256"] == done(made)["weights_sha256"]


def test_a_longer_training_goes_on_and_says_so(finished, run):
    run(finished, "trainer.max_epochs=2")
    assert done(finished)["steps"] == 4
    assert yaml.safe_load((finished / "config.yaml").read_text())["trainer"]["max_epochs"] == 2
    before = contents(finished)
    with pytest.raises(
        SystemExit, match=r"trained up to epoch 2, but trainer.max_epochs=1 is below"
    ):
        run(finished)
    assert contents(finished) == before


def test_resume_false_is_the_way_out(finished, made, run):
    run(finished, "optim.optimizer.lr=5e-2", "resume=false")
    assert done(finished)["weights_sha256"] != done(made)["weights_sha256"]
    assert (
        yaml.safe_load((finished / "config.yaml").read_text())["optim"]["optimizer"]["lr"] == 0.05
    )


def test_resume_false_removes_nothing_before_all_is_checked(finished, run):
    before = contents(finished)
    with pytest.raises(SystemExit, match="nowhere"):
        run(finished, "resume=false", "paths.data=nowhere")
    assert contents(finished) == before


def test_before_anything_was_trained_everything_may_change(run, tmp_path):
    with pytest.raises(SystemExit, match="nowhere"):
        run(tmp_path, "paths.data=nowhere")
    assert not (tmp_path / "config.yaml").exists()
    run(tmp_path, "optim.optimizer.lr=5e-2")
    assert done(tmp_path)["steps"] == 2


@pytest.mark.parametrize("trial", ["fast", "overfit", "profile"])
def test_a_trial_touches_no_run(trial, finished, run):
    before = contents(finished)
    with pytest.raises(SystemExit, match="holds a training, which debug= must not overwrite") as e:
        run(finished, f"debug={trial}")
    assert "\n" not in str(e.value)
    assert contents(finished) == before


def test_a_trial_has_its_own_name(compose, tmp_path):
    names = {
        compose(["experiment=resume_probe", *words], tmp_path).run_name
        for words in ([], ["debug=fast"])
    }
    assert len(names) == 2


def test_a_trial_is_no_start_of_a_run(run, tmp_path):
    for _ in range(2):  # and the command may be tried again
        run(tmp_path, "debug=overfit", "trainer.max_epochs=2")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=r"holds a trial \(debug=\).*resume=false"):
        run(tmp_path)
    assert contents(tmp_path) == before
    run(tmp_path, "resume=false")
    assert done(tmp_path)["steps"] == 2


def test_a_folder_that_is_no_run_is_not_cleared(run, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "mine.ckpt").write_bytes(b"precious")
    for words in (["debug=fast"], ["resume=false"], []):
        with pytest.raises(SystemExit, match=r"has checkpoints, but its config\.yaml"):
            run(tmp_path, *words)
    assert contents(tmp_path) == {"checkpoints/mine.ckpt": b"precious"}


def test_a_damaged_config_is_one_line(finished, run):
    (finished / "config.yaml").write_text("a: [")
    before = contents(finished)
    with pytest.raises(
        SystemExit, match=r"config\.yaml is damaged or was not .* ropelab: put the right one back"
    ) as caught:
        run(finished)
    assert "\n" not in str(caught.value)
    assert contents(finished) == before


@pytest.mark.parametrize("words", [["debug=fast"], ["resume=false"], []])
def test_files_that_no_run_has_left_are_not_touched(run, tmp_path, words):
    for name in ("checkpoints/model.safetensors", "wandb/run-1/file"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(SystemExit, match=r"has checkpoints, but its config\.yaml is missing"):
        run(tmp_path, *words)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("text", ["{}", "", "a: 1", "paths: 3", "paths: {run: null}"])
@pytest.mark.parametrize("words", [[], ["resume=false"]])
def test_a_config_of_something_else_is_refused(run, tmp_path, text, words):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit, match=r"config\.yaml is damaged or was not written by ropelab"):
        run(tmp_path, *words)
    assert contents(tmp_path) == {"config.yaml": text.encode()}


def test_an_empty_config_does_not_hide_what_made_the_weights(run, finished):
    (finished / "config.yaml").write_text("{}")
    before = contents(finished)
    with pytest.raises(SystemExit, match="damaged"):
        run(finished, "optim.optimizer.lr=9.0")
    assert contents(finished) == before


@pytest.mark.parametrize("how", [KeyboardInterrupt, RuntimeError, SystemExit])
@pytest.mark.parametrize("words", [["resume=false"], ["trainer.max_epochs=2"]])
def test_what_fails_before_the_first_step_gives_back_what_was_there(
    how, words, run, finished, monkeypatch
):
    def fail(*_):
        assert not (finished / "done.json").exists()
        raise how("too late")

    before = contents(finished)
    monkeypatch.setattr("lightning_modules.training.base.TrainingModule.on_fit_start", fail)
    with pytest.raises((RuntimeError, SystemExit), match=r"too late|130"):
        run(finished, *words)
    after = contents(finished)
    after.pop("train.log", None)
    assert after == before


def test_the_next_command_brings_back_what_a_killed_one_had_set_aside(run, finished, capsys):
    before = contents(finished)
    set_aside(finished, anew=True)
    run(finished)
    assert "already finished" in capsys.readouterr().out
    assert contents(finished) == before


def test_resume_false_removes_what_was_left_before_anything_was_trained(run, killed):
    shutil.rmtree(killed / "checkpoints")
    (killed / "metrics.csv").unlink()
    (killed / "samples.jsonl").write_text("of another run\n")
    run(killed, "resume=false", "seed=7")
    assert not (killed / "samples.jsonl").exists()


def test_after_the_first_step_nothing_comes_back(run, finished):
    weights = done(finished)["weights_sha256"]
    run(finished, "resume=false", "seed=7")
    assert done(finished)["weights_sha256"] != weights
    assert not (finished / ".before").exists()


@pytest.mark.parametrize("anew", [True, False])
@pytest.mark.parametrize("again", [False, True])
def test_a_kill_before_the_first_step_loses_nothing(anew, again, finished, monkeypatch):
    """The next command puts it back, even if that command is killed meanwhile."""
    before = contents(finished)
    set_aside(finished, anew)
    (finished / "config.yaml").write_text("of another command")
    if anew:
        (finished / "checkpoints").mkdir()
        (finished / "checkpoints" / "last.ckpt").write_text("of another command")
    if again:
        renamed = []

        def rename(path, target, rename=Path.rename):
            renamed.append(path)
            if len(renamed) == 3:
                raise KeyboardInterrupt
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            with pytest.raises(KeyboardInterrupt):
                give_back(finished)
    give_back(finished)
    assert contents(finished) == before
    give_back(finished)
    assert contents(finished) == before


def test_a_link_to_another_folder_gives_nothing_back(finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished, other)
    before = contents(other)
    (finished / ".before").symlink_to(other)
    (finished / ".before.partial").symlink_to(other)
    give_back(finished)
    assert contents(other) == before
    assert not list(finished.glob(".before*"))


def test_a_kill_while_the_empty_backup_is_removed_loses_nothing(finished, monkeypatch):
    before = contents(finished)
    set_aside(finished, anew=True)

    def rmtree(path, rmtree=shutil.rmtree):
        if not Path(path).name.startswith(".before"):
            rmtree(path)
            return
        (Path(path) / "returning").unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", rmtree)
        with pytest.raises(KeyboardInterrupt):
            give_back(finished)
    give_back(finished)
    assert contents(finished) == before


def test_a_kill_while_it_is_set_aside_loses_nothing(finished, monkeypatch):
    before = contents(finished)
    for after in range(1, 8):
        renamed = []

        def rename(path, target, rename=Path.rename, after=after, renamed=renamed):
            if len(renamed) == after:
                raise KeyboardInterrupt
            renamed.append(path)
            return rename(path, target)

        with monkeypatch.context() as patched:
            patched.setattr(Path, "rename", rename)
            try:
                set_aside(finished, anew=True)
            except KeyboardInterrupt:
                assert len(renamed) == after
        give_back(finished)
        assert contents(finished) == before


def test_a_place_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match=r"file/run cannot be written .*hydra\.run\.dir") as caught:
        run(tmp_path / "file" / "run")
    assert "\n" not in str(caught.value)


def test_an_evaluation_writes_over_no_training_and_no_other_evaluation(
    finished, compose, tiny, tmp_path
):
    def claim(folder: Path, *words: str) -> None:
        config = compose([*tiny, f"run={finished}", *words], folder, "evaluate")
        with rundir.RunDirectory(config).claim():
            pass

    before = contents(finished)
    for words in ([], ["resume=false"]):
        with pytest.raises(ValueError, match="holds a training, which this evaluation must not"):
            claim(finished, *words)
    assert contents(finished) == before

    out = tmp_path / "out"
    claim(out)
    (out / "needle.json").write_text("{}")
    claim(out)
    with pytest.raises(ValueError, match=r"evaluated with data.grid.needles=6, this run has 3"):
        claim(out, "data.grid.needles=3")
    with pytest.raises(ValueError, match=r"evaluated with run="):
        claim(out, "run=other")


# Copies


@pytest.fixture
def with_id(finished) -> Path:
    (finished / "run_id").write_text("12345678")
    return finished


def test_a_copy_is_its_own_run(with_id, run, tmp_path, caplog):
    copy = tmp_path / "copy"
    shutil.copytree(with_id, copy)
    run(copy, "trainer.max_epochs=2")
    assert (copy / "run_id").read_text() != "12345678"
    assert f"{copy} is a copy of {with_id}" in caplog.text
    assert (with_id / "run_id").read_text() == "12345678"
    own = (copy / "run_id").read_text()
    run(copy, "trainer.max_epochs=3")
    assert (copy / "run_id").read_text() == own


def test_a_finished_copy_is_finished(with_id, run, tmp_path, capsys):
    shutil.copytree(with_id, tmp_path / "copy")
    run(tmp_path / "copy")
    assert "already finished" in capsys.readouterr().out


def test_a_moved_run_stays_itself(with_id, run, tmp_path):
    moved = with_id.rename(tmp_path / "moved")
    run(moved, "trainer.max_epochs=2")
    assert (moved / "run_id").read_text() == "12345678"


def test_links_and_other_runs_are_no_originals(with_id, tmp_path, monkeypatch):
    link, other = tmp_path / "link", tmp_path / "other"
    link.symlink_to(with_id)
    with monkeypatch.context() as patch:
        patch.setattr(rundir.secrets, "token_hex", None)  # nothing is written for the check
        assert find_original(with_id, str(link)) is None
        assert find_original(link, str(with_id)) is None
    shutil.copytree(with_id, other)
    assert find_original(other, str(with_id)) == with_id
    (other / "run_id").write_text("87654321")  # started anew since then
    assert find_original(other, str(with_id)) is None
    assert not list(tmp_path.rglob(".probe*"))


def test_the_same_directory_under_another_mount_is_no_copy(with_id, tmp_path, monkeypatch):
    """Two mounts of one network folder have different device numbers."""
    (tmp_path / "mount").symlink_to(with_id)
    monkeypatch.setattr(rundir.os.path, "samefile", lambda a, b: False)
    assert find_original(with_id, str(tmp_path / "mount")) is None


# What is compared


def config(**sections: Any) -> dict[str, Any]:
    return {"paths": {"run": "/a/run", "data": "data"}, "test": True, **sections}


def test_paths_in_the_run_directory_move_with_it():
    then, now = (
        {"paths": {"run": run, "data": data}, "model": {"x": f"{run}/m"}, "prepare": [f"{data}/p"]}
        for run, data in (("/a/run", "data"), ("/b/copy", "/scratch/7/data"))
    )
    assert compare(then, now) == ({}, {})
    # Outside of the run directory, but with a name that begins like it.
    beside = then | {"model": {"x": "/a/running/m"}}, now | {"model": {"x": "/b/copyning/m"}}
    assert compare(*beside)[0].keys() == {"model.x"}


def test_null_and_what_is_not_said_are_the_same():
    then = config(trainer={"a": None, "b": []}, optim={})
    assert compare(then, config(trainer={"c": None})) == ({}, {})


def test_what_is_longer_or_tested_is_gone_on_with():
    then = config(trainer={"max_epochs": 1}, data={"grid": {"n": 1}}) | {"test": False}
    now = config(trainer={"max_epochs": 2}, data={"grid": {"n": 2}})
    assert compare(then, now) == (
        {},
        {"trainer.max_epochs": (1, 2), "data.grid.n": (1, 2), "test": (False, True)},
    )
    assert compare(now, now | {"test": False}) == ({}, {})


def test_the_weight_of_a_mixture_is_no_place():
    def mixture(folder: str, weight: float) -> dict[str, Any]:
        return config(data={"train": {"a": {"shards": folder, "weight": weight}}})

    weights, further = compare(mixture("x", 1.0), mixture("y", 2.0))
    assert weights == {"data.train.a.weight": (1.0, 2.0)}
    assert further == {"data.train.a.shards": ("x", "y")}


def test_other_data_is_taken_where_it_is_asked_for():
    then = config(data={"batch_size": 1, "stream": {"on_changed": "stop"}}, seed=0)
    now = config(data={"batch_size": 2, "stream": {"on_changed": "go_on"}}, seed=1)
    assert compare(then, now)[0] == {"seed": (0, 1)}
    assert compare(now, then)[0].keys() == {"seed", "data.batch_size"}


def test_the_key_that_is_typed_is_named_before_what_interpolates_it():
    def both(lr: float, seed: int) -> dict[str, Any]:
        return config(
            optim={"lr": lr}, module={"optimizer": {"lr": lr}}, data={"seed": seed}, seed=seed
        )

    assert next(iter(compare(both(1, 0), both(2, 0))[0])) == "optim.lr"
    assert next(iter(compare(both(1, 0), both(1, 2))[0])) == "seed"


def test_one_folder_of_initial_weights_however_it_is_written(tmp_path, monkeypatch):
    (tmp_path / "w").mkdir()
    monkeypatch.chdir(tmp_path)
    assert compare(config(init="w"), config(init=str(tmp_path / "w"))) == ({}, {})
    assert "init" in compare(config(init="w"), config(init="v"))[0]


def test_a_run_made_before_the_trainer_had_all_its_keys_is_the_same_run(compose, tmp_path):
    """No key that is new in configs/trainer, with its default, makes an old directory another."""
    now: Any = OmegaConf.to_container(compose(["experiment=resume_probe"], tmp_path), resolve=True)
    before = ("_target_", "default_root_dir", "accelerator", "devices", "max_epochs", "precision")
    before += ("gradient_clip_val", "log_every_n_steps", "num_sanity_val_steps")
    before += ("accumulate_grad_batches",)
    then = now | {"trainer": {key: now["trainer"][key] for key in before}}
    then["trainer"]["val_check_interval"] = 0.5
    assert compare(then, now) == ({}, {})
    assert compare_all({"run": "x", **then}, {"run": "x", **now}) == {}
    runs = [Settings(tmp_path, {}), Settings(tmp_path, {})]
    for run, config in zip(runs, (then, now), strict=True):
        run.__dict__.update(config=config, choices={})
    assert factors(runs) == {}
    longer = now | {"trainer": now["trainer"] | {"max_steps": 9}}
    assert compare(then, longer)[1] == {"trainer.max_steps": (None, 9)}


def test_callbacks_that_may_change_weights_are_compared():
    def config(**callbacks: Any) -> dict[str, Any]:
        return {"seed": 0, "callbacks": callbacks}

    watching = {
        "progress": {"_target_": "lightning.pytorch.callbacks.RichProgressBar", "leave": True},
        "status": {"_target_": "lightning_modules.callbacks.heartbeat.Heartbeat", "every_s": 10.0},
    }
    averaging = {"_target_": "lightning.pytorch.callbacks.StochasticWeightAveraging"}
    other = {"x": {"_target_": "my_package.Callback"}}
    plain, guard = config(), {"_target_": "lightning_modules.callbacks.guard.NonFiniteGuard"}
    assert compare(plain, config(**watching)) == ({}, {})
    assert compare(config(**watching), plain) == ({}, {})
    assert compare(plain, config(swa=averaging))[0].keys() == {"callbacks.swa._target_"}
    # under the key of a callback that only watches
    assert compare(config(**watching), config(progress=averaging))[0]
    assert compare(plain, config(**other))[0].keys() == {"callbacks.x._target_"}
    assert compare(config(finite=guard), plain)[0].keys() == {"callbacks.finite._target_"}
    more = config(finite=guard | {"max_skipped": 99})
    assert compare(config(finite=guard | {"max_skipped": 10}), more) == ({}, {})


def test_shards_of_other_options_are_not_trained_on(tmp_path):
    folder = tmp_path / "shards"
    prepare_shards(folder, {"train": [2]}, num_frames=4, size=32)
    before = contents(folder)
    prepare_shards(folder, {"train": (2,)}, num_frames=4, size=32)
    for counts, frames, line in (
        ([3], 4, r'counts=\{"train": \[2\]\}, this run has \{"train": \[3\]\}: remove that folder'),
        ([2], 5, "num_frames=4, this run has 5"),
    ):
        with pytest.raises(ValueError, match=line):
            prepare_shards(folder, {"train": counts}, num_frames=frames, size=32)
    with pytest.raises(ValueError, match='make=null, this run has "make_pair"'):
        prepare_shards(folder, {"train": [2]}, num_frames=4, size=32, make=make_pair)
    assert contents(folder) == before


def test_which_of_our_own_callbacks_may_change_weights(compose, tiny, tmp_path):
    """All but two keys that ropelab-train starts with may be left out when a run continues."""
    config = OmegaConf.to_container(compose(tiny, tmp_path), resolve=True)
    compared = compare(config, config | {"callbacks": {}})[0]
    assert {key.split(".")[1] for key in compared} == {"finite", "randomness"}
