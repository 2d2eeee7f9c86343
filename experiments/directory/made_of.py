"""Compares the settings that make a run's weights, and those that a resumed run may change.

config.yaml of the run directory     config of this command
              |                               |
              +------- leaves by key ---------+
                            |
how it is computed, how it is watched      never compared
length of the training, tests              may change: the run continues
everything else                            makes the weights: must be the same
"""

import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from experiments.command.old_words import NEW_KEYS

#: Sections that make the weights. The error names the first difference, so a section comes before
#: the sections that interpolate it.
_SECTIONS = (
    "seed",
    "init",
    "init_allow",
    "model",
    "tuning",
    "optim",
    "trainer",
    "prepare",
    "data",
    "callbacks",
    "module",
)

#: Callbacks that watch a training and change no weights. All others are compared.
_WATCH = (
    "lightning_modules.callbacks.samples.*",
    "lightning_modules.checkpoint.*",
    "lightning_modules.callbacks.heartbeat.*",
    "lightning_modules.callbacks.memory.*",
    "lightning_modules.callbacks.score_book.*",
    "lightning_modules.callbacks.throughput.*",
    "lightning_modules.loggers.progress.*",
    "lightning.pytorch.callbacks.*ProgressBar",
    "lightning.pytorch.callbacks.*Summary",
    "lightning.pytorch.callbacks.DeviceStatsMonitor",
    "lightning.pytorch.callbacks.EarlyStopping",
    "lightning.pytorch.callbacks.LearningRateMonitor",
    "lightning.pytorch.callbacks.ModelCheckpoint",
    "lightning.pytorch.callbacks.Timer",
)

#: Keys that decide how a run is computed or watched, with all keys below them.
_HOW = (
    "callbacks.finite.max_skipped",
    "data.audit",
    "data.stream.index_cache",
    "data.stream.max_bad_rate",
    "data.stream.num_workers",
    "data.stream.on_bad_sample",
    "data.stream.on_changed",
    "data.stream.timeout_s",
    "model.encoder.attention",
    "model.llm.attention",
    "module.optimizer.foreach",
    "module.optimizer.fused",
    "module.scores",
    "module.tuning.checkpointing",
    "module.tuning.compile",
    "module.tuning.compiler",
    "optim.optimizer.foreach",
    "optim.optimizer.fused",
    "trainer.accelerator",
    "trainer.accumulate_grad_batches",  # data.global_batch_size decides it
    "trainer.benchmark",
    "trainer.check_val_every_n_epoch",
    "trainer.default_root_dir",
    "trainer.detect_anomaly",
    "trainer.deterministic",
    "trainer.devices",
    "trainer.enable_*",
    "trainer.inference_mode",
    "trainer.limit_predict_batches",
    "trainer.limit_val_batches",
    "trainer.log_every_n_steps",
    "trainer.num_nodes",
    "trainer.num_sanity_val_steps",
    "trainer.profiler",
    "trainer.strategy",
    "trainer.val_check_interval",
    "tuning.checkpointing",
    "tuning.compile",
    "tuning.compiler",
)

#: Keys for the length of a training and for its test. A finished run continues if they change.
_FURTHER = (
    "trainer.max_*",
    "trainer.min_*",
    "trainer.limit_test_batches",
    "data.grid",
)

#: Keys of shard paths. The stream's fingerprint in the checkpoint shows if the shards are the same.
_PLACES = ("data.train", "data.val", "data.shards")

#: With `on_changed: go_on` in this key, the user changes the data on purpose.
_GO_ON = ("data.stream.on_changed",)

Differences = dict[str, tuple[Any, Any]]


def compare(then: dict[str, Any], now: dict[str, Any]) -> tuple[Differences, Differences]:
    """Compares two resolved configs of trainings.

    Paths in the run directory or under `paths.data` count as equal if these folders have moved.

    Returns:
        (differences that change the weights, differences for which a finished run must continue),
        each with (old, new) values by dotted key.
    """
    old, new = _leaves_of(then, _SECTIONS), _leaves_of(now, _SECTIONS)
    go_on = any(new.get(key) == "go_on" for key in _GO_ON)
    weights: Differences = {}
    further: Differences = {}
    for key in [*new, *(key for key in old if key not in new)]:
        values = old.get(key), new.get(key)
        if values[0] == values[1] or _among(key, _HOW):
            continue
        moved = _among(key, _PLACES) and not key.endswith(".weight")  # a weight of a mixture
        allowed = moved or _among(key, _FURTHER) or (go_on and _among(key, ("data", "prepare")))
        (further if allowed else weights)[key] = values
    if now.get("test") and not then.get("test"):  # a test that has been run stays
        further["test"] = then.get("test"), now["test"]
    return weights, further


def compare_all(then: dict[str, Any], now: dict[str, Any]) -> Differences:
    """Compares two resolved configs of evaluations in all settings that decide their results."""
    sections = ("run", *_SECTIONS, "scores", "test")
    old, new = _leaves_of(then, sections), _leaves_of(now, sections)
    keys = [key for key in {**new, **old} if not _among(key, _HOW)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def _among(key: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(key, p) or key.startswith(f"{p}.") for p in patterns)


def _leaves_of(config: dict[str, Any], sections: tuple[str, ...]) -> dict[str, Any]:
    """Returns values by dotted key. Leaves out values that have the effect of a missing key.

    These are null, empty lists, and the defaults in `NEW_KEYS`.
    """
    found: dict[str, Any] = {}
    for section in sections:
        node: Any = config
        for part in section.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        if section == "callbacks" and isinstance(node, dict):
            node = {name: child for name, child in node.items() if not _watches(child)}
        found |= dict(_leaves(_movable(node, config), section))
    found = {k: v for k, v in found.items() if not (k in NEW_KEYS and v == NEW_KEYS[k])}
    return found | {key: _real(found[key]) for key in ("init", "module.init") if key in found}


def _watches(callback: Any) -> bool:
    target = callback.get("_target_") if isinstance(callback, dict) else None
    return any(fnmatchcase(str(target), pattern) for pattern in _WATCH)


def _leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from _leaves(child, f"{prefix}.{key}")
    elif node is not None and node != []:
        yield prefix, node


def _movable(node: Any, config: dict[str, Any]) -> Any:
    """Returns the node with `${paths.run}` and `${paths.data}` in place of these folders."""
    if isinstance(node, dict):
        return {key: _movable(child, config) for key, child in node.items()}
    if isinstance(node, list):
        return [_movable(child, config) for child in node]
    if isinstance(node, str):
        for name in ("run", "data"):
            folder = str(config.get("paths", {}).get(name) or "")
            if folder and (node == folder or node.startswith(folder.rstrip("/") + "/")):
                return f"${{paths.{name}}}{node[len(folder.rstrip('/')) :]}"
    return node


def _real(path: Any) -> Any:
    """Returns the real path if the path exists, so that two spellings of a folder are equal."""
    return os.path.realpath(path) if isinstance(path, str) and os.path.exists(path) else path
