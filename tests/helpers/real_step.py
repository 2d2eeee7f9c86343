"""Measures a real training step, to check plans on fake tensors against it."""

import warnings
from typing import NamedTuple

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.planning.largest_sample import Largest
from experiments.planning.memory_watch import ATTENTION, SMALLEST
from experiments.run.compose import build, plain


class RealFrames:
    """A stand-in for the fake mode. Tensors made in it are real and hold no NaN."""

    def __enter__(self):
        self._empty, torch.empty = torch.empty, torch.zeros

    def __exit__(self, *error):
        torch.empty = self._empty


class Taken(NamedTuple):
    weights: int  # bytes as an allocator rounds them, like the next two
    gradients: int  # gradients that exist before the recording
    optimizer: int
    flops: int
    peak: int  # peak bytes allocated, beyond the memory in use before the step


def take_real(config, module=None, accumulates=True):
    """Measures the planned step of a recipe, after its first steps.

    Without accumulation, the gradients of the previous step exist until the forward is done. The
    profiler only sees the release of memory that it recorded, so it then records two steps.
    """
    if module is None:
        module = build(config.module, "module", scheduler=None)(model=plain(config.model))
    module.configure_model()
    module.train()
    outline = Largest.of(config).outline(module.network, RealFrames())
    batch = build(config.data, "data").outlined(outline)
    optimizer = module.configure_optimizers()
    trained = [p for p in module.parameters() if p.requires_grad]

    def step():
        loss = module.training_step(batch, 0)
        if not accumulates:
            optimizer.zero_grad()
        loss.backward()
        if clip := config.trainer.get("gradient_clip_val"):
            torch.nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*self\.log")
        step()
        with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
            step()
        if not accumulates:
            optimizer.zero_grad()
        with profile(profile_memory=True) as recorded:
            step()
            if not accumulates:
                step()
    networks = (module, *module.beside())
    return Taken(
        rounded([t for n in networks for t in (*n.parameters(), *n.buffers())]),
        rounded([p.grad for p in module.parameters() if p.grad is not None and accumulates]),
        rounded([t for state in optimizer.state.values() for t in state.values()]),
        counter.get_total_flops(),
        highest(recorded),
    )


def highest(recorded):
    events = recorded.profiler.kineto_results.events()
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    now = most = 0
    for _, change in sorted(changes, key=lambda pair: pair[0]):
        now += change
        most = max(most, now)
    return most


def rounded(tensors):
    return sum(-(-t.nbytes // SMALLEST) * SMALLEST for t in tensors)
