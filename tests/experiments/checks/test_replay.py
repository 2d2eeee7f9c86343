"""A run directory is data: evaluating one runs no code that comes with it."""

import json
import os
import re
import sys
from pathlib import Path

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser

from datamodules.errors import BadSampleError
from datamodules.stream.reading.source import REPLAYED, find_remote, open_source
from experiments.checks.replay import Replay, _quoted, read_replay
from experiments.checks.trust import _configured, refusal


@pytest.fixture
def hostile(tmp_path) -> Path:
    """Returns the words of a run directory that are replayed."""
    folder = tmp_path / "theirs"
    (folder / ".hydra").mkdir(parents=True)
    (folder / "hub").mkdir()
    (folder / ".hydra" / "overrides.yaml").write_text("[]")
    (folder / ".hydra" / "hydra.yaml").write_text("hydra: {runtime: {cwd: /theirs}}")
    (folder / "config.yaml").write_text("paths: {data: data}")
    return folder


@pytest.fixture
def replay(hostile):
    """Calls `read_replay` with these words in the run's overrides."""

    def read(*words: str, typed: tuple[str, ...] = ()):
        told = [word.replace("{run}", str(hostile)) for word in words]
        (hostile / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(told))
        return read_replay([f"run={hostile}", *typed])

    return read


@pytest.fixture
def check(replay, hostile, tmp_path):
    """Composes the words of run and user over a small config, and checks the result."""
    options = tmp_path / "options"
    options.mkdir()
    (options / "evaluate.yaml").write_text(
        "run: ???\ntrust: []\nname: x\nprepare: {_target_: shutil.rmtree}\n"
        f"paths: {{data: d, run: {tmp_path}/out}}\n"
        "logger: {csv: {_target_: lightning_modules.loggers.csv.ResumableCSVLogger, "
        "save_dir: '${paths.run}'}}\n"
        "data: {_target_: datamodules.instruct.InstructDataModule, val: null}\n"
    )

    def composed(*words: str, typed: tuple[str, ...] = ()) -> None:
        read = replay(*words, typed=typed)
        with hydra.initialize_config_dir(str(options), version_base="1.3"):
            read.check(hydra.compose("evaluate", [*read.words, *read.typed]))

    return composed


HUB = "+logger.x={_target_: torch.hub.load, repo_or_dir: '{run}/hub', model: m, source: local}"
NODES = {
    "the hub of torch": HUB,
    "a module that is imported": "+logger.x={_target_: intruder.m}",
    "a nested node": "+callbacks={_target_: lightning.pytorch.callbacks.Timer, "
    "duration: {_target_: intruder.m}}",
    "a list": "+trainer.plugins=[{_target_: intruder.m}]",
    "a partial": "+logger.x={_target_: intruder.m, _partial_: true}",
    "positions": "+logger.x={_target_: builtins.eval, _args_: ['__import__(\"intruder\")']}",
    "a walk through a module": "+logger.x="
    "{_target_: lightning_modules.checkpoint.weights.torch.hub.load, "
    "repo_or_dir: '{run}/hub', model: m, source: local}",
    "a walk from an allowed module": "+logger.x={_target_: torch.optim.torch.hub.load, "
    "repo_or_dir: '{run}/hub', model: m, source: local}",
    "by another's getter": "+logger.x={_target_: hydra.utils.get_method, path: intruder.m}",
    "Lightning's own importer": "+logger.x={_target_: lightning.pytorch.cli.import_module, "
    "name: intruder}",
    "a path made of others": "name=intruder",
    "the module of training": "data._target_=intruder.m",
}


@pytest.mark.parametrize("word", NODES.values(), ids=NODES.keys())
def test_no_object_of_others_is_built(word, check):
    more = ("+logger.x={_target_: '${name}.m'}",) if word.startswith("name=") else ()
    with pytest.raises(ValueError, match=r"add 'trust=\[\w+\]' if you know"):
        check(word, *more)
    assert "intruder" not in sys.modules


def test_words_that_name_own_classes_pass(check):
    check("name=y", "data.val=[a.tar,'s3://b/c.tar']", "~logger.csv")
    check("+logger.x={_target_: torch.optim.AdamW, _partial_: true}")


@pytest.mark.parametrize(
    "value", ["pipe:true", "[a.tar,'pipe:true']", "{a: {shards: ' pipe:true'}}"]
)
def test_a_command_is_refused_unless_asked_for(value, check):
    word = f"data.val={value}"
    with pytest.raises(ValueError, match=r"a shell command: add 'trust=\[pipe:\]'"):
        check(word)
    check(word, typed=("trust=[pipe:]",))
    check("data.val=x", typed=(word,))


CONFIGS = {
    "an option of Hydra's": ["--config-dir={run}/hub", "+evil=x"],
    "two words": ["--config-dir", "{run}/hub"],
    "a pickle of Hydra's": ["--experimental-rerun={run}/hub/config.pickle"],
    "a path among the options": ["data=../..{run}/hub/evil"],
    "a list of them": ["+scores=[../..{run}/hub/evil]"],
    "Hydra's callbacks by package": ["+debug@hydra.callbacks.x=fast"],
    "a variable": ["name=${oc.env:SECRET}"],
    "in quotes": ["name='a${oc.env:SECRET}'"],
    "with escaped braces": ["name=$\\{oc.env:SECRET\\}"],
    "by a name that is put together": ["+tags=[oc.env]", "name='${${tags.0}:SECRET}'"],
    "in a dictionary": ["+logger.w={a: ['${oc.env:SECRET}']}"],
    "what decodes": ["name=${oc.decode:x}"],
    "what imports": ["name=${installed:intruder.x,y}"],
    "where the run writes": ["paths={run: /tmp/elsewhere}"],
    "where a logger writes": ["logger.csv.save_dir={run}/../elsewhere"],
    "a sweep": ["name=1,2"],
}


CSV = "+logger.y={_target_: lightning.pytorch.loggers.CSVLogger, save_dir: '${paths.run}'"
BOARD = "+logger.y={_target_: lightning.pytorch.loggers.TensorBoardLogger"
OUT = {
    "a name": f"{CSV}, name: /elsewhere, version: ''}}",
    "a name that climbs": f"{CSV}, name: ../../out}}",
    "a version": f"{CSV}, version: /elsewhere}}",
    "a name that is put together": f"{CSV}, name: '${{name}}/../out'}}",
    "a folder below": f"{BOARD}, save_dir: '${{paths.run}}', sub_dir: a/../../b}}",
    "a position": f"{BOARD}, _args_: [elsewhere]}}",
    "a file of a checkpoint": "+callbacks.c={_target_: lightning.pytorch.callbacks.ModelCheckpoint,"
    " filename: ../x}",
    "a file of a profile": "+more.trainer={_target_: lightning.Trainer, profiler: {_target_: "
    "lightning.pytorch.profilers.SimpleProfiler, filename: /elsewhere}}",
    "among the data": "+data.x={_target_: lightning.pytorch.loggers.CSVLogger, "
    "save_dir: '${paths.run}', name: /elsewhere}",
    "a partial": f"{CSV}, version: /elsewhere, _partial_: true}}",
    "an own callback": "+callbacks.h={_target_: lightning_modules.callbacks.heartbeat.Heartbeat, "
    "_args_: [elsewhere]}",
    "its options": "+logger.w={_target_: lightning_modules.loggers.wandb.ResumableWandbLogger, "
    "save_dir: '${paths.run}', settings: {root_dir: /elsewhere}}",
    "W&B's folder": "+logger.w={_target_: lightning.pytorch.loggers.WandbLogger, dir: elsewhere}",
    "indexes of shards": "+data.stream={index_cache: /elsewhere}",
}


@pytest.mark.parametrize("word", OUT.values(), ids=OUT.keys())
def test_what_it_builds_writes_nothing_outside_of_the_results(word, check):
    with pytest.raises(ValueError, match=r"a folder to write to outside of .*: set .* yourself"):
        check(word)
    check(typed=(word,))


def test_loggers_are_replayed_with_names_of_folders_in_the_results(check, tmp_path):
    check(f"{CSV}, name: a/b, version: '${{paths.run}}/c'}}")
    check(f"{BOARD}, save_dir: {tmp_path}/out/x, name: a..b, prefix: ''}}")
    check("data.val=/somewhere/data.tar", "+data.media_root=../videos")


@pytest.mark.parametrize("words", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_run_says_nothing_about_the_program_or_the_machine(words, check, hostile):
    with pytest.raises(ValueError, match=re.escape(str(hostile))) as caught:
        check(*words)
    assert "\n" not in str(caught.value)


def test_a_variable_may_be_asked_for_by_its_resolver(replay):
    word = "name=${oc.env:HOME}"
    assert word in replay(word, typed=("trust=[oc.env:]",)).words


def test_its_path_of_data_holds_no_interpolation(replay, hostile):
    (hostile / "config.yaml").write_text("paths: {data: 'http://x/${oc.env:SECRET}'}")
    with pytest.raises(ValueError, match="must not set the folder of its data"):
        replay()


@pytest.mark.parametrize("name", ["plain", "it's", "back\\'s", "a\\", "x, y {z} [1]", "$HOME"])
def test_any_other_path_comes_through_whole(name):
    word = f"paths.data={_quoted(Path('/data') / name, Path('run'))}"
    assert OverridesParser.create().parse_override(word).value() == f"/data/{name}"


def test_trust_in_a_package_is_none_in_what_it_imports(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("import os\nclass Logger: pass\ndef make(): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert refusal("mine.Logger", ["mine"]) is None
    assert refusal("mine.make", ["mine"]) is None
    assert refusal("mine.os.system", ["mine"]) == "is not defined in mine"
    assert refusal("mine.Logger", ["min"]) == "is not a class of this package"
    assert refusal("mine.Logger") == "is not a class of this package"


def test_what_is_typed_is_not_restricted(check):
    check(typed=("+logger.x={_target_: torch.hub.load, repo_or_dir: here}",))
    check("name=y", typed=("+logger.x._target_=torch.hub.load",))
    check(typed=("logger.csv.save_dir=/tmp/elsewhere",))
    with pytest.raises(ValueError, match=r"trust=\[torch\]"):  # the run sets only a part of it
        check("+logger.x={repo_or_dir: theirs}", typed=("+logger.x._target_=torch.hub.load",))


def test_a_rank_is_told_the_words_of_the_run_once(replay, hostile):
    first = replay("name=y", typed=("seed=3",))
    again = read_replay([*first.words, *first.typed])
    assert (again.words, again.typed) == (first.words, first.typed)
    assert first.words == ["name=y", "paths.data='/theirs/data'"]


def test_a_word_of_an_older_training_still_applies(replay):
    words = ["+trainer.max_steps=3", "+trainer.limit_val_batches=1"]
    assert replay(*words).words[:2] == ["trainer.max_steps=3", "+trainer.limit_val_batches=1"]


def test_what_belongs_to_the_training_alone_is_left_out(replay):
    words = ["hydra.run.dir=x", "hydra/launcher=y", "+launcher=slurm", "debug=fast", "resume=false"]
    words += ["paths.run=x", "++paths.runs=y", "trust=[os]", "+run=z", "init=../w", "test=false"]
    assert replay(*words, "name=y", "~tags").words == [
        "name=y",
        "~tags",
        "paths.data='/theirs/data'",
    ]


@pytest.mark.parametrize(
    "path",
    [
        "lightning_modules.rotary.mrope.MRope",
        "lightning_modules.checkpoint.LastCheckpoint",
        "lightning_modules.training.optim.schedule",
        "datamodules.shards.synthetic.make_sample",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.CosineAnnealingLR",
        "lightning.Trainer",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.callbacks.RichProgressBar",
        "lightning.pytorch.loggers.TensorBoardLogger",
    ],
)
def test_these_are_built_from_any_run(path):
    assert refusal(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "lightning_modules.checkpoint.weights._PlainReader",
        "lightning_modules.checkpoint.weights.FileSystemReader",
        "lightning_modules.checkpoint.weights.read_checkpoint",
        "lightning_modules.loggers.wandb.finish_wandb",
        "lightning_modules.loggers.csv.csv.DictWriter",
        "lightning_modules.loggers.csv.ResumableCSVLogger.log_metrics",
        "datamodules.common.atomic.write_whole",
        "datamodules.stream.reading.source.subprocess.Popen",
        "experiments.directory.run_directory.RunDirectory",
        "torch.optim.Optimizer.__subclasshook__",
        "torch.optim.lr_scheduler.partial",
        "torch.load",
        "lightning.seed_everything",
        "lightning.pytorch.loggers.MLFlowLogger",
        "lightning.pytorch.callbacks.callback.Callback",
        "lightning.pytorch.utilities.rank_zero_only",
        "functools.partial",
        "eval",
        "",
        "lightning_modules",
        "lightning_modules..weights.x",
        ".os.system",
        None,
        3,
    ],
)
def test_and_these_are_not(path):
    assert refusal(path)


def test_every_class_of_the_shipped_configs_may_be_replayed():
    launchers = {name for name in _configured() if name.startswith("hydra_plugins.")}
    # Hydra's own settings are not replayed, so its callback is not built.
    others = _configured() - launchers - {"experiments.checks.folder.MakeFolder"}
    assert len(others) > 40
    assert {name: why for name in others if (why := refusal(name))} == {}


def test_a_url_that_does_more_than_fetch_is_not_opened(monkeypatch):
    monkeypatch.setenv(REPLAYED, json.dumps(["reference://typed", "oss2:"]))
    for url in ("pipe:true", "github://x:y@z/a.tar", "simplecache::s3://a/b.tar"):
        with pytest.raises(ValueError, match=r"trust="):
            open_source(url, 1.0)
        with pytest.raises(ValueError, match=r"trust="):
            find_remote(url)
    for url in ("https://x/a.tar", "reference://b", "oss2://c"):
        open_source(url, 1.0).close()
    with pytest.raises(BadSampleError, match="no such file"):
        open_source("pipes/a.tar", 1.0)


def test_the_guard_names_what_was_typed_and_ends(replay, monkeypatch):
    monkeypatch.delenv(REPLAYED, raising=False)
    read = replay("data.val='pipe:theirs'", typed=("data.val=['pipe:mine']", "trust=[gist:]"))
    with read.guard():
        assert json.loads(os.environ[REPLAYED]) == ["pipe:mine", "gist:"]
        open_source("pipe:mine", 1.0).close()
        with pytest.raises(ValueError, match="pipe:theirs"):
            open_source("pipe:theirs", 1.0)
    assert REPLAYED not in os.environ
    with read_replay([]).guard():
        assert REPLAYED not in os.environ, "nothing is replayed"


def test_damaged_words_are_one_line(hostile):
    path = hostile / ".hydra" / "overrides.yaml"
    for text in ("a: 1", "[1, 2]", "{", "null", "!!python/object/apply:os.getcwd []"):
        path.write_text(text)
        with pytest.raises(ValueError, match="are damaged"):
            read_replay([f"run={hostile}"])


@pytest.mark.parametrize("name", [".hydra/overrides.yaml", ".hydra/hydra.yaml", "config.yaml"])
def test_its_words_are_no_link_out_and_no_bomb(name, hostile, tmp_path):
    path = hostile / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="is a link to"):
        read_replay([f"run={hostile}"])
    path.unlink()
    path.write_text("[&a [], *a]")
    with pytest.raises(ValueError, match="has aliases"):
        read_replay([f"run={hostile}"])


def test_results_do_not_go_where_a_link_of_its_leads(hostile, tmp_path):
    (hostile / "evaluate").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="evaluate is a link to"):
        read_replay([f"run={hostile}"])
    assert read_replay([f"run={hostile}", "hydra.run.dir=out"]).words


@pytest.mark.parametrize("option", [["--cfg", "job"], ["--cfg=job"], ["-c", "job"]])
def test_the_value_of_an_option_is_no_override(option):
    with Replay(None, option, ["seed=1"]).guard():
        assert json.loads(os.environ[REPLAYED]) == []
