"""The loss of an optimizer step: one mean over all its terms, on all ranks and micro-batches.

    micro-batch   returns sum of its terms / unit ---- backward ----+  gradients add up
    micro-batch   ...                                               |
    last one of the step                                            v
    one all-reduce of (sum of the loss, number of terms, ...)       gradients x factor
                                                                    -> clipping, optimizer

A term is a labelled token, a pair of answers or a caption. A mean of the micro-batches' means would
give a term more weight if its micro-batch has fewer terms.
"""

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

MEANS = ("step", "micro_batch")


class StepLoss:
    """Collects the micro-batches of the current optimizer step, and finishes the step.

    Attributes:
        samples: samples that all ranks have trained on since the training began.

    Args:
        mean: `step` gives all terms of a step the same weight. `micro_batch` takes the mean of the
            micro-batches' means, as many published trainers do.

    Raises:
        ValueError: `mean` is neither of these.
    """

    def __init__(self, mean: str = "step"):
        if mean not in MEANS:
            raise ValueError(f"module.loss_mean is {mean!r}; set it to 'step' or 'micro_batch'")
        self.mean = mean
        self.samples = 0
        self._unit: Tensor | float | None = None
        self._sums: dict[str, Tensor] = {}

    def add(
        self,
        total: Float[Tensor, ""],
        terms: Tensor | int,
        samples: int,
        group: ProcessGroup | None = None,
        **beside: Tensor | float | int,
    ) -> Float[Tensor, ""]:
        """Adds a micro-batch to the step; returns the loss to call `backward` on.

        Args:
            total: sum of the loss over the micro-batch's terms.
            terms: number of terms.
            samples: number of samples.
            group: the data-parallel ranks, or None. All of them must call this method.
            beside: further sums, for logs. Their names must be the same in every call.
        """
        count = torch.as_tensor(terms, device=total.device)
        if self.mean == "micro_batch":
            total, count = total / count.clamp(min=1), torch.ones_like(count)
        if self._unit is None:
            self._unit = _unit(count, group)
        numbers = {"loss": total, "terms": count, "samples": samples, **beside}
        for name, number in numbers.items():
            # float64 counts tokens exactly, and sums losses without losing digits.
            own = torch.as_tensor(number, device=total.device).detach().double()
            self._sums[name] = self._sums[name] + own if name in self._sums else own
        return total / self._unit

    def finish(
        self,
        parameters: Iterable[nn.Parameter],
        accumulation: int,
        group: ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Rescales the gradients to those of the step's mean; returns the sums over all ranks.

        The gradients of `parameters` must be divided by `accumulation` and averaged over the ranks
        of `group`, as Lightning and the strategies do. They must not be clipped yet.
        """
        assert self._unit is not None
        stacked = torch.stack(list(self._sums.values()))
        if group is not None:
            distributed.all_reduce(stacked, group=group)
        sums = dict(zip(self._sums, stacked.tolist(), strict=True))
        self._sums = {}
        self.samples += round(sums["samples"])
        divided = accumulation * (1 if group is None else group.size())
        # Without any label, all gradients of a step are 0 and stay 0.
        scale_gradients(parameters, float(self._unit) * divided / max(1.0, sums["terms"]))
        return sums

    def start(self) -> None:
        """Discards the micro-batches of an unfinished step."""
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "unit": 0.0 if self._unit is None else float(self._unit)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self._unit = int(state["samples"]), state["unit"] or None


def _unit(terms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Returns a power of two near the number of terms in the first micro-batch; same on all ranks.

    Sums are divided by it, so that gradients have the size of those of a micro-batch's mean.
    Gradients of a sum over thousands of tokens would overflow in float16 (largest number 65,504),
    and a GradScaler would skip a dozen steps until it found its scale. Division by a power of two
    is exact.
    """
    mean = terms.detach().double()
    if group is not None:
        distributed.all_reduce(mean, group=group)
        mean = mean / group.size()
    return torch.exp2(mean.clamp(min=1).log2().floor()).float()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies gradients in place; of a sharded gradient, each rank scales its own shard.

    `factor` is a number, because PyTorch would round a tensor to the dtype of the gradients.
    """
    if factor == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            piece = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            piece.mul_(factor)
