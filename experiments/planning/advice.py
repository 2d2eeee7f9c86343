"""Ways out for a recipe that does not fit into the memory, each with its own forecast."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf, open_dict

from experiments import CONFIG_DIR
from experiments.planning.forecast import Forecast, forecast, is_sharded
from experiments.planning.tables import cost, progress
from lightning_modules.training.preference.reference import FrozenReference


class Change(NamedTuple):
    """A change to try.

    Attributes:
        way: name of the way out. Of the changes on one way, the first that fits is enough.
        words: words of the command line by key.
        settings: config values that the words set, by dotted key.
        ranks: number of ranks.
    """

    way: str
    words: dict[str, Any]
    settings: dict[str, Any]
    ranks: int


def advise(config: DictConfig, tight: Forecast, usable: float) -> Iterator[str]:
    """Yields a line for each way out that fits alone. If none does, adds one to the other.

    Args:
        config: the composed recipe.
        tight: its forecast.
        usable: memory of a device in GiB.
    """
    tried: list[tuple[Change, Forecast]] = []  # those that help
    ways: set[str] = set()  # those that fit alone
    for change in _changes(config, tight.ranks):
        if change.way in ways:
            continue
        found = _forecast(config, tight, [change])
        if found is None or found.gib >= tight.gib:
            continue
        tried.append((change, found))
        if found.gib <= usable:
            ways.add(change.way)
            yield f"{_show([change])}: {cost(found)}, fits"
    if not ways:
        yield from _combine(config, tight, usable, tried)


def _combine(
    config: DictConfig, tight: Forecast, usable: float, tried: list[tuple[Change, Forecast]]
) -> Iterator[str]:
    """Yields the growing list of changes, one after another, until the recipe fits."""
    taken: dict[str, Change] = {}  # by way, because a later change may replace an earlier one
    best = tight
    for change, alone in tried:
        attempt = taken | {change.way: change}
        found = _forecast(config, best, list(attempt.values())) if len(attempt) > 1 else alone
        if found is None or found.gib >= best.gib:
            continue
        taken, best = attempt, found
        fits = best.gib <= usable
        yield f"{_show(taken.values())}: {cost(best)}" + (", fits" if fits else "")
        if fits:
            return
    yield "no change that is known here makes it fit: choose a smaller model or fewer frames"


def _show(changes: Iterable[Change]) -> str:
    words = {key: word for change in changes for key, word in change.words.items()}
    return " ".join(f"{key}={word}" for key, word in words.items())


def _forecast(config: DictConfig, tight: Forecast, changes: list[Change]) -> Forecast | None:
    """Returns the forecast with these changes; None if this stage of training forbids them."""
    attempt = config.copy()
    with open_dict(attempt):
        for change in changes:
            for key, value in change.settings.items():
                OmegaConf.update(attempt, key, value, force_add=True)
    ranks = max([tight.ranks, *(change.ranks for change in changes)])
    try:
        with progress(f"tries {_show(changes)}"):
            return forecast(attempt, ranks)
    except ValueError:
        return None


def _changes(config: DictConfig, ranks: int) -> Iterator[Change]:
    """Yields possible changes, the cheapest first."""
    tuning, size = config.get("tuning"), config.data.batch_size
    reference = OmegaConf.select(config, "module.reference._target_")
    if tuning is not None:
        stages = [stage for stage in ("llm", "encoder") if config.model.get(stage)]
        for count in range(1, len(stages) + 1):
            if not set(stages[:count]) <= set(tuning.checkpointing):
                word = f"[{','.join(stages[:count])}]"
                settings = {"tuning.checkpointing": stages[:count]}
                yield Change("checkpointing", {"tuning.checkpointing": word}, settings, ranks)
    if reference and issubclass(get_class(reference), FrozenReference):
        yield _option("module/reference", "streamed", {"module.reference": ""}, ranks)
    if ranks > 1 and not is_sharded(config):
        yield _option("trainer", "fsdp", {"trainer.strategy": "strategy"}, ranks)
    for smaller in dict.fromkeys((size // 2, 1)):
        if 0 < smaller < size and size % smaller == 0:
            yield Change("batch", {"data.batch_size": smaller}, {"data.batch_size": smaller}, ranks)
    if tuning is not None and not tuning.lora:
        lora = {"tuning.freeze": "freeze", "tuning.lora": "lora"}
        yield _option("tuning", "lora", lora, ranks)
    yield from _more_ranks(config, ranks)


def _more_ranks(config: DictConfig, ranks: int) -> Iterator[Change]:
    size = config.data.batch_size
    for more in (2 * ranks, 4 * ranks, 8 * ranks):
        if is_sharded(config):  # each keeps a smaller part of the weights
            yield Change("ranks", {"ranks": more}, {}, more)
        for batch in dict.fromkeys((1, config.data.global_batch_size // more)):
            if ranks > 1 and 1 <= batch < size:
                words = {"data.batch_size": batch}
                yield Change("ranks", words | {"ranks": more}, words, more)


def _option(group: str, name: str, nodes: dict[str, str], ranks: int) -> Change:
    """Returns the change to option `name` of a config group.

    Args:
        nodes: key of the config -> part of the option's file that goes there; "" is the whole file.
    """
    file: Any = OmegaConf.load(CONFIG_DIR / group / f"{name}.yaml")
    settings = {key: OmegaConf.select(file, part) if part else file for key, part in nodes.items()}
    return Change(group, {group: name}, settings, ranks)
