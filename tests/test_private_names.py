"""Private names of other libraries: each says what breaks when it goes, and where they may stand.

The tests of what uses a name are named beside it.
"""

import ast
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra._internal import utils
from lightning import LightningModule, Trainer
from omegaconf import OmegaConf
from torch import nn

from experiments.private import hydra as private_hydra
from experiments.private import torch as plan
from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.lora import add_lora, lora_layers
from lightning_modules.private import peft
from lightning_modules.private import torch as compiled
from lightning_modules.private.lightning import _SubprocessScriptLauncher
from lightning_modules.private.transformers import attention_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("datamodules", "lightning_modules", "experiments")


def foreign(path: Path) -> Iterator[str]:
    """Yields the private names in a module that no module of ours defines."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            if node.module.partition(".")[0] not in PACKAGES:
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
                yield from (name for name in names if name.startswith("_"))
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
            yield from (part for part in parts if part.startswith("_"))
        elif isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            yield node.attr


def defined(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id


def test_only_these_rooms_use_private_names():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    rooms = [path for path in files if path.parent.name == "private"]
    others = [path for path in files if path not in rooms]
    assert {path.stem for path in rooms} == {
        "__init__",
        "hydra",
        "lightning",
        "peft",
        "torch",
        "transformers",
        "wandb",
    }
    ours = {name for path in others for name in defined(path)}
    public = {"_replace", "_fields", "_asdict", "_target_", "_exit"}  # documented
    found = {
        (str(path.relative_to(ROOT)), name)
        for path in others
        for name in foreign(path)
        if name not in ours | public and not name.startswith("__")
    }
    assert not found


def _trainer() -> Trainer:
    return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)


LIGHTNING = {
    "fit_loop._data_fetcher": "a run killed before a validation would skip it (test_checkpoint)",
    "fit_loop.epoch_loop._should_check_val_fx": "the same",
    "fit_loop._should_accumulate": "an epoch ended by max_steps would lose its rest (test_resume)",
    "fit_loop._restarting": "a run that resumes at the end of an epoch would count one twice",
    "fit_loop.epoch_progress.increment_completed": "the same",
    "fit_loop.reset_restart_stage": "the same",
    "_signal_connector.register_signal_handlers": "ranks would hang on SIGTERM (test_preemption)",
}


@pytest.mark.parametrize(("name", "breaks"), LIGHTNING.items(), ids=LIGHTNING.keys())
def test_lightning(name, breaks):
    try:
        attrgetter(name)(_trainer())
    except AttributeError as error:
        pytest.fail(f"{error}: {breaks}")


def test_lightnings_launcher_can_kill_other_ranks():
    assert callable(_SubprocessScriptLauncher.kill), "ranks would wait for one that has stopped"


def test_lightning_reads_the_mesh_that_a_plan_sets():
    module = LightningModule()
    module._device_mesh = mesh = object()
    assert module.device_mesh is mesh, "ropelab-plan could not measure sharded trainings"


def test_peft():
    network = nn.ModuleDict({"llm": nn.Sequential(nn.Linear(4, 4))})
    add_lora(network, targets=["0"], rank=2, alpha=1)
    layers = [layer for _, layer in lora_layers(network)]
    nn.init.ones_(layers[0].lora_B["default"].weight)
    assert f"llm.0.{peft.BASE_LAYER}.weight" in network.state_dict(), "init= would not find weights"
    row = torch.ones(1, 4)
    changed = network["llm"](row)
    with peft.disabled(layers):
        plain = network["llm"](row)
    base = layers[0].get_base_layer()
    assert torch.equal(plain, base(row)), "a reference model would not be left as it was"
    assert torch.equal(network["llm"](row), changed)
    assert not torch.equal(plain, changed)


def test_transformers_names_the_attention_of_a_model():
    """Without it, flash kernels would read packed samples as one document (test_packing)."""
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_key_value_heads": 1}
    sizes |= {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
    for attention in ("sdpa", "eager"):
        llm = CausalLM(config={"model_type": "qwen2", **sizes}, attention=attention)
        assert attention_of(llm.lm.config) == attention


def test_names_of_compiled_modules():
    names = [name for name, _ in torch.compile(nn.Linear(2, 2)).named_parameters()]  # pyright: ignore
    assert names != ["weight", "bias"]
    assert list(map(compiled.before_compile, names)) == ["weight", "bias"], "digests would differ"


def test_hydra_runs_its_work_through_our_report():
    """Without it, an error of a command would be several lines (test_hydra_errors)."""
    seen: list[Any] = []
    before = utils.run_and_report
    with private_hydra.report_first(lambda work: seen.append(work())):
        utils.run_and_report(lambda: "work")
    assert seen == ["work"]
    assert utils.run_and_report is before


def test_hydras_sweeper_makes_the_jobs_of_a_listing():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    overrides = OverridesParser.create().parse_overrides(["a=1,2", "b=x"])
    assert private_hydra.combinations(overrides) == [["a=1", "b=x"], ["a=2", "b=x"]]


def test_omegaconf_knows_the_root():
    config = OmegaConf.create({"a": {"b": {}}})
    assert private_hydra.root_of(config.a.b) is config, "no nearest key would be suggested"


def test_torch_measures_fake_tensors():
    """Without these names ropelab-plan does not run (test_plan)."""
    with plan.FakeTensorMode():
        one, other = torch.empty(8), torch.empty(8)
    assert isinstance(one, plan.FakeTensor)
    keys = {plan.storage_key(tensor.untyped_storage()) for tensor in (one, one.view(2, 4), other)}
    assert len(keys) == 2, "a view shares its storage, and two fake storages are told apart"
    assert plan.active_fake_mode() is None
    assert plan.tree_leaves([1, {"a": 2}]) == [1, 2]
    assert plan.local_piece(one) is one
    plan.forget_shardings()


def test_torch_calls_attention_and_indexing_by_these_operators():
    seen = set()

    class Watch(plan.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    query = torch.rand(1, 2, 4, 8, requires_grad=True)
    with Watch():
        nn.functional.scaled_dot_product_attention(query, query, query).sum().backward()
        torch.zeros(3)[torch.tensor([1])] = 1.0
    assert plan.CPU_ATTENTION in seen, "its FLOPs would count as none"
    assert plan.CPU_ATTENTION_BACKWARD in seen, "its FLOPs would count as none"
