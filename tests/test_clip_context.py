"""Post-training of CLIP's text context: what is trained, by which loss, on how many ranks."""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from lightning import Callback, LightningDataModule
from torch.nn.functional import normalize
from torchmetrics.retrieval import RetrievalRecall
from transformers import CLIPConfig, CLIPModel

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, BadSampleError, VideoBatch, pad_rows
from datamodules.captions import CaptionEncoder
from datamodules.conversation import parse_sample
from datamodules.synthetic_captions import KINDS, make_captioned
from datamodules.tokenizer import tiny_tokenizer
from experiments import evaluate, train
from experiments.report_data import read_curves
from experiments.run import build, plain
from lightning_modules.clip_context import ClipContextModule, ContrastiveClip, contrast
from lightning_modules.encoder.clip import normalise
from lightning_modules.metrics.retrieval import Retrieval
from lightning_modules.video_llm import VideoLLMModule
from lightning_modules.weights import read_checkpoint

TEXT = {
    "vocab_size": 64,
    "hidden_size": 24,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
ENCODER = {"_target_": "lightning_modules.encoder.clip.ClipEncoder"}


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A CLIP model, and the folder that holds it as the hub would."""
    torch.manual_seed(7)
    model = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    return model.eval(), str(folder)


def from_source(folder, **arguments):
    spec = ENCODER | {"source": folder, "feature_layer": -1} | arguments
    return ContrastiveClip(spec, temperature=math.exp(-2.6592))


def make_batch(numbers, counts=(1, 1, 3, 1), length=12, vocabulary=64, size=16):
    """A row for each number, the same whichever rows are beside it; `counts` frames in turn."""
    rows, frames = [], []
    for number in numbers:
        rng = torch.Generator().manual_seed(number)
        words = torch.randint(2, vocabulary, (length - number % 4,), generator=rng).tolist()
        rows.append([0, *words, 1])
        shape = (counts[number % len(counts)], 3, size, size)
        frames.append(torch.randint(0, 256, shape, generator=rng, dtype=torch.uint8))
    one = torch.ones(len(rows), 1, dtype=torch.long)
    return VideoBatch(
        input_ids=one * VISUAL_SLOT,
        attention_mask=one.bool(),
        labels=one * IGNORE_INDEX,
        frames=torch.cat(frames),
        frame_counts=[len(visual) for visual in frames],
        prompt_ids=pad_rows(rows, 1),
        prompt_mask=pad_rows([[1] * len(row) for row in rows], 0).bool(),
        keys=[f"s.tar/{number}" for number in numbers],
    )


# The network


def test_images_and_captions_are_compared_as_clip_compares_them(clip):
    """At CLIP's own 77 positions; the loss is CLIP's too."""
    model, folder = clip
    batch = make_batch(range(6), counts=[1])
    network = from_source(folder, context_length=None).eval()
    with torch.no_grad():
        pairs = network(batch)
        pixels = normalise(batch.frames)
        ids, mask = batch.prompt_ids, batch.prompt_mask.long()
        expected = model(input_ids=ids, attention_mask=mask, pixel_values=pixels, return_loss=True)
    logits = pairs.scale * pairs.visuals @ pairs.captions.T
    torch.testing.assert_close(logits, expected.logits_per_image, atol=1e-4, rtol=1e-4)
    loss = contrast(pairs, pairs.visuals, pairs.captions, rank=0)
    torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-5)
    assert logits.std() > 0.1, "all pairs look alike, so that nothing was compared"


def test_a_video_is_the_mean_of_its_frames(clip):
    network = from_source(clip[1], context_length=None).eval()
    batch = make_batch(range(4), counts=[2])
    with torch.no_grad():
        pairs = network(batch)
        tokens = network.encoder.hidden_state(batch.frames, [1] * 8)[:, 0]
        frames = normalize(network.encoder.align(tokens), dim=-1)
    torch.testing.assert_close(pairs.visuals, normalize(frames[0::2] + frames[1::2], dim=-1))


def test_a_row_without_a_visual_is_refused(clip):
    batch = make_batch(range(2))
    batch.input_ids[0], batch.frames, batch.frame_counts = 5, batch.frames[:1], [1]
    with pytest.raises(ValueError, match=r"^1 visuals for 2 captions: .*data=captions"):
        from_source(clip[1])(batch)


def test_only_clip_has_a_context_to_train():
    spec = {"_target_": "lightning_modules.rotary.tad.TadRope"}
    with pytest.raises(ValueError, match=r"^model\.encoder is TadRope, .*encoder=clip_large_336"):
        ContrastiveClip(spec, 0.01)


# What is trained


def test_stretching_keeps_the_pretrained_words_and_first_positions(clip):
    """PPLLaVA's released code makes new, random token embeddings where it stretches."""
    model, folder = clip
    embeddings = from_source(folder, context_length=248).encoder.text.embeddings
    trained = model.text_model.embeddings
    assert torch.equal(embeddings.token_embedding.weight, trained.token_embedding.weight)
    positions = embeddings.position_embedding
    assert torch.equal(positions.kept, trained.position_embedding.weight[:20])
    assert torch.equal(positions.stretched[::4], trained.position_embedding.weight[20:])


def test_gradients_reach_the_stretched_positions_and_not_the_kept_ones(clip):
    spec = ENCODER | {"source": clip[1], "feature_layer": -1, "context_length": 248}
    network = ContrastiveClip(spec, 0.01)
    pairs = network(make_batch(range(4), length=200))
    contrast(pairs, pairs.visuals, pairs.captions, rank=0).backward()
    text = network.encoder.text
    positions = text.embeddings.position_embedding
    assert positions.kept.grad is None
    read = positions.stretched.grad.abs().sum(1) > 0
    assert read[: 199 - 20].all()  # the shortest caption has 199 tokens
    assert not read[202 - 20 :].any()
    assert text.embeddings.token_embedding.weight.grad.abs().sum() > 0
    assert all(p.grad is not None for p in text.encoder.parameters())
    vision = [*network.encoder.vision.parameters(), network.encoder.visual_projection.weight]
    assert all(p.grad is not None for p in vision)


# Retrieval


def random_pairs(count, seed=0, noise=3.0):
    rng = torch.Generator().manual_seed(seed)
    visuals = torch.randn(count, 16, generator=rng)
    captions = visuals + noise * torch.randn(count, 16, generator=rng)
    return normalize(visuals, dim=-1), normalize(captions, dim=-1)


def retrieve(visuals, captions, size, keys=None, metric=None):
    metric = metric or Retrieval()
    keys = keys or [f"{n}" for n in range(len(visuals))]
    for at in range(0, len(visuals), size):
        part = slice(at, at + size)
        metric.update(visuals[part], captions[part], keys[part], torch.tensor([10.0]))
    return {name: score.item() for name, score in metric.compute().items()}


def test_recall_is_that_of_torchmetrics():
    visuals, captions = random_pairs(40)
    scores = retrieve(visuals, captions, 7)
    rows = torch.arange(40)[:, None].expand(40, 40)
    for name, similar in (("t2i", captions @ visuals.T), ("i2t", visuals @ captions.T)):
        for rank in (1, 5, 10):
            recall = RetrievalRecall(top_k=rank)
            expected = recall(similar.flatten(), (rows == rows.T).flatten(), rows.flatten())
            assert scores[f"{name}_r{rank}"] == pytest.approx(expected.item())
    assert 0.1 < scores["t2i_r1"] < scores["t2i_r5"] < scores["t2i_r10"] < 1


def test_recall_does_not_depend_on_batches_or_repetition():
    visuals, captions = random_pairs(40)
    whole = retrieve(visuals, captions, 40)
    assert retrieve(visuals, captions, 1) == pytest.approx(whole)
    again = torch.cat([visuals, visuals[:9]]), torch.cat([captions, captions[:9]])
    keys = [f"{n % 40}" for n in range(49)]
    assert retrieve(*again, 12, keys) == pytest.approx(whole)


def test_ranks_with_other_numbers_of_pairs_find_what_one_finds(run_ranks):
    visuals, captions = random_pairs(40)
    whole = retrieve(visuals, captions, 40)

    def run(rank):
        torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
        mine = slice(0, 25) if rank else slice(20, 40)  # five of them on both
        keys = [f"{n}" for n in range(40)][mine]
        return retrieve(visuals[mine], captions[mine], 10, keys)

    for scores in run_ranks(2, run):
        assert scores == pytest.approx(whole)


@pytest.mark.parametrize("value", [1.0, math.nan])
def test_a_collapsed_model_finds_nothing(value):
    same = torch.full((30, 16), value)
    scores = retrieve(same, same, 30)
    assert {scores[f"t2i_r{rank}"] for rank in (1, 5, 10)} == {0.0}


# Data


def test_a_caption_fills_the_context_and_keeps_its_end():
    words = "red " * 300
    raw = {"json": json.dumps({"caption": words}).encode(), "jpg": b""}
    turns, suffixes = parse_sample(raw)
    encoded = CaptionEncoder(max_prompt_length=248)(turns)
    assert suffixes == ["jpg"]
    assert encoded.input_ids == [VISUAL_SLOT]
    assert encoded.labels == [IGNORE_INDEX]
    assert len(encoded.prompt_ids) == 248
    assert encoded.prompt_ids[-1] == tiny_tokenizer().eos_token_id
    assert len(CaptionEncoder(max_prompt_length=77)(turns).prompt_ids) == 77


def test_the_caption_of_a_conversation_is_its_answers_alone():
    texts = ["<video>\nDescribe it.", "A red bike.", "And?", "A dog."]
    roles = ["human", "gpt"] * 2
    entry = {"conversations": [{"from": r, "value": t} for r, t in zip(roles, texts, strict=True)]}
    turns, _ = parse_sample({"json": json.dumps(entry).encode(), "mp4": b""})
    ids = CaptionEncoder()(turns).prompt_ids
    assert tiny_tokenizer().decode(ids, skip_special_tokens=True) == "A red bike. A dog."


@pytest.mark.parametrize("names", [[], ["0.jpg", "1.jpg"]])
def test_a_caption_has_one_visual(names):
    turns = [{"from": "human", "value": "<image>" * len(names)}, {"from": "gpt", "value": "A dog."}]
    raw = {"json": json.dumps({"conversations": turns}).encode(), **dict.fromkeys(names, b"")}
    with pytest.raises(BadSampleError, match=f"not_one_visual: {len(names)} visuals"):
        CaptionEncoder()(parse_sample(raw)[0])


def test_a_caption_that_is_no_text_is_a_bad_sample():
    with pytest.raises(BadSampleError, match="missing_field"):
        parse_sample({"json": b'{"caption": null}', "jpg": b""})


def test_synthetic_captions_tell_only_behind_the_77th_token():
    tokenizer = tiny_tokenizer()
    for seed in range(0, len(KINDS), 9):
        turns, _ = parse_sample(make_captioned(seed, num_frames=2))
        ids = CaptionEncoder(max_prompt_length=248)(turns).prompt_ids
        shape, color, ground = KINDS[seed]
        before, behind = tokenizer.decode(ids[:77]), tokenizer.decode(ids[77:])
        assert len(ids) < 248
        assert f"{color} {shape} is in front of {ground}." in behind
        assert not any(f" {word}" in before for word in (shape, color, ground))


# Ranks

#: With a large eps, as AdamW else makes whole steps of the rounding where a gradient is zero.
SMALL = [
    "experiment=clip_context_tiny",
    "model.encoder.image_size=32",
    "model.encoder.config.vision.patch_size=8",
    "model.encoder.config.vision.hidden_size=32",
    "model.encoder.config.vision.intermediate_size=192",
    "model.encoder.config.vision.num_attention_heads=2",
    "model.encoder.config.vision.num_hidden_layers=2",
    "model.encoder.config.text.hidden_size=32",
    "optim.optimizer.lr=2.0e-3",
    "+optim.optimizer.eps=3.0e-2",
]
STEPS, ROWS = 20, 8  # rows of a global batch


class Share:
    """Batches of the rows given, made anew each time."""

    def __init__(self, parts):
        self._parts = parts

    def __len__(self):
        return len(self._parts)

    def __iter__(self):
        for numbers in self._parts:
            yield make_batch(numbers, length=90, vocabulary=2000, size=32)


class Batches(LightningDataModule):
    """Rank r has its share of the rows of each step, in the order of the ranks."""

    def __init__(self, rows):
        super().__init__()
        self.batch_size, self.global_batch_size = rows, ROWS

    def train_dataloader(self):
        world, rank, rows = self.trainer.world_size, self.trainer.global_rank, self.batch_size
        assert world * rows == ROWS
        starts = [step * ROWS + rank * rows for step in range(STEPS)]
        return Share([range(start, start + rows) for start in starts])

    def val_dataloader(self):
        """Of 15 rows; a rank that has one batch less repeats the first."""
        parts = [range(900, 906), range(906, 912), range(912, 915), range(900, 906)]
        world, rank = self.trainer.world_size, self.trainer.global_rank
        return Share(parts[rank::2] if world > 1 else parts[:3])


class Losses(Callback):
    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen.append(trainer.callback_metrics["train/loss"].item())


@pytest.fixture(scope="module")
def fit(compose):
    def run(folder, world, *overrides):
        config = compose([*SMALL, *overrides, f"trainer.devices={world}"], folder)
        torch.manual_seed(0)
        optimizer = build(config.optim.optimizer, "optim")
        module = ClipContextModule(plain(config.model), optimizer, temperature=0.07)
        losses = Losses()
        options = {"enable_progress_bar": False, "enable_model_summary": False}
        trainer = build(
            config.trainer,
            "trainer",
            callbacks=[losses],
            logger=False,
            enable_checkpointing=False,
            max_epochs=1,
            **options,
        )
        trainer.fit(module, datamodule=Batches(ROWS // world))
        metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k[:4] == "val/"}
        return losses.seen, metrics, whole(module)

    return run


def whole(module):
    """Weights as every rank can see them."""
    with torch.no_grad():
        return {
            name: (p.full_tensor() if hasattr(p, "full_tensor") else p).clone()
            for name, p in module.named_parameters()
        }


@pytest.fixture(scope="module")
def alone(fit, tmp_path_factory):
    return fit(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("trainer", ["ddp_sim", "fsdp_sim"])
def test_two_ranks_contrast_what_one_process_contrasts(trainer, fit, alone, run_ranks, tmp_path):
    losses, metrics, weights = alone
    assert len(losses) == STEPS
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    for seen, found, after in run_ranks(2, lambda rank: fit(tmp_path, 2, f"trainer={trainer}")):
        torch.testing.assert_close(seen, losses, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(after, weights, rtol=0, atol=1e-6)
        assert found == pytest.approx(metrics, abs=1e-4)
    assert metrics.keys() >= {"val/loss", "val/t2i_r1", "val/i2t_r10"}


# The program

QUIET = [
    "logger=csv",
    "print_config=false",
    "callbacks.progress=null",
    "+trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
]
RUN = [
    *SMALL,
    *QUIET,
    "prepare.counts={train: [16], val: [6]}",
    "data.global_batch_size=4",
    "data.batch_size=4",
    "data.stream.num_workers=0",
    "trainer.max_epochs=2",
    "callbacks.checkpoint.every_n_steps=2",
]


def run_train(compose, folder, *overrides):
    train.main.__wrapped__(compose([*RUN, *overrides], folder))


@pytest.fixture(scope="module")
def done(compose, tmp_path_factory) -> Path:
    """A run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("done")
    run_train(compose, folder)
    return folder


def test_micro_batches_that_would_not_see_each_other_are_refused(compose, tmp_path):
    line = r"size=8 with data\.batch_size=4 on 1 ranks are 2 micro-batches .*=8, or .*_size=4$"
    with pytest.raises(SystemExit, match=line):
        run_train(compose, tmp_path, "data.global_batch_size=8")


def test_a_run_leaves_its_recall_and_an_encoder_that_others_start_from(done):
    result = json.loads((done / "done.json").read_text())
    assert result["steps"] == 8
    assert {f"val/{way}_r{rank}" for way in ("t2i", "i2t") for rank in (1, 5, 10)} | {
        "train/loss",
        "val/loss",
    } == result["metrics"].keys()
    assert not (done / "generations.jsonl").exists()
    assert "train/tokens_per_s" in read_curves(done / "metrics.csv")
    checkpoint = read_checkpoint(done / "checkpoints" / "last.ckpt")
    assert checkpoint["stages"].keys() == {"encoder"}
    assert checkpoint["stages"]["encoder"]["context_length"] == 248
    names = checkpoint["state_dict"].keys()
    assert {name.split(".")[1] for name in names} == {"encoder", "logit_scale"}
    assert (done / "checkpoints" / "best.ckpt").exists()


def test_a_killed_run_goes_on_to_the_same_weights(done, compose, tmp_path, monkeypatch):
    step = ClipContextModule.training_step

    def die(self, batch, batch_idx):
        if self.global_step == 5:
            raise RuntimeError("killed")
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(ClipContextModule, "training_step", die)
        with pytest.raises(RuntimeError, match="killed"):
            run_train(compose, tmp_path)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 4
    run_train(compose, tmp_path)
    cut, undisturbed = (json.loads((f / "done.json").read_text()) for f in (tmp_path, done))
    assert cut["weights_sha256"] == undisturbed["weights_sha256"]
    assert cut["metrics"] == undisturbed["metrics"]


def test_a_checkpoint_of_another_stage_of_training_is_refused(done, compose, tmp_path, tiny):
    of_clip = {"stages": {"encoder": {}}}
    of_llm = {"stages": {"encoder": {}, "pooler": {}, "rotary": {}, "llm": {}}}
    tuning = VideoLLMModule(plain(compose(tiny, tmp_path).model), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^the checkpoint holds encoder alone"):
        tuning.on_load_checkpoint(of_clip)
    context = ClipContextModule(plain(compose(RUN, tmp_path).model), torch.optim.AdamW)
    with pytest.raises(ValueError, match=r"^the checkpoint holds encoder, llm, .*, but"):
        context.on_load_checkpoint(of_llm)
    context.on_load_checkpoint(of_clip)


def test_evaluation_finds_the_recall_of_the_training_again(done, tmp_path, monkeypatch):
    """From anywhere, on the shards that the recipe has made in the run's directory."""
    out = tmp_path / "out"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ropelab-evaluate", f"run={done}", f"hydra.run.dir={out}"])
    evaluate.main()
    trained, again = (json.loads((f / "done.json").read_text()) for f in (done, out))
    found = {n: v for n, v in trained["metrics"].items() if n.startswith("val/")}
    assert again["metrics"] == pytest.approx(found | {"score": found["val/t2i_r1"]})
    assert again["steps"] == trained["steps"] == 8


def test_an_encoder_alone_is_no_model_of_language(done):
    with pytest.raises(ValueError, match=r"holds encoder alone, .* init=.* its recall") as caught:
        evaluate.load(done, None)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_scale_stays_within_100(compose, tmp_path):
    run_train(compose, tmp_path, "module.temperature=0.001", "trainer.max_epochs=1")
    weights = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["state_dict"]
    assert 90 < weights["model.logit_scale"].exp().item() < 100.001


@pytest.mark.slow
@pytest.mark.parametrize(("context", "finds"), [(248, True), ("null", False)])
def test_the_tiny_recipe_finds_what_stands_behind_clips_own_context(
    context, finds, compose, tmp_path
):
    words = ["experiment=clip_context_tiny", *QUIET, f"model.encoder.context_length={context}"]
    train.main.__wrapped__(compose(words, tmp_path))
    recall = json.loads((tmp_path / "done.json").read_text())["metrics"]["val/t2i_r1"]
    assert (recall > 0.15) if finds else (recall < 0.03)  # of 200: by chance 0.005
