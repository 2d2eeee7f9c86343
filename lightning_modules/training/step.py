"""The loss of an optimizer step: one mean over its terms, however they were shared out.

    micro-batch   returns sum of its terms / unit ---- backward ----+  gradients add up
    micro-batch   ...                                               |
    last one of the step                                            v
    one all-reduce of (sum of the loss, number of terms, ...)       gradients x factor
                                                                    -> clipping, optimizer

A term is a labelled token, a pair of answers or a caption. A mean of each micro-batch's mean would
weigh a term by how few others share its micro-batch.
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
    """Collects the micro-batches of the optimizer step in progress, and ends the step.

    Attributes:
        samples: samples that all ranks have trained on since the training began.

    Args:
        mean: `step` weighs all terms of a step alike. `micro_batch` takes the mean of the means of
            the micro-batches, as many published trainers do.

    Raises:
        ValueError: `mean` is neither.
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
        """Adds a micro-batch to the step; returns the number to go backward from.

        Args:
            total: sum of the loss over the micro-batch's terms.
            terms: how many they are.
            group: the ranks that read other micro-batches than this one. All of them must call.
            beside: other sums, for logs. Their names must be the same in every call.
        """
        count = torch.as_tensor(terms, device=total.device)
        if self.mean == "micro_batch":
            total, count = total / count.clamp(min=1), torch.ones_like(count)
        if self._unit is None:
            self._unit = _unit(count, group)
        numbers = {"loss": total, "terms": count, "samples": samples, **beside}
        for name, number in numbers.items():
            # float64 counts tokens exactly, and adds up losses without loss of digits
            own = torch.as_tensor(number, device=total.device).detach().double()
            self._sums[name] = self._sums[name] + own if name in self._sums else own
        return total / self._unit

    def finish(
        self,
        parameters: Iterable[nn.Parameter],
        accumulation: int,
        group: ProcessGroup | None = None,
    ) -> dict[str, float]:
        """Makes the gradients those of the step's mean; returns the sums of all ranks.

        `parameters` have gradients that were divided by `accumulation` and averaged over the ranks
        of `group`, as Lightning and the strategies do. They must not have been clipped.
        """
        assert self._unit is not None
        stacked = torch.stack(list(self._sums.values()))
        if group is not None:
            distributed.all_reduce(stacked, group=group)
        sums = dict(zip(self._sums, stacked.tolist(), strict=True))
        self._sums = {}
        self.samples += round(sums["samples"])
        divided = accumulation * (1 if group is None else group.size())
        # A step without any label has gradients of 0, which stay what they are.
        scale_gradients(parameters, float(self._unit) * divided / max(1.0, sums["terms"]))
        return sums

    def start(self) -> None:
        """Forgets the micro-batches of a step that was never taken."""
        self._sums = {}

    def state_dict(self) -> dict[str, Any]:
        return {"samples": self.samples, "unit": 0.0 if self._unit is None else float(self._unit)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.samples, self._unit = int(state["samples"]), state["unit"] or None


def _unit(terms: Tensor, group: ProcessGroup | None) -> Tensor:
    """Power of two near the number of terms in the first micro-batch, the same on all ranks.

    Sums are divided by it, so that gradients have the size of a micro-batch's mean: those of a sum
    over thousands of tokens would overflow in float16 (largest number 65,504), and a GradScaler
    would skip a dozen steps until it had found its scale. A power of two changes no digit.
    """
    mean = terms.detach().double()
    if group is not None:
        distributed.all_reduce(mean, group=group)
        mean = mean / group.size()
    return torch.exp2(mean.clamp(min=1).log2().floor()).float()


@torch.no_grad()
def scale_gradients(parameters: Iterable[nn.Parameter], factor: float) -> None:
    """Multiplies gradients in place, of shards the rank's own piece.

    `factor` is a number and no tensor: PyTorch rounds a tensor to the dtype of the gradients.
    """
    if factor == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            gradient = parameter.grad
            piece = gradient.to_local() if isinstance(gradient, DTensor) else gradient
            piece.mul_(factor)
