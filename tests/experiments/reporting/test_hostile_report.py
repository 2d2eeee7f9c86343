"""Texts from runs are shown as text, whoever made them, and no result is left out."""

import json
import re

import pytest
import yaml

from experiments import dashboard, runs
from experiments.report import fenced, file_names, main, table_cell
from experiments.reporting import tables as tables
from experiments.reporting.data import load_run, load_runs
from experiments.reporting.measured import NEEDLES
from experiments.run.files import inside, printable
from experiments.run.read import read_runs
from tests.experiments.reporting.test_report import Page, fake_needle, write_run

XSS = "<script>alert(1)</script><img src=x onerror=alert(2)>`$x_{| [a](javascript:b) \x1b[31m"


@pytest.fixture
def hostile(tmp_path):
    """A run with the same hostile text in every place."""
    needle = fake_needle("tad", 0)
    needle |= {"run": XSS, "rotary": XSS}
    needle["conditions"][f"../../{XSS}"] = needle["conditions"]["plain"]
    folder = write_run(tmp_path / "runs" / "0", "tad", 0, needle)
    row = dict.fromkeys(("key", "prompt", "answer", "generated"), XSS)
    (folder / "generations.jsonl").write_text(json.dumps(row) + "\n")
    (folder / "command.txt").write_text(f"ropelab-train\n```\n{XSS}")
    words = [f"+{XSS}={XSS}", "rotary=tad"]
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.safe_dump(words))
    (folder / "versions.json").write_text(json.dumps({"versions": {XSS: XSS}, "git_commit": XSS}))
    write_run(tmp_path / "other", "mrope", 0).rename(folder.parent / XSS.replace("/", ""))
    return folder.parent


def test_what_a_run_says_is_text_in_the_page(hostile, capsys):
    main([str(hostile)])
    html, markdown = ((hostile / f"report.{kind}").read_text() for kind in ("html", "md"))
    tags = [tag for tag, _ in Page(html).tags]
    assert "script" not in tags
    assert not [a for tag, a in Page(html).tags if tag == "img" and a.get("src") == "x"]
    assert "&lt;script&gt;" in html
    outside = re.sub(r"^(`{3,})\n.*?^\1$", "", markdown, flags=re.DOTALL | re.MULTILINE)
    assert "<script" not in outside
    assert "](javascript:" not in outside
    assert XSS.splitlines()[0][:20] in markdown, "inside a code block it is unchanged"
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["runs"]


def test_a_fence_and_a_cell_end_where_they_should():
    assert fenced("a\n```\nb").splitlines()[0] == fenced("a\n```\nb").splitlines()[-1] == "````"
    assert fenced("a") == "```\na\n```"
    assert table_cell("a|b\n`c` <d> [e](f) \\|") == "a\\|b \\`c\\` &lt;d> [e]\\(f) \\\\\\|"


def test_names_of_pictures_are_files_of_their_folder():
    names = file_names(["accuracy", "heatmap-a/b", "heatmap-a_b", "heatmap-../../x"])
    assert names["accuracy"] == "accuracy.svg"
    assert len(set(names.values())) == 4
    assert not [name for name in names.values() if "/" in name or ".." in name]


FILES = ["command.txt", "config.yaml", "generations.jsonl", "metrics.csv", "versions.json"]


@pytest.mark.parametrize("name", [*FILES, "needle.json", ".hydra/overrides.yaml"])
def test_a_link_out_of_the_run_is_not_shown(name, tmp_path):
    folder = write_run(tmp_path / "runs" / "0", "tad", 0, fake_needle("tad", 0))
    secret = tmp_path / "secret"
    secret.write_text("s3cret: 1")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(secret)
    with pytest.raises(SystemExit, match="is a link to") as caught:
        main([str(folder.parent)])
    assert "s3cret" not in str(caught.value)
    if name in ("config.yaml", ".hydra/overrides.yaml"):
        (state,) = read_runs([folder])
        assert name.startswith("config") or state.state == "damaged"


@pytest.mark.parametrize("name", ["report.html", "report.md", "report_files"])
def test_a_link_is_not_written_through(name, tmp_path):
    folder = write_run(tmp_path / "runs" / "0", "tad", 0, fake_needle("tad", 0))
    precious = tmp_path / "precious"
    precious.mkdir() if name == "report_files" else precious.write_text("mine")
    (folder.parent / name).symlink_to(precious)
    with pytest.raises(SystemExit, match="is a link to"):
        main([str(folder.parent)])
    assert list(precious.iterdir()) == [] if precious.is_dir() else precious.read_text() == "mine"


def test_a_dashboard_is_not_written_through_a_link(tmp_path, capsys):
    folder = write_run(tmp_path / "runs" / "0", "tad", 0)
    (tmp_path / "precious").write_text("mine")
    (folder.parent / "dashboard.json").symlink_to(tmp_path / "precious")
    assert dashboard.main([str(folder.parent)]) == 2
    assert "is a link to" in capsys.readouterr().err
    assert (tmp_path / "precious").read_text() == "mine"


def test_links_inside_of_a_run_are_good(tmp_path):
    folder = write_run(tmp_path / "runs" / "0", "tad", 0)
    (folder / "metrics.csv").rename(folder / "real.csv")
    (folder / "metrics.csv").symlink_to("real.csv")
    (tmp_path / "picked").symlink_to(folder)
    assert load_run(tmp_path / "picked").curves
    (folder / "loop").symlink_to("loop")
    with pytest.raises(ValueError, match="leads nowhere"):
        inside(folder, "loop")


def test_a_terminal_is_not_commanded_by_what_is_listed(hostile, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")  # wide enough for the names of directories
    (hostile / "0" / "status.json").write_text(
        json.dumps({"state": "failed", "reason": "\x1b]0;title\x07 a\nb", "time": 0, "starts": 1})
    )
    (hostile / "a[b]c\x1b[2J").mkdir()
    (hostile / "a[b]c\x1b[2J" / "config.yaml").write_text("a: 1")
    assert runs.main([str(hostile)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\x07" not in out
    assert "a[b]c" in out
    assert printable("a\x1b[1m\nb é") == "a\ufffd[1m b é"


def test_every_condition_is_shown_whatever_its_name(tmp_path):
    """Its scores, its maps and its curve are shown. The means count it as well."""
    needle = fake_needle("tad", 0)
    crowd = [{**cell, "correct": True} for cell in needle["conditions"]["plain"]["cells"]]
    needle["conditions"]["crowd"] = {"cells": crowd, "mean": 1.0, "interval": [1.0, 1.0]}
    needle["conditions"]["empty"] = {"cells": [], "mean": 0.0, "interval": [0.0, 0.0]}
    write_run(tmp_path / "0", "tad", 0, needle)
    groups = tables.group_runs(load_runs([tmp_path]), ["rotary"])
    assert list(tables.conditions_of(groups)) == ["plain", "periodic", "crowd"]
    (row,) = tables.rank(groups, ["rotary"], NEEDLES).rows
    assert row.scores[tables.Column("crowd", "beyond")].interval.mean == 1.0
    plain, periodic = (needle["conditions"][name]["cells"] for name in ("plain", "periodic"))
    found = sum(cell["correct"] for cell in (*plain, *periodic, *crowd))
    assert row.overall.interval.mean == pytest.approx(found / (3 * len(plain)))
    main([str(tmp_path)])
    html = (tmp_path / "report.html").read_text()
    assert re.search(r'<th class="span" colspan="2">crowd</th>', html)
    assert "<h3>crowd</h3>" in html
    markdown = (tmp_path / "report.md").read_text()
    assert "crowd, beyond it" in markdown
    assert "(report_files/heatmap-crowd.svg)" in markdown
    assert (tmp_path / "report_files" / "heatmap-crowd.svg").is_file()
