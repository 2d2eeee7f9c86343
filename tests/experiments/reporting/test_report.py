"""The report, on run folders with made-up numbers that no program has measured."""

import json
import re
import shutil
from base64 import b64decode
from html import unescape
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamodules.shards.demo import COLOURS, write_demo
from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import encode_video
from experiments.report import choose, main, place, tell, write_report
from experiments.reporting import tables as tables
from experiments.reporting.data import Run, load_run, load_runs
from experiments.reporting.disagreements import disagreements
from experiments.reporting.measured import LOSS, NEEDLES, Answer, Cell
from experiments.reporting.plots import cell_means
from experiments.reporting.sentences import cautions
from experiments.run.settings import factors
from lightning_modules.metrics.bootstrap import bootstrap_interval

TRAINED = (8, 24)
FRAMES = (8, 16, 24, 48, 96, 192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
COUNT = 6  # needles
#: log2 of the frames at which half of the needles are lost
REACH = {"vanilla": 6.4, "tad": 5.6, "mrope": 7.0, "videorope": 8.2}


def fake_cells(reach: float, rng: np.random.Generator) -> list[dict]:
    hardness = rng.normal(0, 0.6, COUNT)
    cells = []
    for frames in FRAMES:
        for depth in DEPTHS:
            for needle in range(COUNT):
                edge = 0.8 * abs(depth - 0.5)
                margin = 1.8 * (reach + edge + hardness[needle] - np.log2(frames))
                correct = bool(rng.random() < 0.1 + 0.9 / (1 + np.exp(-margin)))
                cells.append(
                    {
                        "frames": frames,
                        "depth": depth,
                        "needle": needle,
                        "correct": correct,
                        "log_prob": -0.1 if correct else -2.0,
                    }
                )
    return cells


def fake_needle(rotary: str, seed: int) -> dict:
    rng = np.random.default_rng([seed, *rotary.encode()])
    conditions = {}
    for name, loss in (("plain", 0.0), ("periodic", 0.7)):
        cells = fake_cells(REACH[rotary] - loss, rng)
        mean, *interval = bootstrap_interval([c["correct"] for c in cells])
        conditions[name] = {"cells": cells, "mean": mean, "interval": interval}
    return {
        "run": f"{rotary}-{seed}",
        "rotary": rotary,
        "seed": seed,
        "step": 600,
        "protocol": {
            "train_frames": list(TRAINED),
            "period": 8,
            "needles": COUNT,
            "depths": DEPTHS,
            "frames": FRAMES,
        },
        "conditions": conditions,
        "canaries": {
            "blind": {"mean": 0.11, "interval": [0.05, 0.18], "n": 120, "majority": 0.12},
            "ceiling": {"mean": 0.99, "interval": [0.97, 1.0], "n": 120, "majority": 0.12},
            "sensitivity": {"frames": 96, "depth": 0.5, "max_logit_change": 0.8},
        },
        "token_forwards": {"computed": 412_300, "recomputed": 1_003_520},
    }


def write_run(folder: Path, rotary: str, seed: int, needle: dict | None = None) -> Path:
    """Writes a run folder as training and evaluation leave it. Without `needle` it still runs."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / "config.yaml").write_text(
        f"seed: {seed}\nmodel: {{rotary: {{_target_: lightning_modules.rotary.{rotary}.X}}}}\n"
        f"paths: {{output_dir: {folder}}}\n"
    )
    overrides = ["experiment=vniah_d_tiny", f"rotary={rotary}", f"seed={seed}"]
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    choices = {"experiment": "vniah_d_tiny", "rotary": rotary, "hydra/launcher": "basic"}
    (folder / ".hydra" / "hydra.yaml").write_text(
        json.dumps({"hydra": {"runtime": {"choices": choices}}})
    )
    (folder / "command.txt").write_text(
        "ropelab-train -m experiment=vniah_d_tiny rotary=vanilla,tad,mrope,videorope seed=0,1\n"
    )
    rng = np.random.default_rng(seed)
    rows = ["epoch,step,train/loss,val/loss"]
    for step in range(0, 600, 5):
        loss = 2.3 * np.exp(-step / (40 * REACH[rotary])) + 0.1 + 0.08 * rng.standard_normal()
        rows.append(f"0,{step},{loss:.4f},")
        if step % 100 == 95:
            rows.append(f"0,{step},,{loss + 0.05:.4f}")
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if needle:
        (folder / "needle.json").write_text(json.dumps(needle))
        question = "Which digit is shown in the red frame?"
        with (folder / "generations.jsonl").open("w") as file:
            for i in range(4):
                said = str(i) if i < REACH[rotary] - 5 else "7"
                row = {
                    "key": f"val-{i:03}",
                    "prompt": question,
                    "answer": str(i),
                    "generated": said,
                }
                file.write(json.dumps(row) + "\n")
    return folder


def write_answers(
    folder: Path, seed: int, odds: dict[str, float], conditions: tuple[str, ...] = ("full", "blind")
) -> None:
    """Writes answers to multiple choice: 20 videos, each with a question of every category.

    Args:
        odds: share of right answers by category.
    """
    validations = []
    (folder / "answers").mkdir()
    for condition in conditions:
        lines = []
        for video in range(20):
            for category, chance in odds.items():
                # The same for every run: some videos are harder.
                hard = np.random.default_rng([video, *category.encode()]).normal(0, 0.15)
                draw = np.random.default_rng(
                    [seed, video, *folder.name.encode(), *category.encode()]
                )
                right = draw.random() < (0.25 if condition == "blind" else chance + hard)
                said = "A" if right else "B"
                lines.append(
                    {
                        "step": 120,
                        "condition": condition,
                        "key": f"shard-000000.tar/{video}-{category}",
                        "category": category,
                        "group": f"{video}.mp4",
                        "prompt": f"Which {category}?",
                        "frames": [8] if condition == "full" else [],
                        "right": ["A"],
                        "options": ["red", "blue"],
                        "answer": said,
                        "parsed": {"mc_generated": said},
                        "values": {"mc_generated": float(right), "mc_unparsed": 0.0},
                        "log_prob": -0.2 if right else -1.5,
                        "tokens": 2,
                        "option_log_probs": [-0.1, -2.0] if right else [-2.0, -0.1],
                    }
                )
        end = "" if condition == "full" else f"-{condition}"
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "answers" / f"step-00000120{end}.jsonl").write_text(text)
        facts = {"parser": "parse_letter 2", "max_new_tokens": 16}
        scores = [
            {"name": name, "value": 0.5, "count": 40, **facts, "higher_is_better": higher}
            for name, higher in (("mc_generated", True), ("mc_unparsed", False))
        ]
        about = {"data": "d1", "frames": {"num_frames": 8}, "generation": {"do_sample": False}}
        validations.append({"step": 120, "condition": condition, "scores": scores, **about})
    (folder / "scores.json").write_text(json.dumps(validations))


#: Share of right answers by setting: the scheme matters, the pooler does not.
ODDS = {
    ("videorope", "average_2x2"): {"colour": 0.9, "order": 0.8},
    ("videorope", "prompt_guided_2x2"): {"colour": 0.9, "order": 0.8},
    ("mrope", "average_2x2"): {"colour": 0.85, "order": 0.4},
    ("mrope", "prompt_guided_2x2"): {"colour": 0.85, "order": 0.4},
}


def write_ablation(root: Path, seeds: tuple[int, ...] = (0, 1, 2)) -> Path:
    """Writes an ablation of 2 schemes and 2 poolers with multiple-choice scores."""
    for (rotary, pooler), odds in ODDS.items():
        for seed in seeds:
            folder = write_run(root / f"{rotary}-{pooler}-seed{seed}", rotary, seed)
            words = [f"rotary={rotary}", f"pooler={pooler}", f"seed={seed}"]
            (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
            write_answers(folder, seed, odds)
    return root


def write_sweep(root: Path) -> Path:
    for number, (rotary, seed) in enumerate((r, s) for r in REACH for s in (0, 1)):
        write_run(root / str(number), rotary, seed, fake_needle(rotary, seed))
    return root


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    return write_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def page(sweep, tmp_path_factory) -> tuple[str, str, Path]:
    output = tmp_path_factory.mktemp("report")
    html, markdown = write_report(load_runs([sweep]), output)
    return html.read_text(), markdown.read_text(), output


class Page(HTMLParser):
    def __init__(self, html: str):
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in {"meta", "img", "br"}:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another element"


class TestReading:
    def test_runs_come_in_the_order_of_their_numbers(self, tmp_path):
        for name in ("10", "9", "2"):
            write_run(tmp_path / name, "tad", 0)
        assert [run.folder.name for run in load_runs([tmp_path])] == ["2", "9", "10"]

    def test_other_programs_configs_are_not_runs(self, tmp_path):
        folder = write_run(tmp_path / "0", "tad", 0)
        for inner in ("wandb/offline-run-1/files", "checkpoints"):
            (folder / inner).mkdir(parents=True)
            (folder / inner / "config.yaml").write_text("a: 1\n")
        (folder / ".hydra" / "config.yaml").write_text("a: 1\n")
        assert [run.folder for run in load_runs([tmp_path])] == [folder]

    def test_a_run_named_twice_counts_once(self, sweep):
        assert len(load_runs([sweep, sweep / "3"])) == 8

    def test_sparse_rows_become_one_curve_a_metric(self, tmp_path):
        folder = write_run(tmp_path / "0", "tad", 0)
        (folder / "metrics.csv").write_text("epoch,step,a,b\n0,1,0.5,\n0,1,,3\n0,2,0.25,\n")
        assert load_run(folder).curves == {"a": [(1, 0.5), (2, 0.25)], "b": [(1, 3.0)]}

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("needle.json", '{"run": "x",\n "rot', r"needle.json, line 2: not valid JSON"),
            ("needle.json", '{"run": "x"}', r"needle.json lacks 'protocol'|lacks 'canaries'"),
            ("needle.json", "[1]", r"needle.json is not a result"),
            ("generations.jsonl", '{"key": 1}\n', r"generations.jsonl, line 1"),
            ("metrics.csv", "epoch,step,a\n0,1,0.5\n0,x,1\n", r"metrics.csv, line 3"),
            ("config.yaml", "a: [1", r"config.yaml is not valid YAML"),
        ],
    )
    def test_a_broken_file_is_one_line_that_names_it(
        self, tmp_path, capsys, name, content, message
    ):
        folder = write_run(tmp_path / "0", "tad", 0, fake_needle("tad", 0))
        (folder / name).write_text(content)
        with pytest.raises(SystemExit) as stop:
            main([str(tmp_path)])
        assert re.search(message, str(stop.value))
        assert "\n" not in str(stop.value)

    @pytest.mark.parametrize("name", ["missing", "empty"])
    def test_a_folder_without_runs_is_one_line(self, tmp_path, name):
        (tmp_path / "empty").mkdir()
        with pytest.raises(SystemExit, match=name):
            main([str(tmp_path / name)])


def varied(runs: list[Run]) -> list[str]:
    return list(factors([run.settings for run in runs]))


class TestAxes:
    def test_what_the_command_line_varied(self, sweep):
        assert varied(load_runs([sweep])) == ["rotary", "seed"]

    def test_an_override_in_some_runs_only_is_compared_with_the_config_of_the_others(
        self, tmp_path
    ):
        for i, delta in enumerate((1, 2)):
            folder = write_run(tmp_path / str(i), "videorope", 0)
            (folder / "config.yaml").write_text(f"model: {{rotary: {{delta: {delta}}}}}\nseed: 0\n")
        overrides = ["rotary=videorope", "model.rotary.delta=1"]
        (tmp_path / "0" / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
        runs = load_runs([tmp_path])
        assert varied(runs) == ["model.rotary.delta"]
        assert [g.label for g in tables.group_runs(runs, ["model.rotary.delta"])] == ["1", "2"]

    def test_without_hydras_files_the_configs_are_compared(self, tmp_path):
        for i, scale in enumerate((1, 2)):
            (tmp_path / str(i)).mkdir()
            text = f"model: {{scale: {scale}}}\npaths: {{output_dir: {i}}}\n"
            (tmp_path / str(i) / "config.yaml").write_text(text)
        assert varied(load_runs([tmp_path])) == ["model.scale"]

    def test_the_expected_numbers_of_a_recipe_are_no_factor(self, tmp_path):
        for i, loss in enumerate((1.0, 2.0)):
            folder = write_run(tmp_path / str(i), "videorope", 0)
            (folder / "config.yaml").write_text(f"seed: 0\nexpected: {{val/loss: {loss}}}\n")
        assert varied(load_runs([tmp_path])) == []
        for i, loss in enumerate((1.0, 2.0)):
            words = ["rotary=videorope", f"expected={{val/loss:{loss}}}"]
            (tmp_path / str(i) / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
        assert varied(load_runs([tmp_path])) == []


def ranked(root: Path, metric: str | None = None) -> tables.Ranking:
    runs = load_runs([root])
    axes = varied(runs)
    ranking = choose(tables.group_runs(runs, axes), axes, metric)
    assert ranking
    return ranking


class TestRanking:
    def test_scores_are_the_shares_counted_by_hand(self, sweep):
        rows = ranked(sweep).rows
        assert [row.group.label for row in rows] == ["videorope", "mrope", "vanilla", "tad"]
        raw = [fake_needle("mrope", seed)["conditions"]["periodic"]["cells"] for seed in (0, 1)]
        beyond = [[c["correct"] for c in cells if c["frames"] > TRAINED[1]] for cells in raw]
        score = rows[1].scores[tables.Column("periodic", "beyond")]
        assert score.interval.mean == pytest.approx(np.mean(beyond))
        assert score.seeds == pytest.approx([np.mean(seed) for seed in beyond])
        assert rows[0].beside == pytest.approx({"blind": 0.11, "ceiling": 0.99})

    def test_a_length_trained_on_is_not_beyond(self, sweep):
        measured = load_runs([sweep / "0"])[0].measured[NEEDLES]
        within = tables.in_column(measured.answers, tables.Column("plain", "within"))
        assert {re.search(r"\d+ frames", answer.key)[0] for answer in within} == {
            f"{n} frames" for n in (8, 16, 24)
        }

    def test_different_grids_are_not_ranked(self, tmp_path):
        needle = fake_needle("tad", 0)
        write_run(tmp_path / "0", "tad", 0, needle)
        other = fake_needle("mrope", 0)
        other["conditions"]["plain"]["cells"][0]["frames"] = 999
        write_run(tmp_path / "1", "mrope", 0, other)
        ranking = ranked(tmp_path)
        assert ranking.unlike == ["the runs have 360 cells, of which 359 are common"]
        assert not ranking.comparisons
        assert all(row.places is None for row in ranking.rows)
        for path in write_report(load_runs([tmp_path]), tmp_path):
            assert "not ranked, because" in path.read_text()
            assert "Which is better?" not in path.read_text()

    def test_the_interval_draws_needles(self):
        cells = [Answer(f"{d} {n}", float(n > 2), str(n)) for d in DEPTHS for n in range(6)]
        score = tables.score([cells, cells])
        assert score
        assert score.interval == pytest.approx(bootstrap_interval([0, 0, 0, 1, 1, 1]))


@pytest.fixture(scope="module")
def ablation(tmp_path_factory) -> Path:
    return write_ablation(tmp_path_factory.mktemp("ablation"))


class TestScores:
    def test_an_ablation_is_ranked_by_its_scores(self, ablation):
        ranking = ranked(ablation)
        assert ranking.metric == "mc_generated"
        best = [row.group.label for row in ranking.rows]
        assert all("rotary=videorope" in label for label in best[:2])
        row = ranking.rows[0]
        lines = [
            json.loads(line)
            for run in row.group.runs
            for line in (run.folder / "answers" / "step-00000120.jsonl").read_text().splitlines()
        ]
        by_hand = [line["values"]["mc_generated"] for line in lines]
        assert row.overall.interval.mean == pytest.approx(np.mean(by_hand))
        order = [line["values"]["mc_generated"] for line in lines if line["category"] == "order"]
        assert row.scores[tables.Column("", "order")].interval.mean == pytest.approx(np.mean(order))
        blind = row.beside["blind"]
        over = row.over_null["blind"]
        assert over.mean == pytest.approx(np.mean(by_hand) - blind)

    def test_each_factor_is_averaged_over_the_others(self, ablation):
        effects = ranked(ablation).effects
        assert list(effects) == ["rotary", "pooler"]
        (rotary,), (pooler,) = effects.values()
        assert (rotary.first, rotary.second, rotary.sure) == ("videorope", "mrope", True)
        assert not pooler.sure
        means = {
            scheme: np.mean(
                [
                    np.mean([a.value for a in run.measured["mc_generated"].answers])
                    for run in load_runs([ablation])
                    if run.value("rotary") == scheme
                ]
            )
            for scheme in ("videorope", "mrope")
        }
        assert rotary.difference.mean == pytest.approx(means["videorope"] - means["mrope"])
        assert len(rotary.difference.by_run) == 6

    def test_the_headline_says_which_by_how_much_and_how_sure(self, ablation):
        text = tell(load_runs([ablation]))
        assert re.search(
            r"rotary: videorope is better than mrope, by 0\.\d\d, interval \[\+0", text
        )
        assert "pooler: average_2x2 and prompt_guided_2x2 cannot be told apart" in text
        assert "40 questions about 20 videos and 3 seeds" in text

    def test_one_seed_never_makes_a_ranking(self, tmp_path):
        ranking = ranked(write_ablation(tmp_path, seeds=(0,)))
        everything = [
            *ranking.comparisons,
            *(c for found in ranking.effects.values() for c in found),
        ]
        assert everything
        assert not any(c.sure for c in everything)
        assert {place(row) for row in ranking.rows} == {"-"}
        assert tell(load_runs([tmp_path])).startswith("One seed makes no ranking")
        html, markdown = write_report(load_runs([tmp_path]), tmp_path)
        assert "## Ranking" not in markdown.read_text()
        assert "one seed" in html.read_text()

    def test_equal_answers_allow_no_claim_about_small_differences(self, tmp_path):
        for name in ("tad", "mrope"):
            for seed in (0, 1):
                folder = write_run(tmp_path / f"{name}{seed}", name, seed)
                write_answers(folder, seed, {"colour": 9.0})  # always right
        html, _ = write_report(load_runs([tmp_path]), tmp_path)
        assert "no difference varies" in html.read_text()
        assert "of about 0.00" not in html.read_text()

    def test_a_setting_with_one_seed_is_shown_beside_the_others_and_not_ranked(self, tmp_path):
        write_ablation(tmp_path)
        folders = [f"mrope-average_2x2-seed{seed}" for seed in (1, 2)]
        for folder in folders:
            shutil.rmtree(tmp_path / folder)
        ranking = ranked(tmp_path)
        assert not ranking.one_seed
        once = ranking.rows[-1]
        assert len(once.overall.seeds) == 1
        assert [place(row) for row in ranking.rows].count("-") == 1
        assert place(once) == "-"
        assert any(c.sure for c in ranking.comparisons)
        assert once.group.label not in {c.second for c in ranking.comparisons}
        notes = cautions(load_runs([tmp_path]), ranking)
        assert f"{once.group.label} has one seed, so it is not ranked." in notes
        assert not tell(load_runs([tmp_path])).startswith("One seed")

    def test_seeds_that_were_asked_about_other_samples_are_shown_and_not_ranked(self, tmp_path):
        write_ablation(tmp_path)
        for path in (tmp_path / "mrope-average_2x2-seed1" / "answers").iterdir():
            lines = path.read_text().splitlines(keepends=True)
            path.write_text("".join(lines[:12]))
        html, _ = write_report(load_runs([tmp_path]), tmp_path)
        assert "not ranked" in html.read_text()

    def test_another_metric_is_ranked_on_request_and_lower_may_be_better(self, ablation):
        ranking = ranked(ablation, LOSS)
        means = [row.overall.interval.mean for row in ranking.rows]
        assert means == sorted(means)
        assert ranking.with_best[0].difference.mean > 0
        tokens = [a for a in ranking.example.answers if a.weight == 2.0]
        assert len(tokens) == 40
        with pytest.raises(ValueError, match="no run has a metric 'accuracy'; there are: mc_gen"):
            ranked(ablation, "accuracy")

    def test_runs_that_were_scored_in_other_ways_are_not_ranked(self, tmp_path):
        write_ablation(tmp_path)
        path = tmp_path / "mrope-average_2x2-seed0" / "scores.json"
        scores = json.loads(path.read_text())
        scores[0]["scores"][0]["parser"] = "parse_letter 1"
        path.write_text(json.dumps(scores))
        assert ranked(tmp_path).unlike == ["parser differs: parse_letter 1 | parse_letter 2"]
        scores[0]["scores"][0]["parser"] = "parse_letter 2"
        scores[0]["frames"] = {"num_frames": 4}
        path.write_text(json.dumps(scores))
        assert ranked(tmp_path).unlike == ['frames differs: {"num_frames": 4} | {"num_frames": 8}']
        assert "not ranked" in tell(load_runs([tmp_path]))

    def test_a_factor_may_change_what_a_model_reads(self, tmp_path):
        for frames in (4, 8):
            for seed in (0, 1):
                folder = write_run(tmp_path / f"{frames}-{seed}", "videorope", seed)
                words = [f"data.frames.sampler.num_frames={frames}", f"seed={seed}"]
                (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(words))
                write_answers(folder, seed, {"colour": 0.5})
                path = folder / "scores.json"
                path.write_text(
                    path.read_text().replace('"num_frames": 8', f'"num_frames": {frames}')
                )
        assert not ranked(tmp_path).unlike

    def test_a_model_no_better_than_blind_is_pointed_out(self, tmp_path):
        for seed in (0, 1):
            folder = write_run(tmp_path / str(seed), "tad", seed)
            write_answers(folder, seed, {"colour": 0.25})
        html, _ = write_report(load_runs([tmp_path]), tmp_path)
        assert "tad: no better than without frames" in html.read_text()

    def test_a_condition_that_is_not_known_is_shown(self, tmp_path):
        folder = write_run(tmp_path / "0", "tad", 0)
        write_answers(folder, 0, {"colour": 0.5}, ("full", "one_frame"))
        for path in write_report(load_runs([tmp_path]), tmp_path):
            assert "one_frame" in path.read_text()

    def test_the_last_validation_counts(self, tmp_path):
        folder = write_run(tmp_path / "0", "tad", 0)
        write_answers(folder, 0, {"colour": 0.5})
        earlier = folder / "answers" / "step-00000040.jsonl"
        earlier.write_text((folder / "answers" / "step-00000120.jsonl").read_text()[:10])
        assert load_run(folder).scored_at == 120

    def test_the_widest_disagreements_are_shown_with_all_answers(self, ablation):
        html, markdown = (
            path.read_text() for path in write_report(load_runs([ablation]), ablation)
        )
        ranking = ranked(ablation)
        by_sample: dict[str, dict[str, list[float]]] = {}
        for row in ranking.rows:
            for run in row.group.runs:
                for answer in run.measured["mc_generated"].answers:
                    said = by_sample.setdefault(answer.key, {})
                    said.setdefault(row.group.label, []).append(answer.value)
        spread = {
            key: max(map(np.mean, said.values())) - min(map(np.mean, said.values()))
            for key, said in by_sample.items()
        }
        widest = sorted(spread, key=lambda key: (-spread[key], key))[:8]
        for text in (html, markdown):
            places = [text.index(key) for key in widest]
            assert places == sorted(places)
        assert "A (3 x)" in html

    def test_frames_of_a_disagreement_have_the_colours_of_the_video(self, tmp_path):
        """Red and blue videos are red and blue on the page."""
        samples = []
        for name, colour in (("red", (230, 20, 20)), ("blue", (20, 20, 230))):
            video = encode_video([Image.new("RGB", (64, 48), colour)] * 4)
            samples.append((name, {"mp4": video, "json": b"{}"}))
        write_shard(tmp_path / "val" / "shard-000000.tar", samples)
        for seed in (0, 1):
            folder = write_run(tmp_path / "runs" / str(seed), "tad", seed)
            write_answers(folder, seed, {"colour": 0.5})
            path = folder / "answers" / "step-00000120.jsonl"
            lines = [json.loads(line) for line in path.read_text().splitlines()][:2]
            named = [{**x, "key": f"shard-000000.tar/{n}"} for x, n in zip(lines, ("red", "blue"))]  # noqa: B905
            path.write_text("".join(json.dumps(line) + "\n" for line in named))
            config = folder / "config.yaml"
            config.write_text(f"{config.read_text()}data: {{val: {tmp_path / 'val'}}}\n")
        runs = load_runs([tmp_path / "runs"])
        groups = tables.group_runs(runs, ["seed"])
        found = disagreements(tables.rank(groups, ["seed"], "mc_generated"), groups)
        assert {one.key.rpartition("/")[2] for one in found} == {"red", "blue"}
        for one in found:
            data = b64decode(one.frames.removeprefix("data:image/jpeg;base64,"))
            picture = Image.open(BytesIO(data)).convert("RGB")
            assert picture.size == (6 * 96, 96)
            red, _, blue = picture.getpixel((200, 48))
            assert (red > 180 > 80 > blue) if one.key.endswith("red") else (blue > 180 > 80 > red)

    def test_a_needle_of_a_disagreement_is_the_one_that_was_asked_for(self, tmp_path):
        """Needles are taken from each question in turn, as the test itself takes them."""
        write_demo(tmp_path / "data")
        folder = write_run(tmp_path / "run", "tad", 0, fake_needle("tad", 0))
        shards = f"{{needles: {{test: {tmp_path / 'data' / 'needles-test.tar'}}}}}"
        config = folder / "config.yaml"
        config.write_text(f"{config.read_text()}data: {{shards: {shards}, grid: {{needles: 6}}}}\n")
        groups = tables.group_runs(load_runs([folder]), [])
        found = disagreements(tables.rank(groups, [], NEEDLES), groups)
        assert len(found) == 8
        for one in found:
            colour = list(COLOURS)[int(one.key.rpartition(" ")[2])]
            assert one.prompt.startswith(f"Which digit is on the {colour} card?")
            assert one.right.startswith(colour)
            assert one.frames

    def test_shards_of_a_run_are_never_fetched_or_executed(self, tmp_path):
        folder = write_run(tmp_path / "run", "tad", 0)
        write_answers(folder, 0, {"colour": 0.5})
        config = folder / "config.yaml"
        mark = tmp_path / "executed"
        config.write_text(f"{config.read_text()}data: {{val: 'pipe:touch {mark}'}}\n")
        write_report(load_runs([folder]), tmp_path)
        assert not mark.exists()

    def test_answers_are_written_for_a_judge(self, ablation, tmp_path, capsys):
        run = ablation / "mrope-average_2x2-seed0"
        for name in ("pred.json", "pred.jsonl"):
            main([str(run), "--judge", str(tmp_path / name)])
        lines = json.loads((tmp_path / "pred.json").read_text())
        assert len(lines) == 40
        assert lines[0].keys() == {"id", "question", "answer", "pred"}
        assert lines[0]["answer"] == "A"
        assert [json.loads(x) for x in (tmp_path / "pred.jsonl").read_text().splitlines()] == lines
        with pytest.raises(SystemExit, match="--judge takes one run, but 12 are given"):
            main([str(ablation), "--judge", str(tmp_path / "pred.json")])
        with pytest.raises(SystemExit, match="has no generated answers"):
            main([str(write_run(tmp_path / "x", "tad", 0)), "--judge", str(tmp_path / "pred.json")])

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("answers/step-00000120.jsonl", '{"key": 1}\n', "step-00000120.jsonl, line 1: not an"),
            ("answers/step-00000120.jsonl", "[1]\n", "step-00000120.jsonl, line 1: not an answer"),
            ("scores.json", '[{"step": 1}]', "scores.json is not a list of validations"),
            ("scores.json", "{", "scores.json is not a list of validations"),
        ],
    )
    def test_a_broken_file_is_one_line(self, tmp_path, name, content, message):
        folder = write_run(tmp_path / "0", "tad", 0)
        write_answers(folder, 0, {"colour": 0.5})
        (folder / name).write_text(content)
        with pytest.raises(SystemExit, match=message):
            main([str(tmp_path)])

    def test_a_link_out_of_the_answers_is_not_followed(self, tmp_path):
        folder = write_run(tmp_path / "runs" / "0", "tad", 0)
        write_answers(folder, 0, {"colour": 0.5})
        path = folder / "answers" / "step-00000120.jsonl"
        path.rename(tmp_path / "secret")
        path.symlink_to(tmp_path / "secret")
        with pytest.raises(SystemExit, match="is a link to"):
            main([str(folder)])


class TestHeatmap:
    def test_each_cell_is_the_mean_of_its_answers_or_empty(self):
        cells = [Cell(8, 0.0, 0, True), Cell(8, 0.0, 1, False), Cell(16, 1.0, 0, True)]
        grid = cell_means(cells, [8, 16], [0.0, 1.0])
        np.testing.assert_array_equal(grid, [[0.5, np.nan], [np.nan, 1.0]])


class TestCanaries:
    @pytest.mark.parametrize(
        ("name", "key", "bad"),
        [
            ("blind", "interval", [0.3, 0.5]),
            ("ceiling", "interval", [0.15, 0.9]),
            ("sensitivity", "max_logit_change", 0.0),
        ],
    )
    def test_each_fails_on_its_own_fault(self, tmp_path, name, key, bad):
        needle = fake_needle("tad", 0)
        good = load_run(write_run(tmp_path / "good", "tad", 0, needle))
        needle["canaries"][name][key] = bad
        run = load_run(write_run(tmp_path / "bad", "tad", 0, needle))
        assert good.needle
        assert run.needle
        assert all(canary.passes(good.needle) for canary in tables.CANARIES)
        assert [c.name for c in tables.CANARIES if not c.passes(run.needle)] == [name]
        assert any(f"canary “{name}” fails" in note for note in cautions([run], None))


class TestPage:
    def test_nothing_is_loaded_from_elsewhere(self, page):
        parsed = Page(page[0])
        assert not parsed.open
        for tag, attributes in parsed.tags:
            assert tag not in {"script", "link", "iframe"}
            for name in ("src", "href", "srcset"):
                assert (attributes.get(name) or "data:").startswith("data:")
        assert "url(" not in page[0]

    def test_both_forms_say_the_same(self, page, sweep):
        html, markdown, _ = page
        rows = ranked(sweep).rows
        for text in (unescape(html), markdown):
            assert tell(load_runs([sweep])) in text
            assert "Ablation of rotary: 4 settings, 2 seeds" in text
            assert "ropelab-train -m experiment=vniah_d_tiny" in text
            for row in rows:
                assert f"{row.overall.interval.mean:.2f}" in text
            for canary in tables.CANARIES:
                assert canary.proves in text

    def test_the_pictures_of_the_markdown_exist(self, page):
        _, markdown, output = page
        names = re.findall(r"\]\((.+?)\)", markdown)
        assert len(names) == 5
        assert all((output / name).is_file() for name in names)

    def test_tables_of_the_markdown_are_whole(self, page):
        for block in page[1].split("\n\n"):
            if block.startswith("|"):
                assert len({line.count("|") for line in block.splitlines()}) == 1, block

    def test_the_same_runs_give_the_same_bytes(self, page, sweep, tmp_path):
        html, _ = write_report(load_runs([sweep]), tmp_path)
        assert html.read_text() == page[0]

    def test_a_run_without_result_is_shown_as_such(self, tmp_path):
        write_run(tmp_path / "0", "tad", 0, fake_needle("tad", 0))
        write_run(tmp_path / "1", "mrope", 0)
        (write_run(tmp_path / "2", "vanilla", 0) / "metrics.csv").unlink()
        for path in write_report(load_runs([tmp_path]), tmp_path):
            text = path.read_text()
            assert text.count("No result of") == 2
            assert "One seed: the order" not in text  # a row alone has no order
            assert "last step logged: 595" in text
            assert "not started" in text

    def test_a_run_that_failed_is_shown_as_such(self, tmp_path):
        write_run(tmp_path / "0", "tad", 0, fake_needle("tad", 0))
        (write_run(tmp_path / "1", "mrope", 0) / "status.json").write_text('{"state": "failed"}')
        for path in write_report(load_runs([tmp_path]), tmp_path):
            assert "the run failed (last step logged: 595)" in path.read_text()

    @pytest.mark.parametrize("tested", [True, False])
    def test_one_run_is_enough(self, tmp_path, capsys, tested):
        write_run(tmp_path / "run", "tad", 0, fake_needle("tad", 0) if tested else None)
        main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
        _, html, markdown = (Path(line) for line in capsys.readouterr().out.splitlines())
        assert "<h1>tad</h1>" in html.read_text()
        assert ("## Scores" in markdown.read_text()) == tested

    def test_what_a_model_says_cannot_change_the_page(self, tmp_path):
        folder = write_run(tmp_path / "run", "tad", 0, fake_needle("tad", 0))
        said = {"key": "a|b", "prompt": "p\nq", "answer": "1", "generated": "<script>x</script>"}
        (folder / "generations.jsonl").write_text(json.dumps(said) + "\n")
        html, markdown = write_report(load_runs([folder]), tmp_path)
        assert "<script" not in html.read_text()
        assert "| a\\|b | p q | 1 | &lt;script>x&lt;/script> |" in markdown.read_text()


class TestStages:
    def test_runs_in_a_row_are_a_picture_and_a_table(self, sweep, tmp_path, capsys):
        picture = tmp_path / "stages.png"
        main([str(sweep / "6"), str(sweep / "0"), "--stages", str(picture)])
        header, _, first, second, path = capsys.readouterr().out.splitlines()
        assert path == str(picture)
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert [header.count("|"), first.count("|")] == [6, 6]
        for line, name in ((first, "6"), (second, "0")):
            curves = load_run(sweep / name).curves
            spans = [f"{p[0][1]:.3f} → {p[-1][1]:.3f}" for p in curves.values()]
            assert line.startswith(f"| {name} | 596 | {spans[0]} | {spans[1]} |")
        assert not (sweep / "6" / "report.html").exists()

    def test_a_run_without_a_loss_is_one_line(self, tmp_path):
        folder = write_run(tmp_path / "run", "tad", 0)
        (folder / "metrics.csv").unlink()
        with pytest.raises(SystemExit, match=r"ropelab-report: .*/run: no metrics.csv"):
            main([str(folder), "--stages", str(tmp_path / "stages.png")])
        assert not (tmp_path / "stages.png").exists()
