"""FLOPs by formula, the speed that a run reports, and its message when memory runs out."""

import csv

import pytest
import torch
from lightning import LightningDataModule
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, VideoBatch
from experiments.planning.memory_watch import ATTENTION
from experiments.run.compose import build, plain, user_errors_in_one_line
from lightning_modules.callbacks import throughput
from lightning_modules.callbacks.flops import FlopMeter
from lightning_modules.callbacks.memory import OutOfMemory
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.recompute import is_running_again
from lightning_modules.training.instruct import VideoLLMModule
from tests.helpers.visuals import frames_of

PADDING = 3


def make_batch(rows=2, frames=4, words=40, size=32):
    """Makes a batch in which the last tokens of the second row are padding."""
    ids = torch.full((rows, words), 5)
    ids[:, 0] = VISUAL_SLOT
    labels = ids.clone()
    labels[:, : words // 2] = IGNORE_INDEX
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, -PADDING:] = False
    labels[1, -PADDING:] = IGNORE_INDEX
    prompt = torch.ones(rows, 7, dtype=torch.long)
    return VideoBatch(
        input_ids=ids,
        attention_mask=mask,
        labels=labels,
        **frames_of(torch.zeros(rows * frames, 3, size, size, dtype=torch.uint8), [frames] * rows),
        prompt_ids=prompt,
        prompt_mask=torch.ones_like(prompt, dtype=torch.bool),
        keys=[f"/s.tar/{n}" for n in range(rows)],
    )


#: Tokens of `make_batch` that the LLM reads: text, and 4 of each of the 4 frames.
TOKENS = 2 * (39 + 4 * 4) - PADDING


@pytest.fixture
def make(compose, tmp_path):
    """`make(*overrides)` returns a tiny module that is not built yet, and its config."""

    def module(*overrides):
        words = ["experiment=resume_probe", "model.llm.config.attention_dropout=0.0", *overrides]
        config = compose(words, tmp_path)
        return VideoLLMModule(plain(config.model), build(config.optim.optimizer, "optim")), config

    return module


def count(run, network):
    """Returns the FLOPs of `run()` by the formula, by component, and as PyTorch counts them."""
    meter = FlopMeter(network)
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        run().sum().backward()
    meter.remove()
    return dict(meter.flops), counter.get_total_flops()


@pytest.mark.parametrize("pooler", ["average_2x2", "prompt_guided_2x2"])
@pytest.mark.parametrize("frozen", [[], ["encoder"], ["llm"], ["encoder", "projector"]])
def test_the_formula_is_the_counter_for_a_step(pooler, frozen, make):
    module, _ = make(f"pooler={pooler}", "model.encoder.config.vision.num_hidden_layers=3")
    network = module.network
    for stage in frozen:
        getattr(network, stage).requires_grad_(False)
    if frozen == ["encoder", "projector"]:
        network.llm.lm.get_input_embeddings().requires_grad_(False)
        list(network.llm.blocks())[1].requires_grad_(True)
    found, counted = count(lambda: network(make_batch()).loss, network)
    assert set(found) == {"encoder", "projector", "llm"}
    assert sum(found.values()) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("stage", ["encoder", "projector", "llm"])
def test_the_formula_is_the_counter_stage_by_stage(stage, trained, make):
    module, _ = make("model.encoder.config.vision.num_hidden_layers=3")
    network = module.network
    getattr(network, stage).requires_grad_(trained)
    batch = make_batch()
    patches = torch.randn(8, 16, 32, requires_grad=True)
    embeds = torch.randn(2, 60, 64, requires_grad=True)
    positions = network.rotary.batch_positions([[60], [60]])

    def run():
        if stage == "encoder":
            tokens = network.encoder(batch.visuals)
            return torch.cat([t.features for t in tokens]) * torch.ones((), requires_grad=True)
        if stage == "projector":
            return network.projector.contract(network.projector.expand(patches))
        return network.llm.head(network.llm(embeds, None, positions))

    found, counted = count(run, network)
    assert found.keys() == {stage}
    assert found[stage] == pytest.approx(counted, rel=0.02)


def test_low_rank_weights_cost_what_the_counter_says(make):
    peft = pytest.importorskip("peft")
    module, _ = make()
    network = module.network
    network.requires_grad_(False)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "up_proj"])
    peft.inject_adapter_in_model(lora, network.llm.lm)
    found, counted = count(lambda: network(make_batch()).loss, network)
    assert sum(found.values()) == pytest.approx(counted, rel=0.05)


def test_recomputed_blocks_are_not_the_models_flops(make):
    module, _ = make()
    network = module.network
    plainly, counted = count(lambda: network(make_batch()).loss, network)
    for block in network.llm.blocks():
        block.gradient_checkpointing = True
        block._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(
            f, *a, use_reentrant=False
        )
    network.train()
    again, more = count(lambda: network(make_batch()).loss, network)
    assert again == plainly
    forward = sum(plainly.values()) / 3
    assert counted + 0.3 * forward < more < counted + forward


class Clock:
    """Replaces `time`: a batch takes 3 seconds to load, a step 1."""

    now = 0.0

    def perf_counter(self):
        return self.now


class Validation:
    def __len__(self):
        return 1

    def __iter__(self):
        yield make_batch()


class Data(LightningDataModule):
    def __init__(self, clock=None, count=8):
        super().__init__()
        self.clock, self.count = clock or Clock(), count

    def __iter__(self):
        for _ in range(self.count):
            self.clock.now += 3.0
            yield make_batch()

    def __len__(self):
        return self.count

    def train_dataloader(self):
        return self

    def val_dataloader(self):
        return Validation()


class TimedModule(VideoLLMModule):
    def training_step(self, batch, batch_idx):
        self.trainer.datamodule.clock.now += 1.0
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch, batch_idx):
        self.trainer.datamodule.clock.now += 1000.0
        return super().validation_step(batch, batch_idx)


@pytest.fixture
def fit(compose, tmp_path, monkeypatch):
    """`fit(*overrides, ...)` returns the rows of metrics.csv of a run whose clock is `Clock`."""

    def run(*overrides, accumulation=2, folder=tmp_path, checkpoint=None, **options):
        clock = Clock()
        monkeypatch.setattr(throughput, "time", clock)
        config = compose(["experiment=resume_probe", "logger=csv", *overrides], folder)
        module = TimedModule(plain(config.model), build(config.optim.optimizer, "optim"))
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[Throughput(peak_flops=1e9)],
            logger=[build(config.logger.csv, "logger")],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            accumulate_grad_batches=accumulation,
            log_every_n_steps=2,
            max_epochs=options.pop("epochs", 1),
            val_check_interval=4,
        )
        trainer.fit(module, datamodule=Data(clock, **options), ckpt_path=checkpoint)
        if checkpoint is None:
            trainer.save_checkpoint(folder / "end.ckpt")
        return module, trainer, rows(folder)

    return run


def rows(folder):
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [row for row in csv.DictReader(file) if row.get("train/tokens_per_s")]


def test_rates_are_means_between_logged_steps(fit):
    module, _, logged = fit()
    assert [int(row["step"]) for row in logged] == [1, 3]
    meter = FlopMeter(module.network)
    module.network(make_batch())
    # 4 batches a logged step. The first batch comes before the clock runs, and the one after the
    # validation comes after a pause.
    for row, (worked, waited) in zip(logged, [(4, 9), (4, 9)], strict=True):
        seconds = worked + waited
        assert float(row["train/tokens_per_s"]) == pytest.approx(4 * TOKENS / seconds, rel=1e-5)
        assert float(row["train/data_wait"]) == pytest.approx(waited / seconds, rel=1e-5)
        mfu = 4 * meter.flops.total() / seconds / 1e9
        assert float(row["train/mfu"]) == pytest.approx(mfu, rel=1e-5)


def test_a_resumed_run_counts_from_its_start(fit, tmp_path):
    _, _, first = fit()
    _, _, logged = fit(folder=tmp_path / "more", checkpoint=tmp_path / "end.ckpt", epochs=2)
    assert [int(row["step"]) for row in logged] == [5, 7]
    for key in ("train/tokens_per_s", "train/data_wait", "train/mfu"):
        assert float(logged[0][key]) == pytest.approx(float(first[0][key]), rel=1e-5)


def test_ranks_are_added_up(fit, run_ranks, tmp_path):
    def run(rank):
        _, trainer, _ = fit("trainer=ddp_sim", accumulation=2)
        return {k: v.item() for k, v in trainer.callback_metrics.items() if "train/" in k}

    found = run_ranks(2, run)
    assert found[0]["train/tokens_per_s"] == found[1]["train/tokens_per_s"]
    # Every rank measures what a single process measures.
    assert found[0]["train/tokens_per_s"] == pytest.approx(2 * 4 * TOKENS / 13, rel=1e-5)
    assert found[0]["train/data_wait"] == pytest.approx(9 / 13, rel=1e-5)


def test_devices_are_known_by_the_name_of_their_option(compose, tmp_path):
    known = compose([], tmp_path).callbacks.throughput.known
    assert known["NVIDIA H100 80GB HBM3"] == 989.4e12
    assert compose(["device=h200"], tmp_path, "plan").device.name in known


class Greedy(torch.autograd.Function):
    """Requests a petabyte in the forward or in the backward pass."""

    @staticmethod
    def forward(ctx, x, back):
        ctx.back = back
        return x.clone() if back else x + torch.empty(1 << 48)

    @staticmethod
    def backward(ctx, gradient):
        return gradient + torch.empty(1 << 48), None


class GreedyBlock(nn.Module):
    def __init__(self, block, back):
        super().__init__()
        self.block, self.back = block, back

    def forward(self, *args, **kwargs):
        return Greedy.apply(self.block(*args, **kwargs), self.back)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.block, name)


class GreedySecondTime(nn.Module):
    """Requests a petabyte when its result is computed again in the backward pass."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x) + (torch.empty(1 << 48) if is_running_again() else 0)


SETTINGS = {
    "data.batch_size": 8,
    "data.frames.sampler.num_frames": 16,
    "data.frames.sampler.max_frames": None,
    "data.conversation.max_length": 2048,
    "tuning.checkpointing": ["llm"],
}


@pytest.mark.parametrize(
    ("stage", "back", "place", "says"),
    [
        ("encoder", False, "encoder", "tuning.checkpointing=[llm,encoder] or data.batch_size=4"),
        ("encoder", True, "the backward pass of encoder", "tuning.checkpointing=[llm,encoder]"),
        ("llm", False, "llm", "data.batch_size=4 (it is 8) or data.frames.sampler.num_frames=8"),
        ("llm", True, "the backward pass of llm", "data.batch_size=4"),
        ("projector", False, "projector", "data.batch_size=4"),
        ("projector", True, "the backward pass of projector", "data.batch_size=4"),
    ],
)
def test_the_end_of_memory_is_one_line_with_stage_and_key(stage, back, place, says, make):
    module, config = make()
    network = module.network
    if stage == "projector" and back:
        network.projector.linear_1 = GreedySecondTime(network.projector.linear_1)
    elif stage == "projector":
        network.projector.linear_2 = GreedyBlock(network.projector.linear_2, back)
    else:
        layers = network.encoder.vision.encoder if stage == "encoder" else network.llm.decoder
        layers.layers[0] = GreedyBlock(layers.layers[0], back)
    trainer = build(
        config.trainer,
        "trainer",
        callbacks=[OutOfMemory(SETTINGS)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )

    @user_errors_in_one_line
    def main(config):
        trainer.fit(module, datamodule=Data(count=1))

    with pytest.raises(SystemExit) as stop:
        main(config)
    line = str(stop.value)
    assert line.startswith(f"error: out of memory in {place}: 1048576.00 GiB requested, ")
    assert says in line
    assert "\n" not in line


def test_an_error_of_cuda_is_read_as_it_is_written(make):
    module, config = make()
    trainer = build(config.trainer, "trainer", logger=False, enable_checkpointing=False)
    error = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.11 GiB "
        "of which 512.00 MiB is free. Including non-PyTorch memory, this process has …"
    )
    report = OutOfMemory(SETTINGS)
    report.on_before_optimizer_step()
    report.on_exception(trainer, module, error)
    (line,) = error.__notes__
    assert line.startswith("out of memory in optimizer: 1.50 GiB requested, 0.50 GiB free; ")
    assert "trainer=fsdp or tuning=lora" in line


def test_every_key_of_the_report_is_one_of_the_config(compose, tmp_path):
    config = compose(["experiment=resume_probe"], tmp_path)
    settings = plain(config.callbacks.out_of_memory.settings)
    assert settings["data.batch_size"] == 2
    assert settings["data.frames.sampler.num_frames"] == 4
    report = build(config.callbacks.out_of_memory, "callbacks.out_of_memory")
    assert report._settings["data.conversation.max_length"] == 2048
