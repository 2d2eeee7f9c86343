"""Retrieval recall between captions and visuals over a whole validation set."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from datamodules.common.digest import number

_AT_ONCE = 1024  # rows of the similarity matrix that are in memory at a time


class Retrieval(Metric):
    """Scores zero-shot retrieval among all pairs that any rank has seen; each pair counts once.

    `compute` returns `t2i_r1`, `t2i_r5`, `t2i_r10`: the share of captions whose own visual is among
    the 1, 5, 10 most similar ones. `i2t_*` is the same from visuals to captions. `loss` is the
    contrastive loss over all pairs. None of them depends on the batching. Ties count as wrong, so
    that a collapsed model finds nothing.
    """

    full_state_update = False

    visuals: list[Tensor]
    captions: list[Tensor]
    pairs: list[Tensor]
    scale: Tensor

    def __init__(self, ranks: Sequence[int] = (1, 5, 10)):
        super().__init__()
        self.ranks = tuple(ranks)
        for name in ("visuals", "captions", "pairs"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.add_state("scale", torch.tensor(1.0), dist_reduce_fx="mean")

    def update(
        self,
        visuals: Float[Tensor, "b e"],
        captions: Float[Tensor, "b e"],
        keys: Sequence[str],
        scale: Float[Tensor, "1"],
    ) -> None:
        """Adds pairs as unit vectors; pairs with the same key count as one pair."""
        self.visuals.append(visuals.detach().float())
        self.captions.append(captions.detach().float())
        self.pairs.append(torch.tensor([number(key) for key in keys], device=visuals.device))
        self.scale = scale.detach().float().squeeze()

    def compute(self) -> dict[str, Tensor]:
        first = _first_of_each(dim_zero_cat(self.pairs))
        visuals, captions = dim_zero_cat(self.visuals)[first], dim_zero_cat(self.captions)[first]
        scores, losses = {}, []
        for name, asked, sought in (("t2i", captions, visuals), ("i2t", visuals, captions)):
            nearer, loss = _search(asked, sought, self.scale)
            losses.append(loss)
            for rank in self.ranks:
                scores[f"{name}_r{rank}"] = (nearer < rank).float().mean()
        return {"loss": torch.stack(losses).mean(), **scores}


def _search(
    asked: Float[Tensor, "n e"], sought: Float[Tensor, "n e"], scale: Float[Tensor, ""]
) -> tuple[Int[Tensor, " n"], Float[Tensor, ""]]:
    """Returns the number of wrong candidates that are at least as similar, and the mean loss."""
    nearer, losses = [], []
    for start in range(0, len(asked), _AT_ONCE):
        rows = asked[start : start + _AT_ONCE]
        similar = rows @ sought.T  # rows, n
        own = torch.arange(start, start + len(rows), device=rows.device)
        further = similar < similar.gather(1, own[:, None])  # NaN: nothing is further
        nearer.append((~further).sum(1) - 1)
        losses.append(cross_entropy(scale * similar, own, reduction="sum"))
    return torch.cat(nearer), torch.stack(losses).sum() / len(asked)


def _first_of_each(pairs: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
    _, group = pairs.unique(return_inverse=True)
    places = torch.arange(len(pairs), device=pairs.device)
    first = places.new_full((int(group.max()) + 1,), len(pairs)).scatter_reduce(
        0, group, places, "amin"
    )
    return first[group] == places
