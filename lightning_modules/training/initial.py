"""Initial weights of a training: read from a model that was saved or trained before."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn

from lightning_modules.checkpoint.weights import Saved, open_saved
from lightning_modules.encoder.base import Encoder
from lightning_modules.importers.match import Allowed, Match, Rule, check, copy, match
from lightning_modules.lora import is_lora
from lightning_modules.private.peft import BASE_LAYER

logger = logging.getLogger(__name__)

#: Components keep their names from one training to the next.
_SAME = (Rule("", ""),)

#: Part of the names of weights that have LoRA beside them.
_BASE = f".{BASE_LAYER}."


class Initial:
    """Initial weights for a network whose parameters have the same names.

    `path` is a folder written by `save_pretrained` or ropelab-import, a run directory (its newest
    whole checkpoint is used), or one checkpoint such as `checkpoints/best.ckpt`.

    Args:
        path: where the weights are.
        unused: globs of stored names that the network need not have.
        unfilled: globs of the network's parameters that may keep their initial values.
    """

    def __init__(self, path: str, unused: Sequence[str] = (), unfilled: Sequence[str] = ()):
        self.path = Path(path).expanduser()
        self._allowed = Allowed(unused, unfilled, "init_allow.{}")
        self._opened: Saved | None = None

    def match(self, network: nn.Module) -> Match:
        """Matches each stored tensor to a parameter; works on the meta device, too.

        Raises:
            ValueError: the weights cannot be read, or names or shapes do not fit.
        """
        if self._opened is None:
            self._opened = open_saved(self.path, "init")
        stored = _with_copies(_into_adapted(self._opened.weights, network), network)
        found = match(stored, network, _SAME)
        if not any(map(is_lora, stored)):  # new adapters do not change the output yet
            found.unfilled = [name for name in found.unfilled if not is_lora(name)]
        check(found, self._allowed, f"init={self.path}")
        return found

    def fill(self, network: nn.Module, spec: Mapping[str, Any]) -> None:
        """Copies the weights into the network, tensor by tensor; each rank reads them itself.

        The rotary scheme is always that of `spec`. If the weights were trained with another one, a
        warning is logged. The log also names the parts that the stored weights lack.
        """
        found = self.match(network)
        copy(network, found.values)
        assert self._opened is not None
        self._note(found, self._opened.specs.get("rotary"), spec.get("rotary"))
        self._opened = None

    @rank_zero_only
    def _note(self, found: Match, trained: Any, asked: Any) -> None:
        fresh = ", ".join(_parts(found.unfilled, found.values))
        others = f"; freshly initialised: {fresh}" if fresh else ""
        logger.info("starts from the weights of %s%s", self.path, others)
        if None not in (trained, asked) and trained != asked:
            logger.warning(
                "init=%s was trained with rotary %s, but this training has %s",
                self.path,
                trained,
                asked,
            )


def _into_adapted(stored: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Renames weights saved without LoRA to the names in a network with LoRA."""
    beside = {name.replace(_BASE, "."): name for name in network.state_dict() if _BASE in name}
    return {beside.get(name, name): value for name, value in stored.items()}


def _with_copies(stored: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Adds parameters that start as copies of others, if none of them is stored."""
    encoder = getattr(network, "encoder", None)
    copied = encoder.copied() if isinstance(encoder, Encoder) else {}
    pairs = {f"encoder.{name}": f"encoder.{of}" for name, of in copied.items()}
    if any(name in stored for name in pairs):
        return stored
    return stored | {name: stored[of] for name, of in pairs.items() if of in stored}


def _parts(names: Sequence[str], others: Mapping[str, Tensor]) -> list[str]:
    """Returns short names: the component, or a part of it if `others` are in the same component."""
    shared = {name.partition(".")[0] for name in others}
    paths = [name.split(".")[:2] for name in names]
    return list(dict.fromkeys(".".join(p) if p[0] in shared else p[0] for p in paths))
