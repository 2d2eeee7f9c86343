"""Preference tuning: the losses are TRL's, the log-probabilities the model's own."""

import csv
import json
import logging
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from shutil import copytree

import pytest
import torch
from lightning import Callback, Trainer
from torch.nn.functional import log_softmax

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, BadSampleError, PreferenceBatch
from datamodules.conversation import ConversationEncoder
from datamodules.frames import FrameReader, UniformSampler
from datamodules.index import Shard
from datamodules.pack import write_shard
from datamodules.preference import decode_pair
from datamodules.synthetic import make_pair, write_shards
from datamodules.tar import untar_sample
from experiments import CONFIG_DIR, evaluate, train
from experiments import reference as program
from experiments.run import build, plain, share_steps
from lightning_modules.dpo import HingeLoss, IPOLoss, SigmoidLoss
from lightning_modules.loss import sequence_log_probs
from lightning_modules.model import LogProbs
from lightning_modules.preference import PreferenceModule
from lightning_modules.randomness import SeedByPosition
from lightning_modules.reference import StreamedReference

GOLDEN = json.loads((Path(__file__).parent / "golden" / "dpo" / "trl.json").read_text())
LOSSES = {"sigmoid": SigmoidLoss, "ipo": IPOLoss, "hinge": HingeLoss}
OPTIONS = {
    group: sorted(path.stem for path in (CONFIG_DIR / "module" / group).glob("*.yaml"))
    for group in ("loss", "reference")
}

#: The recipe at a size that trains in seconds.
TINY = [
    "experiment=ppllava_dpo_tiny",
    "encoder=clip_tiny",
    "model.encoder.image_size=32",
    "model.encoder.config.vision={patch_size:8,hidden_size:32,num_attention_heads:2}",
    "model.encoder.config.vision.num_hidden_layers=2",
    "llm=tiny",
    "model.llm.config={hidden_size:64,intermediate_size:64,num_hidden_layers:2}",
    "model.llm.config.num_attention_heads=2",
    "model.llm.config.num_key_value_heads=2",
    "tuning=full",
    "prepare=null",
    "data.batch_size=2",
    "data.global_batch_size=4",
    "data.stream.num_workers=0",
    "data.stream.virtual_streams=2",
    "data.frames.sampler.num_frames=2",
    "trainer.max_epochs=1",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=null",
    "callbacks.generations=null",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
    "print_config=false",
    "logger=csv",
]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """16 pairs to train on, in two shards, and 5 others."""
    folder = tmp_path_factory.mktemp("pairs")
    write_shards(folder / "train", [9, 7], num_frames=4, make=make_pair)
    write_shards(folder / "val", [5], seed=1000, num_frames=4, make=make_pair)
    return folder


@pytest.fixture(scope="module")
def words(shards):
    return [*TINY, f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"]


@pytest.fixture(scope="module")
def make_stage(words, compose, tmp_path_factory):
    """`make_stage(*overrides)`: the module and the datamodule; its weights are those of a run."""

    def make(*overrides):
        config = compose([*words, *overrides], tmp_path_factory.mktemp("stage"))
        module = build(config.module, "module")(model=plain(config.model))
        torch.manual_seed(0)
        return module, build(config.data, "data")

    return make


def read_pairs(data, count, split="train"):
    data.prepare_data()
    shard = data.shards()[split][0]
    return [data.decoder()(raw) for raw in read_shard(Path(shard.url))[:count]]


def read_shard(path):
    data = path.read_bytes()
    bounds = pairwise(Shard(str(path), 0).read_offsets())
    return [untar_sample(data[start:end], str(path)) for start, end in bounds]


# Losses


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda c: f"{c['trl']}-{c['loss']}")
def test_losses_and_gradients_are_those_of_trl(case):
    options = {"label_smoothing": case["label_smoothing"]} if case["loss"] == "sigmoid" else {}
    loss = LOSSES[case["loss"]](case["beta"], **options)
    module = PreferenceModule({}, list, loss=loss, reference=StreamedReference())
    policy = torch.tensor(GOLDEN["policy"], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor(GOLDEN["reference"], dtype=torch.float64)
    values = module.judge(
        LogProbs(policy, torch.tensor(GOLDEN["counts"]), torch.tensor(0)), reference
    )
    mean = values["loss"].mean()
    mean.backward()
    assert mean.item() == pytest.approx(case["mean_loss"], rel=1e-12)
    if "losses" in case:
        assert values["loss"].tolist() == pytest.approx(case["losses"], rel=1e-12)
    expected = torch.tensor(case["gradients"], dtype=torch.float64)
    torch.testing.assert_close(policy.grad, expected, rtol=1e-10, atol=1e-14)
    names = {
        "rewards/chosen": "reward_chosen",
        "rewards/rejected": "reward_rejected",
        "rewards/accuracies": "reward_accuracy",
        "rewards/margins": "reward_margin",
        "logps/chosen": "logp_chosen",
        "logps/rejected": "logp_rejected",
    }
    for name, value in case.get("metrics", {}).items():
        rel = 1e-6 if "accuracies" in name else 1e-12  # that one is float32
        assert values[names[name]].mean().item() == pytest.approx(value, rel=rel), name


def test_the_golden_numbers_cover_losses_betas_and_smoothing():
    cases = {(c["loss"], c["beta"], c["label_smoothing"]) for c in GOLDEN["cases"]}
    assert {loss for loss, _, _ in cases} == set(LOSSES) == set(OPTIONS["loss"])
    assert len({beta for _, beta, _ in cases}) == 3
    assert {smoothing for loss, _, smoothing in cases if loss == "sigmoid"} == {0.0, 0.1, 0.3}


@pytest.mark.parametrize("loss", [SigmoidLoss(0.3, 0.2), IPOLoss(0.3), HingeLoss(0.3)])
def test_gradients_are_finite_differences(loss):
    rng = torch.Generator().manual_seed(0)
    four = [torch.randn(5, generator=rng, dtype=torch.float64) for _ in range(4)]
    assert torch.autograd.gradcheck(loss, [values.requires_grad_() for values in four])


def test_a_likelihood_term_is_the_mean_over_answers_of_means_over_tokens():
    sums = torch.tensor([[-6.0, -4.0], [-2.0, -9.0]])
    policy = LogProbs(sums, torch.tensor([[3, 2], [4, 3]]), torch.tensor(0))
    made = {"loss": SigmoidLoss(), "reference": StreamedReference()}
    plain_loss, with_term, only_term = (
        PreferenceModule({}, list, **made, **weights).judge(policy, sums - 1)["loss"].mean()
        for weights in ({}, {"gamma": 0.5}, {"gamma": 2.0, "dpo_alpha": 0.0})
    )
    assert (with_term - plain_loss).item() == pytest.approx(0.5 * (2.0 + 0.5) / 2)
    assert only_term.item() == pytest.approx(2.0 * (2.0 + 0.5) / 2)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: HingeLoss(0.0), r"module\.loss\.beta is 0\.0; set it above 0"),
        (
            lambda: SigmoidLoss(0.1, 0.5),
            r"label_smoothing is 0\.5; set it to 0 or more, below 0\.5",
        ),
    ],
)
def test_what_a_loss_does_not_take_is_said_in_one_line(make, says):
    with pytest.raises(ValueError, match=says):
        make()


# Log-probabilities


def test_sequence_log_probs_are_those_of_all_logits():
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 7, 4, generator=rng, requires_grad=True)
    weight = torch.randn(11, 4, generator=rng)
    labels = torch.randint(0, 11, (3, 7), generator=rng)
    labels[0, :4] = labels[1, 5:] = labels[2] = IGNORE_INDEX  # the last row has none
    asked = []

    def head(states):
        asked.append(len(states))
        return states @ weight.T

    sums, counts = sequence_log_probs(hidden, labels, head)
    everywhere = log_softmax(hidden[:, :-1] @ weight.T, dim=-1)
    for row in range(3):
        learnt = [n for n in range(1, 7) if labels[row, n] != IGNORE_INDEX]
        expected = sum(everywhere[row, n - 1, labels[row, n]] for n in learnt)
        assert counts[row] == len(learnt)
        torch.testing.assert_close(sums[row], torch.as_tensor(expected, dtype=torch.float32))
    assert asked == [counts.sum()]
    sums.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad[2].abs().max() == 0
    assert sequence_log_probs(hidden.bfloat16(), labels, lambda h: h @ weight.bfloat16().T)[
        0
    ].dtype == (torch.float32)


@pytest.mark.parametrize("rotary", sorted(p.stem for p in (CONFIG_DIR / "rotary").glob("*.yaml")))
def test_a_pair_in_a_batch_is_each_answer_alone(rotary, make_stage):
    """Whatever it is padded to; and the visuals are encoded once."""
    sections = ["model.llm.config.head_dim=32"]
    module, data = make_stage(f"rotary={rotary}", *[f"+{word}" for word in sections])
    pairs = read_pairs(data, 3)
    network = module.network.eval()
    encoded = []
    network.encoder.register_forward_hook(lambda _, args, __: encoded.append(len(args[0])))
    with torch.no_grad():
        together = network.log_probs(data.collater()(pairs))
        assert encoded == [3 * 2]
        for row, pair in enumerate(pairs):
            batch = data.collater()([pair])
            for column, answer in enumerate((batch.chosen, batch.rejected)):
                output = network(answer)
                alone = -output.loss * output.labelled
                assert together.counts[row, column] == output.labelled
                torch.testing.assert_close(together.sums[row, column], alone, rtol=1e-4, atol=1e-4)


# Batches


def encode(entry, **options):
    frames = FrameReader(32, UniformSampler(2))
    raw = {"__url__": "a.tar", "__key__": "k", "json": json.dumps(entry).encode()}
    return decode_pair(raw, frames, ConversationEncoder(**options))


def entry(**changed):
    question = {"from": "human", "value": "Which one?"}
    made = {"conversations": [question], "chosen": "the red one", "rejected": "blue"}
    return {k: v for k, v in (made | changed).items() if v is not None}


def answer_of(encoded):
    tokenizer = ConversationEncoder().tokenizer
    return tokenizer.decode([n for n in encoded.labels if n != IGNORE_INDEX])


def test_only_the_last_answer_is_judged():
    turns = [("human", "One?"), ("gpt", "first answer"), ("human", "Two?")]
    pair = encode(entry(conversations=[{"from": r, "value": t} for r, t in turns]))
    assert answer_of(pair.chosen).startswith("the red one")
    assert "first" not in answer_of(pair.chosen) + answer_of(pair.rejected)
    assert answer_of(pair.rejected).startswith("blue")
    first = next(n for n, label in enumerate(pair.chosen.labels) if label != IGNORE_INDEX)
    assert pair.chosen.input_ids[:first] == pair.rejected.input_ids[:first]


def test_answers_never_guide_the_pooler():
    pair = encode(entry(), prompt_with_answers=True)
    assert pair.chosen.prompt_ids == pair.rejected.prompt_ids == encode(entry()).chosen.prompt_ids


def test_the_fields_of_llava_hound_are_read():
    hound = entry(conversations=None, prompt="Which one?", answer="other", chosen_score=5)
    assert encode(hound) == encode(entry())


@pytest.mark.parametrize(
    ("changed", "options", "reason"),
    [
        ({"chosen": None}, {}, "missing_field"),
        ({"rejected": " "}, {}, "missing_field"),
        ({"conversations": None}, {}, "missing_field"),
        ({"conversations": []}, {}, "missing_field"),
        ({"rejected": "the red one"}, {}, "no_preference"),
        ({"chosen": "Why? " * 50 + "a", "rejected": "Why? " * 50}, {"max_length": 64}, "no_pref"),
        (
            {"conversations": [{"from": "human", "value": "W" * 500}]},
            {"max_length": 20},
            "too_long",
        ),
        ({"conversations": [{"from": "human", "value": "<video>?"}]}, {}, "slot_mismatch"),
        ({"reference": {"chosen": -1.0}}, {}, "bad_field"),
        ({"reference": {"chosen": -1.0, "rejected": float("nan")}}, {}, "bad_field"),
        ({"reference": {"chosen": 3.0, "rejected": -1.0}}, {}, "bad_field"),
        ({"reference": [1, 2]}, {}, "bad_field"),
    ],
)
def test_a_pair_that_is_no_good_says_why(changed, options, reason):
    with pytest.raises(BadSampleError) as caught:
        encode(entry(**changed), **options)
    assert caught.value.reason.startswith(reason)


def test_both_answers_share_their_frames_on_any_device(make_stage):
    _, data = make_stage()
    batch = data.collater()(read_pairs(data, 2))
    assert isinstance(batch, PreferenceBatch)
    assert batch.rejected.frames is batch.chosen.frames
    moved = batch.to(torch.device("meta"))
    assert moved.chosen.input_ids.is_meta
    assert moved.rejected.labels.is_meta
    assert moved.rejected.frames is moved.chosen.frames
    both = batch.both()
    assert len(both) == 4
    assert both.frame_counts == [2, 2, 2, 2]
    for row, half in enumerate((batch.chosen, batch.rejected)):
        width = half.labels.shape[1]
        assert torch.equal(both.labels[2 * row : 2 * row + 2, :width], half.labels)
        assert (both.labels[2 * row : 2 * row + 2, width:] == IGNORE_INDEX).all()
        assert not both.attention_mask[2 * row : 2 * row + 2, width:].any()
    assert (batch.first(1).questions().input_ids == VISUAL_SLOT).sum() == 1


# References


@pytest.mark.parametrize("group", OPTIONS)
def test_every_option_is_made(group, make_stage):
    for name in OPTIONS[group]:
        module, _ = make_stage(f"module/{group}={name}")
        assert name in type(getattr(module, group)).__name__.lower()


class Watch(Callback):
    """Losses by micro-batch."""

    def __init__(self):
        self.losses = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item() * trainer.accumulate_grad_batches)


def test_a_frozen_reference_is_what_training_started_from(make_stage):
    module, data = make_stage()
    watch = Watch()
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
    )
    start = {name: p.clone() for name, p in module.network.named_parameters()}
    trainer.fit(module, datamodule=data)
    assert watch.losses[0] == pytest.approx(torch.tensor(2.0).log().item(), abs=1e-6)
    kept = module.reference.network
    assert all(torch.equal(p, start[name]) for name, p in kept.named_parameters())
    assert any(not torch.equal(p, start[name]) for name, p in module.network.named_parameters())
    assert not any(p.requires_grad for p in kept.parameters())
    own = {id(p) for p in kept.parameters()}
    assert not own & {id(p) for p in module.parameters()}
    assert len(module.state_dict()) == len(module.network.state_dict())


def run(folder, words, compose):
    config = compose(words, folder)
    train.main.__wrapped__(config)
    return json.loads((folder / "done.json").read_text())


def saved(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def val_metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row.get("val/loss")]
    return [{k: float(v) for k, v in row.items() if k.startswith("val/")} for row in rows]


@pytest.fixture(scope="module")
def whole(words, compose, tmp_path_factory):
    """A run of 4 steps against a frozen copy."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, words, compose)
    return folder


def test_a_run_that_stops_goes_on_against_the_same_reference(
    whole, words, compose, make_stage, tmp_path, monkeypatch
):
    step = PreferenceModule.training_step

    def stopping(self, batch, batch_idx):
        if self.trainer.global_step == 3:
            raise RuntimeError("stopped")
        return step(self, batch, batch_idx)

    often = [*words, "callbacks.checkpoint.every_n_steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(PreferenceModule, "training_step", stopping)
        with pytest.raises(RuntimeError, match="stopped"):
            run(tmp_path, often, compose)
    done = run(tmp_path, often, compose)
    expected = json.loads((whole / "done.json").read_text())
    assert done["steps"] == 4
    assert done["weights_sha256"] == expected["weights_sha256"]
    assert done["metrics"] == expected["metrics"]
    module, _ = make_stage()
    assert saved(tmp_path).keys() == {f"model.{k}" for k in module.network.state_dict()}


@pytest.mark.parametrize("batch_size", [1, 2])
def test_validation_does_not_depend_on_the_batch_size(
    batch_size, words, compose, make_stage, tmp_path
):
    """5 pairs: the last batch of two is not full."""
    trainer_words = [f"data.batch_size={batch_size}", "data.global_batch_size=4"]
    run(tmp_path, [*words, *trainer_words, "optim.optimizer.lr=0.0"], compose)
    (values,) = val_metrics(tmp_path)
    assert values["val/reward_margin"] == pytest.approx(0, abs=1e-5)
    module, data = make_stage()
    pairs = read_pairs(data, 5, "val")
    with torch.no_grad():
        policy = module.network.eval().log_probs(data.collater()(pairs))
    assert values["val/logp_chosen"] == pytest.approx(policy.sums[:, 0].mean().item(), rel=1e-5)
    assert values["val/logp_rejected"] == pytest.approx(policy.sums[:, 1].mean().item(), rel=1e-5)


# Many processes, and one that is killed

#: With a large eps, as AdamW else makes whole steps of the rounding where a gradient is zero.
LONG = [
    "optim.optimizer.lr=2.0e-3",
    "+optim.optimizer.eps=3.0e-2",
    "data.batch_size=1",
    "trainer.max_epochs=5",
]


@pytest.fixture(scope="module")
def fit(words, compose, tmp_path_factory):
    """`fit(*overrides)`: losses by micro-batch, and the weights, of 20 steps."""

    def run(*more):
        config = compose([*words, *LONG, *more], tmp_path_factory.mktemp("fit"))
        module = build(config.module, "module")(model=plain(config.model))
        data, watch = build(config.data, "data"), Watch()
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[watch, SeedByPosition(0)],
            logger=False,
            enable_checkpointing=False,
            limit_val_batches=0,
        )
        share_steps(trainer, data)
        trainer.fit(module, datamodule=data)
        return watch.losses, whole_weights(module.network)

    return run


def whole_weights(network):
    with torch.no_grad():
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
            for name, p in network.named_parameters()
        }


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim", "fsdp_tp_sim"])
def test_two_ranks_learn_what_one_process_learns(trainer, fit, run_ranks):
    losses, weights = fit()
    results = run_ranks(2, lambda rank: fit(f"trainer={trainer}", "trainer.devices=2"))
    readers = results[:1] if trainer == "fsdp_tp_sim" else results  # there both read the same
    together = [loss for pair in zip(*(r[0] for r in readers), strict=True) for loss in pair]
    assert len(together) == len(losses) == 20 * 4
    torch.testing.assert_close(together, losses, rtol=1e-4, atol=1e-5)
    assert sum(losses[:8]) > 1.1 * sum(losses[-8:])
    for _, after in results:
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_kill_9(whole, words, tmp_path):
    command = [sys.executable, "-m", "experiments.train", *words]
    command += ["callbacks.checkpoint.every_n_steps=1", f"hydra.run.dir={tmp_path / 'run'}"]
    root = Path(__file__).parents[1]
    env = {k: v for k, v in os.environ.items() if k != "WANDB_SERVICE"}
    env |= {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with subprocess.Popen(command, cwd=tmp_path, env=env, start_new_session=True) as process:
        end = time.monotonic() + 200
        while not last.exists() and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "run" / "done.json").exists()
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    first, second = (json.loads((f / "done.json").read_text()) for f in (whole, tmp_path / "run"))
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["metrics"] == first["metrics"]


def evaluated(run, folder, monkeypatch, *words):
    """done.json of ropelab-evaluate on a run."""
    monkeypatch.chdir(folder)
    argv = ["ropelab-evaluate", f"run={run}", *words, f"hydra.run.dir={folder / 'out'}"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    return json.loads((folder / "out" / "done.json").read_text())


@pytest.mark.slow
def test_a_run_is_evaluated_on_needles(whole, needle_shards, tmp_path, monkeypatch):
    words = ["data=vniah", "eval=vniah_d_tiny", f"paths.data={needle_shards}"]
    grid = ["data.grid.frames=[4]", "data.grid.needles=2", "data.grid.depths=[0.0]"]
    period = "data.grid.conditions.periodic.period=2"
    done = evaluated(whole, tmp_path, monkeypatch, *words, *grid, period)
    assert done["steps"] == 4
    assert 0 <= done["metrics"]["score"] <= 1
    assert (tmp_path / "out" / "needle.json").is_file()


@pytest.mark.slow
def test_pairs_have_no_score_and_a_line_says_what_has(whole, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=r"pairs of answers.*data=vniah .*data=instruct") as caught:
        evaluated(whole, tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_tiny_recipe_learns_what_is_seen(compose, tmp_path):
    """It prefers the right colour in clips that it has not seen, and only because it sees them."""
    quiet = [word for word in TINY if word.startswith(("callbacks", "+", "print", "logger"))]
    words = ["experiment=ppllava_dpo_tiny", *quiet]
    run(tmp_path, words, compose)
    last = val_metrics(tmp_path)[-1]
    assert last["val/reward_accuracy"] > 0.9
    assert last["val/reward_margin"] > 0.3
    config = compose(words, tmp_path)
    module = build(config.module, "module")(model=plain(config.model))
    data = build(config.data, "data")
    torch.manual_seed(0)
    start = module.build_initial().eval()
    module.network.load_state_dict(
        {k.removeprefix("model."): v for k, v in saved(tmp_path).items()}
    )
    batch = data.collater()(read_pairs(data, 64, "val"))
    batch.chosen.frames[:] = 0
    with torch.no_grad():
        margins = [network.log_probs(batch).sums for network in (module.network.eval(), start)]
    chosen, rejected = (margins[0] - margins[1]).unbind(1)
    assert (chosen > rejected).float().mean() < 0.75


# ropelab-reference


def judge_shards(folder, words, compose, output, *more):
    program.main.__wrapped__(compose([*words, f"output={output}", *more], folder, "reference"))


@pytest.fixture(scope="module")
def judged(words, compose, tmp_path_factory):
    """The pairs with the log-probabilities of the model that `words` train from."""
    folder = tmp_path_factory.mktemp("judged")
    judge_shards(folder, words, compose, folder / "pairs")
    return folder / "pairs"


def test_training_on_streamed_log_probs_is_training_on_a_frozen_copy(
    whole, judged, words, compose, tmp_path
):
    streamed = [f"data.train={judged / 'train'}", f"data.val={judged / 'val'}"]
    run(tmp_path, [*words, *streamed, "module/reference=streamed"], compose)
    (expected,), (found,) = val_metrics(whole), val_metrics(tmp_path)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    ends = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, tmp_path)
    ]
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=2e-4)


def test_the_program_changes_nothing_but_the_reference(judged, shards):
    for split, number in (("train", 0), ("train", 1), ("val", 0)):
        name = f"{split}/shard-{number:06d}.tar"
        before, after = read_shard(shards / name), read_shard(judged / name)
        assert [raw["__key__"] for raw in after] == [raw["__key__"] for raw in before]
        for then, now in zip(before, after, strict=True):
            entry = json.loads(now.pop("json"))
            made = entry.pop("reference")
            assert entry == json.loads(then.pop("json"))
            assert {**now, "__url__": ""} == {**then, "__url__": ""}
            assert made["chosen"] < 0 > made["rejected"]
            assert set(made["settings"]) == {
                *("model.encoder", "model.pooler", "model.rotary"),
                *("data.frames", "data.conversation"),
            }


def test_the_program_goes_on_with_the_shards_that_are_missing(
    judged, words, compose, tmp_path, monkeypatch
):
    output = tmp_path / "pairs"
    copytree(judged, output)
    lost = output / "train" / "shard-000001.tar"
    bytes_before = {path: path.read_bytes() for path in output.rglob("*.tar")}
    lost.unlink()
    written = []

    def noting(path, samples):
        written.append(path)
        write_shard(path, samples)

    monkeypatch.setattr(program, "write_shard", noting)
    judge_shards(tmp_path, words, compose, output)
    assert written == [lost]
    assert {path: path.read_bytes() for path in bytes_before} == bytes_before
    with pytest.raises(SystemExit, match=r"holds shards made with other data\.frames .* output="):
        judge_shards(tmp_path, words, compose, output, "data.frames.sampler.num_frames=3")


def test_a_shard_that_is_cut_short_is_not_there(words, compose, tmp_path, monkeypatch):
    def cut(raw, sums, settings):
        raise OSError("no room")

    monkeypatch.setattr(program, "with_reference", cut)
    with pytest.raises(SystemExit, match="no room"):
        judge_shards(tmp_path, words, compose, tmp_path / "pairs")
    assert not list(tmp_path.rglob("*.tar"))


def test_a_bad_pair_keeps_its_place(words, compose, tmp_path, caplog):
    pairs = [(f"{n}", make_pair(n, 4)) for n in range(3)]
    pairs[1][1]["json"] = b"{}"
    write_shard(tmp_path / "bad" / "a.tar", pairs)
    output = tmp_path / "pairs"
    bad = [f"data.train={tmp_path / 'bad'}", "data.val=null"]
    with caplog.at_level(logging.WARNING):
        judge_shards(tmp_path, [*words, *bad], compose, output)
    after = read_shard(output / "train" / "shard-000000.tar")
    assert [raw["__key__"] for raw in after] == ["0", "1", "2"]
    assert [b"reference" in raw["json"] for raw in after] == [True, False, True]
    assert "left without a reference" in caplog.text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["pooler=average_2x2"],
            r"another model\.pooler \(\w{12}, here \w{12}\).*ropelab-reference",
        ),
        (["rotary=tad"], r"another model\.rotary"),
        (["data.frames.sampler.num_frames=3"], r"another data\.frames"),
        (["data.conversation.max_length=512"], r"another data\.conversation"),
    ],
)
def test_log_probs_of_other_settings_are_refused(more, says, judged, words, compose, tmp_path):
    streamed = [f"data.train={judged / 'train'}", "data.val=null", "module/reference=streamed"]
    with pytest.raises(SystemExit, match=says) as caught:
        run(tmp_path, [*words, *streamed, *more], compose)
    assert "\n" not in str(caught.value)


def test_shards_without_log_probs_are_refused(words, compose, tmp_path):
    with pytest.raises(SystemExit, match=r"no reference log-prob.*ropelab-reference"):
        run(tmp_path, [*words, "module/reference=streamed"], compose)


def test_the_base_is_no_reference_without_lora(make_stage):
    module, data = make_stage("module/reference=base")
    batch = data.collater()(read_pairs(data, 2))
    with pytest.raises(ValueError, match=r"this run trains \S+ beside it: set tuning=lora"):
        module.reference.log_probs(module.network, batch, dict)
    module.network.requires_grad_(False)
    with pytest.raises(ValueError, match="this run has none: set tuning=lora"):
        module.reference.log_probs(module.network, batch, dict)


def test_the_base_under_lora_is_the_model_before_lora(make_stage):
    lora = pytest.importorskip("lightning_modules.lora")
    module, data = make_stage("module/reference=base", "+model.llm.config.attention_dropout=0.5")
    batch = data.collater()(read_pairs(data, 2))
    network = module.network.requires_grad_(False)
    before = network.eval().log_probs(batch).sums
    lora.add_lora(network, targets=["q_proj", "v_proj"], rank=2, alpha=8)
    for name, parameter in network.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    network.train()
    for name, parameter in network.named_parameters():
        parameter.requires_grad_("lora_" in name)
    reference = module.reference.log_probs(network, batch, dict)
    torch.testing.assert_close(reference, before, rtol=0, atol=0)
    assert all(part.training for part in network.modules())
    assert (network.log_probs(batch).sums - before).abs().min() > 0.1
