"""A step of training with numbers, and what it takes: what plans on fake tensors are held to."""

import warnings
from typing import NamedTuple

import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from experiments.planning.largest_sample import Largest
from experiments.planning.memory_watch import ATTENTION, SMALLEST
from experiments.run.compose import build, plain


class RealFrames:
    """In the place of the fake mode: what is made in it is real, and holds no NaN."""

    def __enter__(self):
        self._empty, torch.empty = torch.empty, torch.zeros

    def __exit__(self, *error):
        torch.empty = self._empty


class Taken(NamedTuple):
    weights: int  # bytes as an allocator rounds them, like the next two
    gradients: int  # that were there before what is recorded
    optimizer: int
    flops: int
    peak: int  # bytes given out at most, beyond what was there before the step


def take_real(config, module=None, accumulates=True):
    """The planned step of a recipe, a later one.

    Where it does not accumulate, the gradients of the step before are there until the forward is
    done. As only what was recorded is heard of when it is freed, two steps are recorded then.
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
