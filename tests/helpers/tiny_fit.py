"""Trains on synthetic batches with any number of ranks, and records losses, norms and angles."""

import torch
from lightning import Callback
from torch.nn.utils import get_total_norm

from datamodules.base import VideoDataModule
from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Tiles, VideoBatch, VisualInfo, pad_rows
from experiments import evaluate, train
from experiments.reporting.data import load_run
from experiments.run.compose import build, plain
from experiments.testing import test_needles as run_needle_test
from lightning_modules.callbacks.randomness import SeedByPosition
from lightning_modules.callbacks.samples import SampleAudit
from lightning_modules.checkpoint.weights import sha256
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.visuals import frames_of

STEPS, PER_STEP = 20, 4  # PER_STEP: micro-batches per step

#: Numbers of labels of the rows, in turn. They make the mean over micro-batch means differ from the
#: mean of a step.
LABELS = (2, 40, 1, 3, 17)

#: Options that can make ranks differ: guided pooling, BT-Adapter with videos of any length, and
#: dropout.
MODEL = [
    "pooler=prompt_guided_2x2",
    "model.encoder.config.vision.num_hidden_layers=3",
    "+model.encoder.bt_adapter={depth: 2, max_frames: 8}",
    "+model.llm.config.attention_dropout=0.1",
]

#: The eps is large because AdamW would otherwise turn rounding errors of zero gradients into full
#: steps.
OPTIM = ["optim.optimizer.lr=2.0e-3", "+optim.optimizer.eps=3.0e-2"]

#: LoRA with dropout, activation checkpointing, groups with their own learning rates, and a gradient
#: norm that is clipped in every step. SGD takes steps of the clipped length.
TUNED = [
    "tuning=lora",
    "tuning.lora.rank=4",
    "tuning.lora.dropout=0.2",
    "tuning.checkpointing=[llm,encoder]",
    "tuning.freeze=[encoder.text]",
    "tuning.groups.llm.lr=0.1",
    "tuning.groups.encoder={lr: 0.01}",
    "tuning.groups.projector=null",
    "optim.optimizer._target_=torch.optim.SGD",
    "~optim.optimizer.betas",
    "optim.optimizer.fused=false",
    "optim.optimizer.lr=0.05",
    "trainer.gradient_clip_val=0.3",
]


def make_batch(number):
    """Makes a micro-batch of two rows. Every third one is text alone, the others have videos."""
    rng = torch.Generator().manual_seed(number)
    rows = torch.randint(2, 2000, (2, 9), generator=rng).tolist()
    counts = [] if number % 3 == 1 else [1 + number % 4, 3]
    if counts:
        rows[0][2] = rows[1][1] = VISUAL_SLOT
    learnt = [LABELS[(2 * number + r) % len(LABELS)] for r in range(2)]
    rows = [
        [*row[:6], *([7, 8, 9 + number % 2] * 14)[:count]]
        for row, count in zip(rows, learnt, strict=True)
    ]
    labels = [[IGNORE_INDEX] * 6 + row[6:] for row in rows]
    prompts = torch.randint(2, 2000, (2, 5), generator=rng)
    prompts[:, -1] = 1
    return VideoBatch(
        input_ids=pad_rows(rows, 0),
        attention_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        labels=pad_rows(labels, IGNORE_INDEX),
        **frames_of(
            torch.randint(0, 256, (sum(counts), 3, 32, 32), generator=rng, dtype=torch.uint8),
            counts,
        ),
        prompt_ids=prompts,
        prompt_mask=torch.ones(2, 5, dtype=torch.bool),
        keys=[f"/data/s{number}.tar/{n}" for n in range(2)],
    )


def make_tiled_batch(number):
    """Makes the same micro-batches, but the second visual of odd ones is a tiled image."""
    batch = make_batch(number)
    if number % 2 and batch.infos:
        batch.infos[1] = VisualInfo(tiles=Tiles(1, 2, 20, 50))
    return batch


class Share:
    """A loader of the micro-batches rank, rank + world, ... of an epoch."""

    def __init__(self, rank, world, count, make):
        self._numbers, self._make = range(rank, count, world), make

    def __len__(self):
        return len(self._numbers)

    def __iter__(self):
        return map(self._make, self._numbers)


class Batches(VideoDataModule):
    def __init__(self, steps, make=make_batch):
        super().__init__(1, audit=True)
        self._count, self._make = steps * PER_STEP, make

    @property
    def tokenizer(self):
        raise AssertionError("nothing is written as text")

    def train_dataloader(self):
        return self._share(self._count)

    def val_dataloader(self):
        return self._share(PER_STEP)

    def _share(self, count):
        return Share(self.trainer.global_rank, self.trainer.world_size, count, self._make)


class Losses(Callback):
    """Records `train/loss` of each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self._before = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step > self._before + len(self.seen):
            self.seen.append(trainer.callback_metrics["train/loss"].item())


class Norms(Callback):
    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        self.seen.append(float(get_total_norm(gradients)))


class Angles(Callback):
    """Records the largest error of cos, against cos of float32 angles, rounded at the end."""

    def __init__(self):
        self.worst, self.dtype = 0.0, None

    def on_train_start(self, trainer, pl_module):
        pl_module.network.llm.decoder.rotary_emb.register_forward_hook(self._compare)

    def _compare(self, rotary, args, output):
        x, _ = args
        with torch.autocast("cpu", enabled=False):
            frequencies, _ = rotary.frequencies(x.device, 1)
            reads = rotary.scheme.axes(frequencies.numel())
            turned = rotary.axis_positions.movedim(0, -1)[..., reads] * rotary.scheme.text_step
            cos = (turned.float() * frequencies.float()).cos().repeat(1, 1, 2)
        self.dtype = output[0].dtype
        self.worst = max(self.worst, (output[0] - cos.to(self.dtype)).abs().max().item())


def make_fit(compose, tiny):
    """Returns `fit(folder, world, *overrides, …)`, which runs the shipped trainer on `Batches`."""

    def run(folder, world, *overrides, steps=STEPS, callbacks=(), checkpoint=None, make=make_batch):
        words = [*MODEL, *overrides, f"trainer.devices={world}"]
        config = compose([*tiny, *words], folder)
        optimizer = build(config.optim.optimizer, "optim")
        tuning = build(config.tuning, "tuning")
        module = VideoLLMModule(plain(config.model), optimizer, tuning=tuning)
        losses = Losses()
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[losses, SeedByPosition(0), SampleAudit(folder), *callbacks],
            logger=False,
            enable_checkpointing=False,
            accumulate_grad_batches=PER_STEP // world,
        )
        trainer.fit(module, datamodule=Batches(steps, make), ckpt_path=checkpoint)
        return trainer, module, losses.seen

    return run


def whole(module):
    """Returns the full weights, gathered from all ranks."""
    with torch.no_grad():
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
            for name, p in module.named_parameters()
        }


def build_network(checkpoint):
    network = VideoLanguageModel(VideoLanguageModelConfig(**checkpoint["stages"]))
    weights = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    network.load_state_dict(weights)
    return network


def check_program(words, compose, run_ranks, folder):
    """Trains and tests with the program on two ranks, then tests the saved checkpoint again."""

    def run(rank):
        train.main.__wrapped__(compose(words, folder))

    def evaluate_again(rank):
        config = compose(words, folder / "again")
        model, steps = evaluate.load(folder)
        trainer, data = build(config.trainer, "trainer", logger=False), build(config.data, "")
        run_needle_test(config, trainer, model, data, steps)
        return sha256(model)

    run_ranks(2, run)
    before = load_run(folder)
    assert before.status.startswith("tested after step")
    assert before.generations
    (folder / "again").mkdir()
    hashes = run_ranks(2, evaluate_again)
    assert load_run(folder / "again").needle.cells == before.needle.cells
    assert hashes == [sha256(evaluate.load(folder)[0])] * 2
