"""What is trained: frozen parts, LoRA, groups with their rates, recomputed and compiled blocks."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
from test_distributed import Angles
from test_model import COUNTS, MIXED, make_batch, specs
from torch import nn
from torch.nn.utils import get_total_norm

from experiments.run import build, plain
from lightning_modules.lora import is_lora, lora_layers
from lightning_modules.model import VideoLanguageModel, VideoLanguageModelConfig
from lightning_modules.optim import schedule
from lightning_modules.tuning import Tuning
from lightning_modules.video_llm import VideoLLMModule
from lightning_modules.weights import all_finite, sha256

LORA = {"targets": ["q_proj", "v_proj", "down_proj"], "rank": 4, "alpha": 32, "dropout": 0.0}
BATCH = make_batch(MIXED, COUNTS)


def make_module(tuning=None, optimizer=None, scheduler=None, **options):
    torch.manual_seed(0)
    optimizer = optimizer or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    return VideoLLMModule(specs(**options), optimizer, scheduler, tuning)


def train(module, steps=3, **options):
    """The shipped way of training, over one batch again and again."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, datamodule=Again(steps))
    return trainer


class Again(lightning.LightningDataModule):
    def __init__(self, steps):
        super().__init__()
        self._steps = steps

    def __len__(self):
        return self._steps

    def __iter__(self):
        return iter([BATCH] * self._steps)

    def train_dataloader(self):
        return self

    def val_dataloader(self):
        return self


def trained_lora(**changes):
    """A model whose LoRA does something."""
    module = make_module(Tuning(lora=LORA | changes))
    for name, parameter in module.network.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return module.network.eval()


def hidden(network):
    with torch.no_grad():
        return network.eval()(BATCH).hidden


# ---------------------------------------------------------------- what is trained


def test_frozen_parts_have_no_gradient_and_no_optimizer_state():
    parts = ["encoder", "llm.lm.model.embed_tokens", "llm.lm.*norm.weight"]
    module = make_module(Tuning(freeze=parts))
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    trainer = train(module)
    (optimizer,) = trainer.optimizers
    moments = {id(parameter) for parameter in optimizer.state}
    frozen = set()
    for name, parameter in module.network.named_parameters():
        is_frozen = name.startswith(tuple(parts[:2])) or name.endswith("norm.weight")
        assert parameter.requires_grad != is_frozen, name
        assert (id(parameter) in moments) != is_frozen, name
        assert torch.equal(parameter, before[name]) == is_frozen, name
        assert parameter.grad is None or not is_frozen
        frozen |= {name.partition(".")[0]} if is_frozen else set()
    assert frozen == {"encoder", "llm"}


@pytest.mark.parametrize(
    ("tuning", "says"),
    [
        (
            {"freeze": ["encoder.txt"]},
            r"tuning\.freeze names 'encoder\.txt', .*: encoder has .*text",
        ),
        ({"freeze": ["lm"]}, r"tuning\.freeze names 'lm', .* it has encoder, pooler, llm"),
        ({"freeze": ["*"]}, r"tuning\.freeze=\['\*'\] leaves nothing to train"),
        ({"groups": {"projektor": {"lr": 1.0}}}, r"tuning\.groups names 'projektor'"),
        (
            {"checkpointing": ["projector"]},
            r"tuning\.checkpointing names projector, .* encoder, llm",
        ),
        ({"compile": ["decoder"]}, r"tuning\.compile names decoder, .* encoder, llm"),
        ({"lora": LORA | {"targets": ["wq"]}}, r"tuning\.lora, targets=\['wq'\] of llm: .*wq"),
        ({"lora": LORA | {"stage": "decoder"}}, r"tuning\.lora\.stage=decoder .* llm, projector"),
        ({"lora": LORA | {"rank": 0}}, r"tuning\.lora, .*positive integer"),
        ({"lora": LORA | {"ranks": 1}}, r"tuning\.lora.*ranks"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_read(tuning, says):
    module = make_module(Tuning(**tuning))
    with pytest.raises(ValueError, match=says) as caught:
        module.check()
    assert "\n" not in str(caught.value)


def test_a_pattern_may_name_a_part_without_parameters():
    make_module(Tuning(freeze=["pooler"])).check()


def test_groups_get_their_rate_through_the_schedule():
    """The last part that holds a parameter decides; what no part holds keeps the optimizer's."""
    groups = {"encoder": {"lr": 1e-3}, "projector": {"lr": 0.1, "weight_decay": 0.5}}
    groups |= {"encoder.vision.encoder.layers.1": {"lr": 1e-4}}
    seen = []

    class Rates(lightning.Callback):
        def on_train_batch_start(self, trainer, *_):
            seen.append(
                {
                    g["name"]: (g["lr"], g["weight_decay"])
                    for g in trainer.optimizers[0].param_groups
                }
            )

    optimizer = partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.0)
    scheduler = partial(schedule, name="linear", warmup=0.5)
    module = make_module(Tuning(groups=groups, decay_norms_and_biases=True), optimizer, scheduler)
    trainer = train(module, 4, callbacks=[Rates()])
    names = ["rest", *groups]
    assert [list(step) for step in seen] == [names] * 4
    for step, share in zip(seen, (0, 0.5, 1, 0.5), strict=True):
        rates = [rate for rate, _ in step.values()]
        assert rates == pytest.approx([1e-2 * share, 1e-3 * share, 0.1 * share, 1e-4 * share])
        assert [decay for _, decay in step.values()] == [0, 0, 0.5, 0]
    held = {g["name"]: {id(p) for p in g["params"]} for g in trainer.optimizers[0].param_groups}
    for name, parameter in module.network.named_parameters():
        part = max((p for p in groups if name.startswith(p)), key=len, default="rest")
        assert (id(parameter) in held[part]) == parameter.requires_grad
    total = sum(p.requires_grad for p in module.network.parameters())
    assert sum(map(len, held.values())) == total, "each is in one group alone"


def test_norms_and_biases_are_spared_from_decay_unless_asked():
    def decayed(module):
        optimizer = module.configure_optimizers()
        names = {id(p): name for name, p in module.network.named_parameters()}
        return {
            names[id(p)] for g in optimizer.param_groups if g["weight_decay"] for p in g["params"]
        }

    adamw = partial(torch.optim.AdamW, weight_decay=0.1)
    every = {n for n, p in make_module().network.named_parameters() if p.requires_grad}
    flat = {n for n in every if n.endswith("bias") or "norm" in n or "class_embedding" in n}
    assert decayed(make_module(Tuning(), adamw)) == every - flat
    assert decayed(make_module(Tuning(decay_norms_and_biases=True), adamw)) == every
    own = Tuning(groups={"projector": {"weight_decay": 0.0}})
    assert decayed(make_module(own, adamw)) == {n for n in every - flat if "projector" not in n}
    (group,) = make_module(Tuning()).configure_optimizers().param_groups
    assert "name" not in group, "where nothing decays nothing is split"


@pytest.mark.parametrize("option", ["full", "frozen_encoder", "projector", "lora"])
def test_every_option_trains_what_it_says(option, compose, tmp_path):
    config = compose([f"tuning={option}"], tmp_path)
    module = build(config.module, "module")(model=plain(config.model))
    trained = {n.split(".")[0] for n, p in module.network.named_parameters() if p.requires_grad}
    expected = {"full": {"encoder", "projector", "llm"}, "projector": {"projector"}}
    assert trained == expected.get(option, {"projector", "llm"})
    if option == "lora":
        llm = [n for n, p in module.network.llm.named_parameters() if p.requires_grad]
        assert all(map(is_lora, llm))
        assert len(lora_layers(module.network)) == 3 * 7


# ---------------------------------------------------------------- how blocks run


def step_of(tuning, attention_dropout=0.0, bt_adapter=None, pooler="prompt_guided"):
    """Loss and gradients of one training step, dropout included."""
    module = make_module(tuning, bt_adapter=bt_adapter, pooler=pooler)
    network = module.network.train()
    network.llm.lm.config.attention_dropout = attention_dropout
    for layer in network.llm.blocks():
        layer.self_attn.attention_dropout = attention_dropout
    torch.manual_seed(1)
    loss = network(BATCH).loss
    loss.backward()
    gradients = {n: p.grad for n, p in network.named_parameters() if p.grad is not None}
    return network, loss, gradients


class Kept:
    """Bytes that the forward keeps for the backward."""

    def __init__(self):
        self.bytes = 0

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda t: t)
        self._hooks.__enter__()
        return self

    def __exit__(self, *_):
        self._hooks.__exit__()

    def _pack(self, tensor):
        self.bytes += tensor.numel() * tensor.element_size()
        return tensor


@pytest.mark.parametrize("stages", [["llm"], ["encoder"], ["llm", "encoder"]])
def test_recomputed_blocks_give_the_same_gradients_dropout_included(stages):
    options = {"attention_dropout": 0.3, "bt_adapter": {"depth": 2, "max_frames": 8}}
    lora = {"lora": LORA | {"dropout": 0.5}} if stages == ["llm"] else {}
    with Kept() as all_kept:
        _, loss, expected = step_of(Tuning(**lora), **options)
    with Kept() as kept:
        network, again, gradients = step_of(Tuning(**lora, checkpointing=stages), **options)
    assert torch.equal(again, loss)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-7)
    assert kept.bytes < 0.8 * all_kept.bytes
    _, other, _ = step_of(Tuning(**lora), **options | {"attention_dropout": 0.0})
    assert other != loss, "dropout was to count"
    assert torch.equal(hidden(network), hidden(network)), "evaluation is as ever"


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by torch.compile
def test_compiled_blocks_give_the_same_and_keep_their_names():
    network, loss, gradients = step_of(Tuning(), pooler="average")
    torch._dynamo.utils.counters.clear()
    compiled = Tuning(compile=["llm"], compiler={"backend": "eager"})
    again, same_loss, same_gradients = step_of(compiled, pooler="average")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(same_loss, loss)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-4, atol=1e-6)
    assert list(again.state_dict()) == list(network.state_dict())
    assert sha256(again) == sha256(network)
    torch._dynamo.reset()


COMPILE = """
import sys, torch
from test_tuning import LORA, BATCH, Tuning, make_module, step_of
from lightning_modules.weights import all_finite, sha256
torch.set_num_threads(1)
for extra in ({}, {"lora": LORA, "checkpointing": ["llm"]}):
    network, loss, gradients = step_of(Tuning(**extra), pooler="average")
    compiled = Tuning(**extra, compile=["llm", "encoder"], compiler={"backend": sys.argv[1]})
    torch._dynamo.utils.counters.clear()
    again, same_loss, same_gradients = step_of(compiled, pooler="average")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    torch.testing.assert_close(same_loss, loss)
    assert same_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-6)
    assert again.state_dict().keys() == network.state_dict().keys()
    assert sha256(again) == sha256(network)
print("same")
"""


LENGTHS = """
import random, sys, torch
from test_model import S
from test_tuning import Tuning, make_batch, make_module
torch.set_num_threads(1)
def batch_of(number):
    draw, rows, counts = random.Random(number), [], []
    for _ in range(draw.randint(2, 5)):
        rows.append([draw.randint(1, 40) for _ in range(draw.randint(4, 30))])
        if draw.random() < 0.7:
            rows[-1][1] = S
            counts.append(2 * draw.randint(1, 4))
    return make_batch(rows, counts, seed=number)
stages, count = ["llm", "encoder"], int(sys.argv[2])
options = {"bt_adapter": {"depth": 2, "max_frames": 8}, "pooler": "prompt_guided"}
tuning = Tuning(checkpointing=stages)
compiled = Tuning(checkpointing=stages, compile=stages, compiler={"backend": sys.argv[1]})
networks = [make_module(t, **options).network.train() for t in (tuning, compiled)]
graphs = []
for batch in map(batch_of, range(count)):
    losses = [network(batch, packing=48).loss for network in networks]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(*losses)
    graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
for plain, found in zip(*(network.parameters() for network in networks)):
    if plain.grad is not None:
        torch.testing.assert_close(found.grad, plain.grad, rtol=1e-4, atol=1e-6)
tried = torch._dynamo.utils.counters["frames"]
assert tried["ok"] == tried["total"], f"some run uncompiled: {tried}"
assert graphs[-1] == graphs[count // 2] <= 16 or count < 10, graphs
print("same")
"""


def run_uninstrumented(script, *arguments):
    """In a process of its own: shapes are checked by wrappers that torch.compile cannot read."""
    root = Path(__file__).parents[1]
    env = os.environ | {"JAXTYPING_DISABLE": "1", "PYTHONPATH": f"{root}:{root / 'tests'}"}
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout.endswith("same\n"), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_in_any_way_blocks_give_the_same(backend):
    run_uninstrumented(COMPILE, backend)


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "batches"), [("eager", 20), ("aot_eager", 2)])
def test_packed_and_recomputed_blocks_are_compiled_for_all_lengths_at_once(backend, batches):
    """Batches of other lengths, rows and frames each; after ten nothing new is compiled."""
    run_uninstrumented(LENGTHS, backend, str(batches))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_every_precision_trains_and_clips_with_float32_angles(precision):
    """LoRA is kept as the trainer keeps weights; the fused optimizer is clipped in each."""
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module, angles = make_module(Tuning(lora=LORA), optimizer), Angles()
    train(module, 2, precision=precision, gradient_clip_val=0.1, callbacks=[angles])
    kept = torch.bfloat16 if precision == "bf16-true" else torch.float32
    assert {p.dtype for p in module.parameters()} == {kept}
    assert angles.worst == 0
    assert all_finite(module)


def test_mixed_precision_clips_by_the_norm():
    optimizer = partial(torch.optim.SGD, lr=1.0, fused=True)
    module = make_module(Tuning(freeze=["encoder", "llm"]), optimizer)
    before = [p.detach().clone() for p in module.network.projector.parameters()]
    train(module, 1, precision="bf16-mixed", gradient_clip_val=0.1)
    step = [a - b for a, b in zip(module.network.projector.parameters(), before, strict=True)]
    assert get_total_norm(step) == pytest.approx(0.1, rel=1e-4)


def test_lora_is_float32_beside_a_base_in_bfloat16(tmp_path):
    """As with model.llm.dtype=bfloat16 and trainer.precision=bf16-mixed."""
    make_module().network.llm.lm.save_pretrained(tmp_path)
    spec = specs()
    spec["llm"] = {
        "source": str(tmp_path),
        "dtype": "bfloat16",
        "_target_": spec["llm"]["_target_"],
    }
    optimizer = partial(torch.optim.AdamW, lr=1e-2, fused=True)
    module = VideoLLMModule(spec, optimizer, tuning=Tuning(lora=LORA))
    assert all(part.training for part in module.network.modules()), "else nothing is recomputed"
    train(module, 2, precision="bf16-mixed")
    dtypes = {is_lora(n): p.dtype for n, p in module.network.llm.named_parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    assert all(p.any() for n, p in module.network.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("stage", ["llm", "encoder"])
@pytest.mark.parametrize(
    ("word", "says"), [("sdpaa", "not supported"), ("flash_attention_3", "installed")]
)
def test_an_attention_that_is_not_there_is_one_line(stage, word, says):
    spec = specs()
    spec[stage] = spec[stage] | {"attention": word}
    with pytest.raises(ValueError, match=rf"model\.{stage}\.attention={word} .*{says}") as caught:
        VideoLanguageModel(VideoLanguageModelConfig(**spec))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("stage", ["llm", "encoder"])
def test_every_attention_gives_the_same(stage, tmp_path):
    base = make_module().network
    spec = specs()
    spec[stage] = spec[stage] | {"attention": "eager"}
    eager = VideoLanguageModel(VideoLanguageModelConfig(**spec))
    eager.load_state_dict(base.state_dict())
    eager.save_pretrained(tmp_path)
    again = VideoLanguageModel.from_pretrained(tmp_path)
    for network in (eager, again):
        config = network.llm.lm.config if stage == "llm" else network.encoder.vision.config
        assert config._attn_implementation == "eager"
        torch.testing.assert_close(hidden(network), hidden(base), atol=1e-5, rtol=0)


@pytest.mark.parametrize("stage", ["llm", "encoder"])
def test_training_with_flex_attention_on_a_cpu_is_refused_in_one_line(stage):
    module = make_module()
    module.spec[stage]["attention"] = "flex_attention"
    line = rf"model\.{stage}\.attention=flex_attention has no backward on a CPU: set .*=sdpa"
    with pytest.raises(ValueError, match=line) as caught:
        train(module, 1)
    assert "\n" not in str(caught.value)


def test_a_frozen_encoder_may_have_flex_attention_on_a_cpu(uncompiled_flex):
    module = make_module(Tuning(freeze=["encoder"]), pooler="average")
    module.spec["encoder"]["attention"] = "flex_attention"
    train(module, 1)
    assert module.network.encoder.vision.config._attn_implementation == "flex_attention"
