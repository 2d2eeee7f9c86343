"""Means over the distinct samples of a validation."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_modules.metrics.base import distinct, mark


class DistinctMeans(Metric):
    """Numbers by name, each a mean over the terms of all samples that any rank has seen.

    A sample is known by its key and counts once, so the numbers depend neither on how samples were
    batched nor on which of them were read twice because the number of ranks does not divide them.
    """

    full_state_update = False
    samples: list[Tensor]
    rows: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self._names: tuple[str, ...] = ()
        self.add_state("samples", default=[], dist_reduce_fx="cat")
        self.add_state("rows", default=[], dist_reduce_fx="cat")

    def update(
        self,
        keys: Sequence[str],
        terms: Num[Tensor, " b"],
        sums: Mapping[str, Float[Tensor, " b"]],
    ) -> None:
        """Adds samples: the number of terms of each, and by name the sums over these terms.

        All updates have the same names, in the same order.
        """
        self._names = tuple(sums)
        columns = [terms, *sums.values()]
        self.samples.append(torch.tensor([mark(key) for key in keys], device=self.device))
        self.rows.append(torch.stack([column.detach().double() for column in columns], dim=1))

    def compute(self) -> dict[str, float]:
        """Empty where no sample was seen, 0 where no sample has a term."""
        if len(self.samples) == 0:  # a list, or one tensor where ranks have been gathered
            return {}
        places = distinct(dim_zero_cat(self.samples).cpu())
        terms, *sums = dim_zero_cat(self.rows).cpu()[places].sum(0).tolist()
        return {
            name: total / max(1.0, terms) for name, total in zip(self._names, sums, strict=True)
        }
