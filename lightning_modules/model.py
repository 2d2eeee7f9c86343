"""The whole pipeline, top to bottom."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedConfig, PreTrainedModel

from datamodules.batch import IGNORE_INDEX, VISUAL_SLOT, Grid, PreferenceBatch, VideoBatch
from lightning_modules.encoder.base import Encoder
from lightning_modules.llm.base import LanguageModel
from lightning_modules.lora import add_lora
from lightning_modules.loss import sequence_log_probs
from lightning_modules.pooler.base import Pooler
from lightning_modules.projector import Projector
from lightning_modules.rotary.base import Layout, RotaryEmbedding, RotaryScheme
from lightning_modules.spec import build
from lightning_modules.splice.packing import Placement, Span, one_a_row, pack
from lightning_modules.splice.tiles import Piece, join_pieces, lay_out, split_pieces


class VideoLanguageModelConfig(PreTrainedConfig):
    """One spec (`_target_` and arguments) for each stage; saved with the weights.

    So a checkpoint runs with the rotary scheme and the pooler that it was trained with; another
    one has to be asked for by name: `from_pretrained(folder, rotary={"_target_": …})`. `lora` is
    what stands beside a stage's linears: the arguments of `add_lora`, rank and alpha included.
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
        **kwargs: Any,
    ):
        self.encoder, self.pooler, self.rotary, self.llm = encoder, pooler, rotary, llm
        self.lora = lora
        self.tiles = tiles  # of images cut into such: {"newline": whether rows end with a token}
        super().__init__(**kwargs)


@dataclass
class LanguageInputs:
    """What the LLM reads: text and visual tokens in one row, with their positions.

    `layouts` and `samples` (where each lies) are by sample, which is by row unless rows are packed.
    """

    embeds: Float[Tensor, "b l m"]
    mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # a sample's first token has none: no other sample predicts it
    positions: Float[Tensor, "4 b l"]
    layouts: list[Layout]
    samples: list[Span]

    @property
    def attention_mask(self) -> Bool[Tensor, "b l"] | None:
        """What the LLM takes: none where positions keep the samples of a row apart."""
        return self.mask if len(self.samples) == self.mask.shape[0] else None


@dataclass
class Output:
    losses: Float[Tensor, " b"]  # cross-entropy of each row, summed over its labelled tokens
    counts: Int[Tensor, " b"]  # labelled tokens of each row
    hidden: Float[Tensor, "b l m"]
    inputs: LanguageInputs

    @property
    def labelled(self) -> Int[Tensor, ""]:
        """The number of labelled tokens in the batch."""
        return self.counts.sum()

    @property
    def loss(self) -> Float[Tensor, ""]:
        """The mean over the labelled tokens of the batch; 0 without any."""
        return self.losses.sum() / self.labelled.clamp(min=1)


@dataclass
class LogProbs:
    """Of the answers to each question: the chosen one, then the rejected one."""

    sums: Float[Tensor, "b 2"]  # over the tokens of an answer, in float32
    counts: Int[Tensor, "b 2"]  # tokens of an answer
    read: Int[Tensor, ""]  # tokens that the LLM has read
    cells: int = 0  # the same and the padding of its rows


class VideoLanguageModel(PreTrainedModel):
    """frames and words in, loss or words out.

    1. encoder:   frames (n c h w)                    -> patches (n p d), by frame
    2. pooler:    patches x prompt                    -> relevance (t h w), by piece
    3. projector, pooler: patches x relevance         -> tokens (t h w m), fewer, by piece
    4. splice:    tokens into the words' embeddings   -> embeds (b l m), layouts
    5. rotary:    layouts                             -> positions (4 b l)
    6. llm:       embeds, positions (-> cos, sin)     -> hidden (b l m)
    7. loss:      hidden, labels                      -> losses (b), counts (b)

    A visual is one piece; an image in tiles is two, its thumbnail and the plane of its tiles.
    """

    config_class = VideoLanguageModelConfig
    config: VideoLanguageModelConfig
    base_model_prefix = "ropelab"
    main_input_name = "batch"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = True

    def __init__(self, config: VideoLanguageModelConfig):
        super().__init__(config)
        self.encoder: Encoder = build(config.encoder or {}, Encoder)
        self.pooler: Pooler = build(config.pooler or {}, Pooler)
        self.rotary: RotaryScheme = build(config.rotary or {}, RotaryScheme)
        self.llm: LanguageModel = build(config.llm or {}, LanguageModel)
        if self.pooler.uses_prompt and not self.encoder.reads_prompts:
            raise ValueError(
                "a prompt guides the pooler, but the encoder has no text tower to read it with: "
                "take pooler=average or none, or an encoder with one (encoder=clip_large_336)"
            )
        for frames in (1, 10**6):  # a kernel that does not fit an image or a video stops here
            self.pooler.grid(Grid(frames, *self.encoder.grid))
        self.llm.replace_rotary(lambda original: RotaryEmbedding(self.rotary, original))
        self.projector = Projector(self.encoder.width, self.llm.width)
        self.image_newline = None
        if config.tiles:
            self.pooler.grid(Grid(1, *(2 * side for side in self.encoder.grid)))
            if config.tiles["newline"]:
                std = self.llm.width**-0.5
                self.image_newline = nn.Parameter(torch.randn(self.llm.width) * std)
        # What came from a hub or folder is part of this model now: keep its config, not its name.
        config.encoder, config.llm = self.encoder.to_spec(), self.llm.to_spec()
        self.post_init()
        if config.lora:  # not before: transformers would give its weights those of a fresh linear
            try:
                add_lora(self, **config.lora)
            except TypeError as error:
                raise ValueError(f"tuning.lora: {error}") from error
        if not self.pooler.uses_prompt:  # what no loss depends on is not trained
            for module in self.encoder.prompt_modules():
                module.requires_grad_(False)

    def forward(self, batch: VideoBatch, packing: int | None = None) -> Output:
        patches = self.encoder(batch.frames, batch.clips)  # n p d
        inputs = self.compose(batch, patches, packing=packing)
        hidden = self.llm(inputs.embeds, inputs.attention_mask, inputs.positions)  # b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)
        return Output(-sums, counts, hidden, inputs)

    @torch.no_grad()
    def generate(self, batch: VideoBatch, **options: Any) -> Int[Tensor, "b l"]:
        """New token ids after each row; labels are not read.

        `options` go to transformers' `GenerationMixin.generate`: `max_new_tokens`, `num_beams`, …
        """
        patches = self.encoder(batch.frames, batch.clips)
        inputs = self.compose(batch, patches, padding_side="left")
        following = self.rotary.batch_following(inputs.layouts).to(patches.device)  # 3 b
        return self.llm.generate(inputs.embeds, inputs.mask, inputs.positions, following, **options)

    def log_probs(self, batch: PreferenceBatch) -> LogProbs:
        """Of both answers to each question, read side by side; frames are encoded once."""
        patches = self.encoder(batch.chosen.frames, batch.chosen.clips)
        inputs = self.compose(batch.both(), torch.cat([patches, patches]))
        hidden = self.llm(inputs.embeds, inputs.mask, inputs.positions)  # 2b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)
        sums, counts = (torch.stack(rows.chunk(2), dim=1) for rows in (sums, counts))  # 2b -> b 2
        return LogProbs(sums, counts, inputs.mask.sum(), inputs.mask.numel())

    def blocks(self) -> list[nn.Module]:
        """The units to shard, in the order in which they run."""
        return [*self.encoder.blocks(), *self.llm.blocks()]

    def compose(
        self,
        batch: VideoBatch,
        patches: Float[Tensor, "n p d"],
        padding_side: str = "right",
        packing: int | None = None,
    ) -> LanguageInputs:
        """Steps 2 to 5: everything between the encoder and the LLM.

        With `packing`, samples share rows of at most so many tokens; else each has its own.
        """
        visuals = self._visuals(batch, patches)
        relevance = self._relevance(batch, visuals)
        tokens, grids = self.pool(visuals, relevance)
        pieces, layouts = self._splice(batch, tokens, grids)
        lengths = [labels.shape[0] for _, labels in pieces]
        rows = pack(lengths, packing) if packing else one_a_row(lengths, padding_side)
        positions = _positions(self.rotary, layouts, rows).to(patches.device)
        embeds, mask, labels = _rows(pieces, rows)
        if not visuals and (self.training or isinstance(self, FSDPModule)):
            embeds = embeds + self._no_visual(batch)
        return LanguageInputs(embeds, mask, labels, positions, layouts, rows.spans)

    def pool(
        self, pieces: Sequence[Piece], relevance: Sequence[Float[Tensor, "_ _ _"] | None]
    ) -> tuple[list[Float[Tensor, "_ m"]], list[Grid]]:
        """Tokens of each piece and the grid they come from.

        The projector's second layer runs on what the pooler leaves: a window's weights sum to 1,
        so a linear map gives the same on either side of it.
        """
        pooled = [
            self.pooler(piece.patches, weight, self.projector.expand)
            for piece, weight in zip(pieces, relevance, strict=True)
        ]  # each t h w m
        if not pooled:
            return [], []
        grids = [Grid(*p.shape[:3]) for p in pooled]
        flat = self.projector.contract(torch.cat([p.flatten(0, 2) for p in pooled]))  # all m
        if self.image_newline is not None:  # has a gradient on every rank, tiles or none
            flat = flat + 0 * self.image_newline.sum()
        tokens = [
            part.view(*grid, -1)
            for part, grid in zip(flat.split([g.size for g in grids]), grids, strict=True)
        ]
        tokens = [
            lay_out(part, piece, self.image_newline) if piece.tiles else part
            for part, piece in zip(tokens, pieces, strict=True)
        ]
        return [t.flatten(0, 2) for t in tokens], [Grid(*t.shape[:3]) for t in tokens]

    def _visuals(self, batch: VideoBatch, patches: Float[Tensor, "n p d"]) -> list[Piece]:
        """
        Raises:
            ValueError: images in tiles, and a model that was not made for them.
        """
        if any(batch.tiles) and not self.config.tiles:
            raise ValueError(
                "the images are cut into tiles, but the model has no model.tiles: train it with "
                "tiles=llava_next, or set data.frames.tiles=null"
            )
        return split_pieces(batch, patches.unflatten(1, self.encoder.grid))  # n p d -> n h w d

    def _relevance(
        self, batch: VideoBatch, pieces: Sequence[Piece]
    ) -> list[Float[Tensor, "_ _ _"] | None]:
        if not self.pooler.uses_prompt or not pieces:
            return [None] * len(pieces)
        prompts = self.encoder.encode_prompt(batch.prompt_ids, batch.prompt_mask)  # b e
        return [
            self.pooler.relevance(
                self.encoder.align(piece.patches.flatten(1, 2)), prompts[piece.row]
            ).view(piece.patches.shape[:3])
            for piece in pieces
        ]

    def _splice(
        self, batch: VideoBatch, tokens: Sequence[Float[Tensor, "_ m"]], grids: Sequence[Grid]
    ) -> tuple[list[tuple[Tensor, Tensor]], list[Layout]]:
        """Puts the tokens of each visual's pieces in the place of its slot; padding is dropped.

        Returns one (embeddings, labels) pair a row, and the rows' layouts.
        """
        embeds = self.llm.embed(batch.input_ids.clamp(min=0))  # b l m; slots read as any token
        lengths = batch.attention_mask.sum(dim=1).tolist()
        slots = (batch.input_ids == VISUAL_SLOT).nonzero().tolist()
        visual = iter(join_pieces(batch, list(zip(tokens, grids, strict=True))))
        pieces, layouts = [], []
        for row, length in enumerate(lengths):
            parts, marks, layout, start = [], [], [], 0
            for stop in [column for r, column in slots if r == row] + [length]:
                parts.append(embeds[row, start:stop])
                marks.append(batch.labels[row, start:stop])
                if stop > start:
                    layout.append(stop - start)
                for part, grid in next(visual) if stop < length else ():
                    parts.append(part.to(embeds.dtype))
                    marks.append(batch.labels.new_full((grid.size,), IGNORE_INDEX))
                    layout.append(grid)
                start = stop + 1
            pieces.append((torch.cat(parts), torch.cat(marks)))
            layouts.append(layout)
        return pieces, layouts

    def _no_visual(self, batch: VideoBatch) -> Float[Tensor, ""]:
        """0, by way of a blank frame through all visual stages.

        Ranks reduce gradients together, and gather sharded weights together: where one has
        visuals, the others must run the same blocks and give each weight a gradient, if only of
        zeros. A single process does as they do, so that its optimizer takes the same steps.
        """
        size, ids = self.encoder.image_size, batch.input_ids.clone()
        ids[0, 0] = VISUAL_SLOT
        frames = batch.frames.new_zeros(1, 3, size, size)
        blank = replace(batch, input_ids=ids, frames=frames, frame_counts=[1])
        visuals = self._visuals(blank, self.encoder(frames, [1]))
        tokens, _ = self.pool(visuals, self._relevance(blank, visuals))
        return 0 * tokens[0].sum()

    def _init_weights(self, module: Any) -> None:
        """Each stage sets its own weights when it is made; transformers' way would undo that."""


def _positions(
    scheme: RotaryScheme, layouts: Sequence[Layout], rows: Placement
) -> Float[Tensor, "4 b l"]:
    padded = scheme.batch_positions(layouts).movedim(0, -1)  # of a sample each: s l 4
    parts = [padded[i, : span.stop - span.start] for i, span in enumerate(rows.spans)]
    positions = rows.spread(torch.cat(parts)).movedim(-1, 0)  # 4 b l
    return rows.restart(positions) if len(parts) > rows.rows else positions


def _rows(
    pieces: Sequence[tuple[Tensor, Tensor]], rows: Placement
) -> tuple[Float[Tensor, "b l m"], Bool[Tensor, "b l"], Int[Tensor, "b l"]]:
    embeds, labels = (torch.cat(column) for column in zip(*pieces, strict=True))
    mask = rows.spread(torch.ones_like(labels, dtype=torch.bool))
    spread = rows.spread(labels, fill=IGNORE_INDEX)
    for row, start, stop in rows.spans:
        spread[row, start:stop][:1] = IGNORE_INDEX
    return rows.spread(embeds), mask, spread
