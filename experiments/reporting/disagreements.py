"""Finds the samples on which settings disagree most, with their frames and all answers."""

import io
import json
import tarfile
from base64 import b64encode
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from experiments.reporting.data import Run
from experiments.reporting.measured import NEEDLES
from experiments.reporting.tables import Group, Ranking

#: Samples that are shown.
SHOWN = 8
_FRAMES, _SIDE = 6, 96  # frames of a video, and their pixels along a side


@dataclass(frozen=True)
class Said:
    """What the runs of one setting said to a sample, and the mean of the metric there."""

    text: str
    value: float
    right: bool


@dataclass(frozen=True)
class Disagreement:
    """A sample, and what each setting said to it.

    Attributes:
        frames: a strip of frames as the data URI of a JPEG; empty if they cannot be read.
        said: by the label of the setting.
    """

    key: str
    prompt: str
    right: str
    said: dict[str, Said]
    frames: str = ""


@dataclass
class _Spread:
    spread: float
    values: dict[str, list[float]] = field(default_factory=dict)


def disagreements(ranking: Ranking, groups: Sequence[Group]) -> list[Disagreement]:
    """Returns the samples whose mean value differs most between settings, the widest first."""
    shown = [group for group in groups if group.scored(ranking.metric)]
    by_sample: dict[str, _Spread] = {}
    for group in shown:
        for measured in group.scored(ranking.metric).values():
            for answer in measured.answers:
                place = by_sample.setdefault(answer.key, _Spread(0.0))
                place.values.setdefault(group.label, []).append(answer.value)
    for place in by_sample.values():
        means = [sum(v) / len(v) for v in place.values.values()]
        place.spread = max(means) - min(means)
    keys = sorted(by_sample, key=lambda key: (-by_sample[key].spread, key))[:SHOWN]
    runs = [run for group in shown for run in group.runs if ranking.metric in run.measured]
    pictures = _needle_pictures(runs[0], keys) if ranking.metric == NEEDLES else None
    pictures = pictures if pictures is not None else _video_pictures(runs[0], keys)
    return [
        _described(key, by_sample[key], shown, ranking.metric, pictures.get(key)) for key in keys
    ]


@dataclass(frozen=True)
class _Picture:
    strip: str = ""
    prompt: str = ""
    right: str = ""


def _described(
    key: str, place: _Spread, groups: Sequence[Group], metric: str, picture: _Picture | None
) -> Disagreement:
    picture = picture or _Picture()
    lines = [run.said[key] for group in groups for run in group.runs if key in run.said]
    prompt = lines[0]["prompt"] if lines else picture.prompt
    right = " or ".join(map(str, lines[0].get("right", []))) if lines else picture.right
    said = {}
    for group in groups:
        if (values := place.values.get(group.label)) is None:
            continue
        texts = [_text(run.said[key], metric) for run in group.runs if key in run.said]
        value = sum(values) / len(values)
        found = f"found by {sum(v == 1 for v in values)} of {len(values)}"
        said[group.label] = Said(_counted(texts) or found, value, value >= 0.5)
    return Disagreement(key, prompt, right, said, picture.strip)


def _text(line: dict[str, Any], metric: str) -> str:
    """Returns the generated answer; without one, or if that is judged, the likeliest letter."""
    odds = line.get("option_log_probs") or []
    if line.get("answer") is not None and not (odds and metric.endswith("likelihood")):
        return str(line["answer"]) or "(nothing)"
    return ascii_uppercase[max(range(len(odds)), key=odds.__getitem__)] if odds else ""


def _counted(texts: Iterable[str]) -> str:
    counts = Counter(text for text in texts if text)
    return ", ".join(f"{text} ({n} x)" if n > 1 else text for text, n in counts.most_common())


def _needle_pictures(run: Run, keys: Iterable[str]) -> dict[str, _Picture] | None:
    """Returns the needle of each cell; None if the shards of the run cannot be read here."""
    from datamodules.haystack.cells import take_turns
    from datamodules.haystack.needle import read_needles
    from datamodules.visuals.frames import FrameReader, UniformSampler

    data = run.settings.config.get("data") or {}
    try:
        paths = _local(data["shards"]["needles"]["test"])
        needles = read_needles([str(path) for path in paths], FrameReader(_SIDE, UniformSampler(1)))
        chosen = take_turns(needles, int(data["grid"]["needles"]))
        found = {}
        for key in keys:
            needle = chosen[int(key.rpartition("needle ")[2])]
            strip = _strip(needle.frame[None])
            found[key] = _Picture(strip, f"{needle.question} ({key})", needle.answer)
    except Exception:  # files of others may be damaged in any way; the page does without frames
        return None
    return found


def _video_pictures(run: Run, keys: Iterable[str]) -> dict[str, _Picture]:
    """Returns the frames of samples, as far as the run's validation shards can be read here."""
    from datamodules.visuals.frames import FrameReader, UniformSampler

    reader = FrameReader(_SIDE, UniformSampler(_FRAMES))
    wanted: dict[str, dict[str, str]] = {}
    for key in keys:
        shard, _, name = key.rpartition("/")
        wanted.setdefault(shard.rpartition("/")[2], {})[name] = key
    found: dict[str, _Picture] = {}
    try:
        paths = _local((run.settings.config.get("data") or {})["val"])
    except (KeyError, OSError, TypeError, ValueError):
        return {}
    for path in paths:
        for name, members in _members(path, wanted.get(path.name, {})).items():
            try:
                frames = [f for suffix, data in members for f in reader.read(suffix, data).frames]
                found[wanted[path.name][name]] = _Picture(_strip(frames))
            except Exception:  # a damaged visual: the page does without it
                continue
    return found


def _local(shards: Any) -> list[Path]:
    """Returns the local tar files that a config names. Nothing is fetched or executed."""
    from datamodules.stream.index import expand_urls

    patterns = [shards] if isinstance(shards, str) else list(shards)
    if any(":" in str(pattern) for pattern in patterns):
        raise ValueError("not a local path")
    return [path for path in map(Path, expand_urls(patterns)) if path.is_file()]


def _members(path: Path, names: Iterable[str]) -> dict[str, list[tuple[str, bytes]]]:
    """Returns the visual members of some samples of a tar, as (suffix, bytes)."""
    names, found = set(names), {}
    if not names:
        return {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                name, _, suffix = member.name.partition(".")
                file = tar.extractfile(member) if name in names and member.isfile() else None
                if file is not None and not suffix.endswith("json"):
                    found.setdefault(name, []).append((suffix, file.read()))
    except (OSError, tarfile.TarError):
        pass
    return found


def _strip(frames: Any) -> str:
    """Returns frames (c h w, uint8 RGB) side by side, as the data URI of a JPEG."""
    import torch
    from PIL import Image

    wide = torch.cat(list(frames)[: 2 * _FRAMES], dim=2).permute(1, 2, 0)  # h w c
    file = io.BytesIO()
    Image.fromarray(wide.contiguous().numpy()).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + b64encode(file.getvalue()).decode()


def judge_lines(run: Run) -> list[dict[str, Any]]:
    """Returns the answers of a run as published judges read them: id, question, answer, pred.

    It is the format of Video-ChatGPT's `evaluate_activitynet_qa.py`.

    Raises:
        ValueError: the run has no generated answers.
    """
    lines = [line for line in run.said.values() if line.get("answer") is not None]
    if not lines:
        raise ValueError(
            f"{run.folder} has no generated answers: choose a score that generates, such as "
            "scores=[open]"
        )
    return [
        {
            "id": line["key"],
            "question": line["prompt"],
            "answer": " or ".join(map(str, line["right"])),
            "pred": line["answer"],
        }
        for line in lines
    ]


def write_judge(run: Run, path: Path) -> Path:
    """Writes `judge_lines`: a JSON list; one JSON object per line if the name ends in .jsonl."""
    lines = judge_lines(run)
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    else:
        path.write_text(json.dumps(lines, ensure_ascii=False, indent=1))
    return path
