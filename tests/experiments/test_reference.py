"""ropelab-reference: pairs with the log-probabilities of a model, and training on them."""

import json
import logging
from shutil import copytree

import pytest
import torch

from datamodules.shards.pack import write_shard
from datamodules.shards.synthetic import make_pair
from experiments import reference as program
from tests.helpers.pairs import read_shard, run, val_metrics, words_of, write_pairs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_pairs(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def words(shards):
    return words_of(shards)


@pytest.fixture(scope="module")
def whole(words, compose, tmp_path_factory):
    """A run of 4 steps against a frozen copy."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, words, compose)
    return folder


def judge_shards(folder, words, compose, output, *more):
    program.main.__wrapped__(compose([*words, f"output={output}", *more], folder, "reference"))


@pytest.fixture(scope="module")
def judged(words, compose, tmp_path_factory):
    """Returns the pairs with the log-probabilities of the model that `words` start from."""
    folder = tmp_path_factory.mktemp("judged")
    judge_shards(folder, words, compose, folder / "pairs")
    return folder / "pairs"


def test_training_on_streamed_log_probs_is_training_on_a_frozen_copy(
    whole, judged, words, compose, tmp_path
):
    streamed = [f"data.train={judged / 'train'}", f"data.val={judged / 'val'}"]
    run(tmp_path, [*words, *streamed, "module/reference=streamed"], compose)
    (expected,), (found,) = val_metrics(whole), val_metrics(tmp_path)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-4)
    ends = [
        torch.load(f / "checkpoints" / "last.ckpt", weights_only=True) for f in (whole, tmp_path)
    ]
    torch.testing.assert_close(ends[1]["state_dict"], ends[0]["state_dict"], rtol=0, atol=2e-4)


def test_the_program_changes_nothing_but_the_reference(judged, shards):
    for split, number in (("train", 0), ("train", 1), ("val", 0)):
        name = f"{split}/shard-{number:06d}.tar"
        before, after = read_shard(shards / name), read_shard(judged / name)
        assert [raw["__key__"] for raw in after] == [raw["__key__"] for raw in before]
        for then, now in zip(before, after, strict=True):
            entry = json.loads(now.pop("json"))
            made = entry.pop("reference")
            assert entry == json.loads(then.pop("json"))
            assert {**now, "__url__": ""} == {**then, "__url__": ""}
            assert made["chosen"] < 0 > made["rejected"]
            assert set(made["settings"]) == {
                *("model.encoder", "model.pooler", "model.rotary", "model.positions"),
                *("data.frames", "data.conversation"),
            }


def test_the_program_goes_on_with_the_shards_that_are_missing(
    judged, words, compose, tmp_path, monkeypatch
):
    output = tmp_path / "pairs"
    copytree(judged, output)
    lost = output / "train" / "shard-000001.tar"
    bytes_before = {path: path.read_bytes() for path in output.rglob("*.tar")}
    lost.unlink()
    written = []

    def noting(path, samples):
        written.append(path)
        write_shard(path, samples)

    monkeypatch.setattr(program, "write_shard", noting)
    judge_shards(tmp_path, words, compose, output)
    assert written == [lost]
    assert {path: path.read_bytes() for path in bytes_before} == bytes_before
    with pytest.raises(
        SystemExit, match=r"holds shards that were made with another data\.frames .* output="
    ):
        judge_shards(tmp_path, words, compose, output, "data.frames.sampler.num_frames=3")


def test_a_shard_that_is_cut_short_is_not_there(words, compose, tmp_path, monkeypatch):
    def cut(raw, sums, settings):
        raise OSError("no room")

    monkeypatch.setattr(program, "with_reference", cut)
    with pytest.raises(SystemExit, match="no room"):
        judge_shards(tmp_path, words, compose, tmp_path / "pairs")
    assert not list(tmp_path.rglob("*.tar"))


def test_a_bad_pair_keeps_its_place(words, compose, tmp_path, caplog):
    pairs = [(f"{n}", make_pair(n, 4)) for n in range(3)]
    pairs[1][1]["json"] = b"{}"
    write_shard(tmp_path / "bad" / "a.tar", pairs)
    output = tmp_path / "pairs"
    bad = [f"data.train={tmp_path / 'bad'}", "data.val=null"]
    with caplog.at_level(logging.WARNING):
        judge_shards(tmp_path, [*words, *bad], compose, output)
    after = read_shard(output / "train" / "shard-000000.tar")
    assert [raw["__key__"] for raw in after] == ["0", "1", "2"]
    assert [b"reference" in raw["json"] for raw in after] == [True, False, True]
    assert "left without a reference" in caplog.text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            ["pooler=average_2x2"],
            r"another model\.pooler \(\w{12}, but here \w{12}\).*ropelab-reference",
        ),
        (["rotary=tad"], r"another model\.rotary"),
        (["data.frames.sampler.num_frames=3"], r"another data\.frames"),
        (["data.conversation.max_length=512"], r"another data\.conversation"),
    ],
)
def test_log_probs_of_other_settings_are_refused(more, says, judged, words, compose, tmp_path):
    streamed = [f"data.train={judged / 'train'}", "data.val=null", "module/reference=streamed"]
    with pytest.raises(SystemExit, match=says) as caught:
        run(tmp_path, [*words, *streamed, *more], compose)
    assert "\n" not in str(caught.value)


def test_shards_without_log_probs_are_refused(words, compose, tmp_path):
    with pytest.raises(SystemExit, match=r"no reference log-prob.*ropelab-reference"):
        run(tmp_path, [*words, "module/reference=streamed"], compose)
