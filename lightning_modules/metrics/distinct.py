"""Computes means over the distinct samples of a validation."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.common.digest import number
from lightning_modules.metrics.base import distinct


class DistinctMeans(Metric):
    """Computes named means over the terms of all samples that any rank has seen.

    A sample is identified by its key and counts once. So the means do not depend on batching, nor
    on samples that are read twice because their number is not divisible by the number of ranks.
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
        """Adds samples: the number of terms of each, and named sums over these terms.

        All updates must have the same names, in the same order.
        """
        self._names = tuple(sums)
        columns = [terms, *sums.values()]
        self.samples.append(torch.tensor([number(key) for key in keys], device=self.device))
        self.rows.append(torch.stack([column.detach().double() for column in columns], dim=1))

    def compute(self) -> dict[str, float]:
        """Returns the means by name: empty if no sample was seen, 0 if no sample has a term."""
        if len(self.samples) == 0:  # a list, or one tensor after the ranks were gathered
            return {}
        places = distinct(dim_zero_cat(self.samples).cpu())
        terms, *sums = dim_zero_cat(self.rows).cpu()[places].sum(0).tolist()
        return {
            name: total / max(1.0, terms) for name, total in zip(self._names, sums, strict=True)
        }
