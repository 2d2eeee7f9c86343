"""The report, on run folders with made-up numbers that no program has measured."""

import json
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from experiments.report import main, write_report
from experiments.reporting import tables as tables
from experiments.reporting.data import Cell, Run, load_run, load_runs
from experiments.reporting.plots import cell_means
from experiments.run.settings import factors
from lightning_modules.metrics.bootstrap import bootstrap_interval

TRAINED = (8, 24)
FRAMES = (8, 16, 24, 48, 96, 192)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
NEEDLES = 6
#: log2 of the frames at which half of the needles are lost
REACH = {"vanilla": 6.4, "tad": 5.6, "mrope": 7.0, "videorope": 8.2}


def fake_cells(reach: float, rng: np.random.Generator) -> list[dict]:
    hardness = rng.normal(0, 0.6, NEEDLES)
    cells = []
    for frames in FRAMES:
        for depth in DEPTHS:
            for needle in range(NEEDLES):
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
            "needles": NEEDLES,
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


class TestRanking:
    def test_scores_are_the_shares_counted_by_hand(self, sweep):
        runs = load_runs([sweep])
        rows = tables.rank(tables.group_runs(runs, ["rotary", "seed"]))
        assert [row.group.label for row in rows] == ["videorope", "mrope", "vanilla", "tad"]
        raw = [fake_needle("mrope", seed)["conditions"]["periodic"]["cells"] for seed in (0, 1)]
        beyond = [[c["correct"] for c in cells if c["frames"] > TRAINED[1]] for cells in raw]
        score = rows[1].scores[tables.Column("periodic", "beyond")]
        assert score.interval.mean == pytest.approx(np.mean(beyond))
        assert score.seeds == pytest.approx([np.mean(seed) for seed in beyond])

    def test_a_length_trained_on_is_not_beyond(self, sweep):
        run = load_runs([sweep / "0"])[0]
        within = tables.cells_of(run, tables.Column("plain", "within"))
        assert {cell.frames for cell in within} == {8, 16, 24}

    def test_overlapping_intervals_are_called_equal(self, sweep):
        rows = tables.rank(tables.group_runs(load_runs([sweep]), ["rotary", "seed"]))
        assert "do not overlap" in tables.headline([rows[0], rows[-1]])
        assert "cannot tell them apart" in tables.headline([rows[0], rows[0]])

    def test_different_grids_are_pointed_out(self, sweep):
        runs = load_runs([sweep])
        assert not tables.cautions(runs)
        needle = runs[0].needle
        assert needle
        needle.cells["plain"].append(Cell(999, 0.5, 0, True))
        assert any("different grids" in note for note in tables.cautions(runs))

    def test_the_interval_draws_needles(self):
        cells = [Cell(8, depth, needle, needle > 2) for depth in DEPTHS for needle in range(6)]
        score = tables.score([cells, cells])
        assert score
        assert score.interval == pytest.approx(bootstrap_interval([0, 0, 0, 1, 1, 1]))


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
        assert any(f"canary “{name}” fails" in note for note in tables.cautions([run]))


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
        rows = tables.rank(tables.group_runs(load_runs([sweep]), ["rotary", "seed"]))
        for text in (unescape(html), markdown):
            assert tables.headline(rows) in text
            assert "Ablation of rotary: 4 settings, 2 seeds" in text
            assert "ropelab-train -m experiment=vniah_d_tiny" in text
            for row in rows:
                assert f"{row.overall.interval.mean:.2f}" in text
            for canary in tables.CANARIES:
                assert canary.proves in text

    def test_the_pictures_of_the_markdown_exist(self, page):
        _, markdown, output = page
        names = re.findall(r"\]\((.+?)\)", markdown)
        assert len(names) == 4
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
            assert "One seed" in text
            assert "last step logged: 595" in text
            assert "not started" in text

    @pytest.mark.parametrize("tested", [True, False])
    def test_one_run_is_enough(self, tmp_path, capsys, tested):
        write_run(tmp_path / "run", "tad", 0, fake_needle("tad", 0) if tested else None)
        main([str(tmp_path / "run"), "--output", str(tmp_path / "out")])
        html, markdown = (Path(line) for line in capsys.readouterr().out.splitlines())
        assert "<h1>tad</h1>" in html.read_text()
        assert ("## Ranking" in markdown.read_text()) == tested

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
