"""The video language model: the components and the forward pass that joins them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from datamodules.batch import Grid, PreferenceBatch, Tiles, VideoBatch
from lightning_modules.encoder.base import Encoder
from lightning_modules.llm.base import LanguageModel
from lightning_modules.lora import add_lora
from lightning_modules.loss import sequence_log_probs
from lightning_modules.pooler.base import Pooler
from lightning_modules.projector import Projector
from lightning_modules.rotary.base import RotaryEmbedding, RotaryScheme
from lightning_modules.rotary.scaling.base import Scaling
from lightning_modules.spec import build
from lightning_modules.splice.insert import insert
from lightning_modules.splice.packing import Span, one_a_row, pack
from lightning_modules.splice.tiles import Piece, join_tiles, split_tiles, trim
from lightning_modules.tokens import Row, VisualTokens

POSITIONS = ("reindex", "keep")


class VideoLanguageModelConfig(PreTrainedConfig):
    """Holds one spec (`_target_` and arguments) for each component; saved with the weights.

    A checkpoint therefore runs with the rotary scheme and the pooler that it was trained with. To
    use another one, name it: `from_pretrained(folder, rotary={"_target_": …})`. `lora` holds the
    arguments of `add_lora`, including rank and alpha.

    `positions` says where visual tokens stand for the rotary scheme after the pooler. `reindex`:
    they are numbered 0, 1, 2, … on the reduced grid. `keep`: they keep the place of what they were
    made of, and the text behind them stands where it would stand without a pooler.
    """

    model_type = "ropelab"

    def __init__(
        self,
        encoder: dict | None = None,
        pooler: dict | None = None,
        rotary: dict | None = None,
        llm: dict | None = None,
        lora: dict | None = None,
        tiles: dict | None = None,
        positions: str = "reindex",
        **kwargs: Any,
    ):
        self.encoder, self.pooler, self.rotary, self.llm = encoder, pooler, rotary, llm
        self.lora = lora
        # For images that are cut into tiles: {"newline": whether each row ends with a token}.
        self.tiles = tiles
        self.positions = positions
        super().__init__(**kwargs)


@dataclass
class LanguageInputs:
    """The input of the LLM: text and visual tokens in one row, with their positions.

    `segments` (text and visuals of each sample, from left to right) and `samples` (where each
    sample lies) have one entry per sample. Without packing, that is one entry per row.
    """

    embeds: Float[Tensor, "b l m"]
    mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # none on the first token of a sample: nothing before predicts it
    positions: Float[Tensor, "a1 b l"]
    segments: list[Row]
    samples: list[Span]

    @property
    def attention_mask(self) -> Bool[Tensor, "b l"] | None:
        """Returns the LLM's mask, or None for packed rows, where positions separate samples."""
        return self.mask if len(self.samples) == self.mask.shape[0] else None


@dataclass
class Output:
    losses: Float[Tensor, " b"]  # cross-entropy of each row, summed over its labelled tokens
    counts: Int[Tensor, " b"]  # labelled tokens of each row
    hidden: Float[Tensor, "b l m"]
    inputs: LanguageInputs

    @property
    def labelled(self) -> Int[Tensor, ""]:
        """Returns the number of labelled tokens in the batch."""
        return self.counts.sum()

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Returns the mean loss over the labelled tokens of the batch; 0 if there are none."""
        return self.losses.sum() / self.labelled.clamp(min=1)


@dataclass
class LogProbs:
    """Log-probabilities of two answers per question: first the chosen one, then the rejected."""

    sums: Float[Tensor, "b 2"]  # summed over the tokens of an answer, in float32
    counts: Int[Tensor, "b 2"]  # tokens of an answer
    read: Int[Tensor, ""]  # tokens that the LLM has read
    cells: int = 0  # tokens that the LLM has read, plus padding


class VideoLanguageModel(PreTrainedModel):
    """A model that reads visuals and text, and returns the loss or generated text.

    1. encoder:   visuals                              -> tokens (l d) with coordinates, per visual
    2. pooler:    tokens x prompt                      -> relevance (l), per piece
    3. pooler, projector: tokens x relevance           -> tokens (l m), fewer, per piece
    4. splice:    tokens into the words' embeddings    -> embeds (b l m), rows
    5. rotary:    rows                                 -> positions (1 + a, b, l)
    6. llm:       embeds, positions (-> cos, sin)      -> hidden (b l m)
    7. loss:      hidden, labels                       -> losses (b), counts (b)

    A visual is one piece. An image in tiles is two pieces: its thumbnail, and the plane of its
    tiles.
    """

    config_class = VideoLanguageModelConfig
    config: VideoLanguageModelConfig
    base_model_prefix = "ropelab"
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: VideoLanguageModelConfig):
        super().__init__(config)
        if config.positions not in POSITIONS:
            raise ValueError(f"model.positions is {config.positions!r}; take reindex or keep")
        self.encoder: Encoder = build(config.encoder or {}, Encoder)
        self.pooler: Pooler = build(config.pooler or {}, Pooler)
        self.rotary = _scheme(config.rotary or {})
        self.llm: LanguageModel = build(config.llm or {}, LanguageModel)
        if self.pooler.uses_prompt and not self.encoder.reads_prompts:
            raise ValueError(
                "the pooler needs a prompt, but the encoder has no text tower to read it: choose "
                "pooler=average or none, or an encoder with a text tower (encoder=clip_large_336)"
            )
        if config.tiles and not self.pooler.regular:
            raise ValueError(
                "the tokens of the pooler have no rows and columns, by which the padding of images "
                "in tiles is cut off: leave out tiles=llava_next, or choose pooler=average or none"
            )
        self._check_pooler()
        self.llm.replace_rotary(lambda original: RotaryEmbedding(self.rotary, original))
        width, between = self.pooler.width(self.encoder.width), self.encoder.projector_width
        self.projector = Projector(width, self.llm.width, between)
        self.image_newline = None
        if config.tiles and config.tiles["newline"]:
            std = self.llm.width**-0.5
            self.image_newline = nn.Parameter(torch.randn(self.llm.width) * std)
        # Components loaded from a hub or folder are now part of this model: store their config,
        # not their name.
        config.encoder, config.llm = self.encoder.to_spec(), self.llm.to_spec()
        self.post_init()
        if config.lora:  # after `post_init`, which would initialise LoRA's weights as plain linears
            try:
                add_lora(self, **config.lora)
            except TypeError as error:
                raise ValueError(f"tuning.lora: {error}") from error
        if not self.pooler.uses_prompt:  # the loss does not depend on the prompt modules
            for module in self.encoder.prompt_modules():
                module.requires_grad_(False)

    def forward(self, batch: VideoBatch, packing: int | None = None) -> Output:
        encoded = self.encoder(split_tiles(batch.visuals))  # 1: l d, per visual
        inputs = self.compose(batch, encoded, packing=packing)  # 2 to 5
        hidden = self.llm(inputs.embeds, inputs.attention_mask, inputs.positions)  # 6: b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)  # 7: b
        return Output(-sums, counts, hidden, inputs)

    def compose(
        self,
        batch: VideoBatch,
        encoded: Sequence[VisualTokens],
        padding_side: str = "right",
        packing: int | None = None,
    ) -> LanguageInputs:
        """Runs steps 2 to 5: everything between the encoder and the LLM.

        With `packing`, samples share rows of at most `packing` tokens. Otherwise each sample has
        its own row.
        """
        if any(info.tiles for info in batch.infos) and not self.config.tiles:
            raise ValueError(
                "the images are cut into tiles, but the model has no model.tiles: train it with "
                "tiles=llava_next, or set data.frames.tiles=null"
            )
        pieces = join_tiles(batch, encoded)

        # 2. relevance
        relevance: list[Float[Tensor, " l"] | None] = [None] * len(pieces)
        if self.pooler.uses_prompt and pieces:
            prompts = self.encoder.encode_prompt(batch.prompt_ids, batch.prompt_mask)  # b e
            relevance = [self._relevance(piece, prompts[piece.row]) for piece in pieces]

        # 3. fewer tokens
        pooled = [
            self.pooler(piece.tokens, weight, self.projector.expand)
            for piece, weight in zip(pieces, relevance, strict=True)
        ]
        pooled = self._contract(pooled)
        keeps = self.config.positions == "keep"
        visuals: list[list[VisualTokens]] = [[] for _ in {piece.visual for piece in pieces}]
        for piece, tokens in zip(pieces, pooled, strict=True):
            whole = trim(tokens, piece.tiles, self.image_newline) if piece.tiles else tokens
            visuals[piece.visual].append(whole if keeps else whole.reindex())

        # 4. splice
        words = self.llm.embed(batch.input_ids.clamp(min=0))  # b l m; slots get any embedding
        samples = insert(batch, words, visuals)
        lengths = [len(sample.labels) for sample in samples]
        place = pack(lengths, packing) if packing else one_a_row(lengths, padding_side)
        embeds = place.spread(torch.cat([sample.embeds for sample in samples]))  # b l m
        mask, labels = place.labels(torch.cat([sample.labels for sample in samples]))  # b l

        # 5. positions
        rows = [sample.row for sample in samples]
        positions = place.positions(self.rotary.batch_positions(rows))  # 1+a b l
        return LanguageInputs(embeds, mask, labels, positions.to(embeds.device), rows, place.spans)

    @torch.no_grad()
    def generate(self, batch: VideoBatch, **options: Any) -> Int[Tensor, "b l"]:
        """Returns the new token ids for each row; labels are not read.

        `options` go to transformers' `GenerationMixin.generate`: `max_new_tokens`, `num_beams`,
        `streamer`, … A streamer gets an empty prompt, because the LLM reads embeddings.
        """
        encoded = self.encoder(split_tiles(batch.visuals))
        inputs = self.compose(batch, encoded, padding_side="left")
        following = self.rotary.batch_following(inputs.segments).to(inputs.embeds.device)  # b
        return self.llm.generate(inputs.embeds, inputs.mask, inputs.positions, following, **options)

    def log_probs(self, batch: PreferenceBatch) -> LogProbs:
        """Returns the log-probabilities of both answers to each question.

        Both answers are in one batch, and the visuals are encoded only once.
        """
        encoded = self.encoder(split_tiles(batch.chosen.visuals))
        inputs = self.compose(batch.both(), [*encoded, *encoded])
        hidden = self.llm(inputs.embeds, inputs.mask, inputs.positions)  # 2b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)
        sums, counts = (torch.stack(rows.chunk(2), dim=1) for rows in (sums, counts))  # 2b -> b 2
        return LogProbs(sums, counts, inputs.mask.sum(), inputs.mask.numel())

    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run."""
        return [*self.encoder.blocks(), *self.llm.blocks()]

    def num_tokens(self, frames: int, height: int, width: int, tiles: Tiles | None = None) -> int:
        """Returns the most LLM tokens of a visual of this size in frames and pixels.

        An image in tiles has the tokens of its thumbnail, of the plane of all tiles, and newlines.
        It has fewer if the picture does not fill its tiles.
        """
        if tiles is None:
            return self.pooler.extent(self.encoder.extent(frames, height, width)).size
        tile = self.encoder.extent(1, height, width)
        plane = self.pooler.extent(Grid(1, tiles.rows * tile.h, tiles.columns * tile.w))
        newlines = plane.h if self.config.tiles and self.config.tiles["newline"] else 0
        return self.pooler.extent(tile).size + plane.size + newlines

    def _relevance(self, piece: Piece, prompt: Float[Tensor, " e"]) -> Float[Tensor, " l"]:
        return self.pooler.relevance(self.encoder.align(piece.tokens.features), prompt)

    def _contract(self, pooled: Sequence[VisualTokens]) -> list[VisualTokens]:
        """Runs the projector's second layer, which is linear, on the tokens that are left."""
        if not pooled:
            return []
        features = [tokens.features for tokens in pooled]  # one long video is not copied
        flat = self.projector.contract(features[0] if len(features) == 1 else torch.cat(features))
        if self.image_newline is not None:  # needs a gradient on every rank, even without tiles
            flat = flat + 0 * self.image_newline.sum()
        parts = flat.split([len(tokens) for tokens in pooled])
        return [replace(tokens, features=part) for tokens, part in zip(pooled, parts, strict=True)]

    def _check_pooler(self) -> None:
        """Runs the pooler's sizes on an image, a long video and, if there are any, tiles.

        Raises:
            ValueError: the pooler's windows do not fit one of them.
        """
        _, _, height, width = self.encoder.blank().frames.shape
        for frames in (1, 10**6):
            self.num_tokens(frames, height, width)
        if self.config.tiles:
            self.num_tokens(5, height, width, Tiles(2, 2, height, width))

    def _init_weights(self, module: Any) -> None:
        """Does nothing: each component initialises its own weights when it is built.

        The initialisation of transformers would overwrite them.
        """


def _scheme(spec: dict[str, Any]) -> RotaryScheme:
    """Builds the rotary scheme of a spec with, under `scaling`, the scaling of its frequencies."""
    own = {name: value for name, value in spec.items() if name != "scaling"}
    scheme: RotaryScheme = build(own, RotaryScheme)
    if spec.get("scaling"):
        scaling: Scaling = build(spec["scaling"], Scaling)
        scaling.check(scheme.num_axes)
        scheme.scaling = scaling
    return scheme
