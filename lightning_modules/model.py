"""The video language model: the components and the forward pass that joins them."""

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
    """Holds one spec (`_target_` and arguments) for each component; saved with the weights.

    A checkpoint therefore runs with the rotary scheme and the pooler that it was trained with. To
    use another one, name it: `from_pretrained(folder, rotary={"_target_": …})`. `lora` holds the
    arguments of `add_lora`, including rank and alpha.
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
        # For images that are cut into tiles: {"newline": whether each row ends with a token}.
        self.tiles = tiles
        super().__init__(**kwargs)


@dataclass
class LanguageInputs:
    """The input of the LLM: text and visual tokens in one row, with their positions.

    `layouts` and `samples` (where each sample lies) have one entry per sample. Without packing,
    that is one entry per row.
    """

    embeds: Float[Tensor, "b l m"]
    mask: Bool[Tensor, "b l"]  # False on padding
    labels: Int[Tensor, "b l"]  # none on the first token of a sample: nothing before predicts it
    positions: Float[Tensor, "4 b l"]
    layouts: list[Layout]
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
    """A model that reads frames and text, and returns the loss or generated text.

    1. encoder:   frames (n c h w)                    -> patches (n p d), per frame
    2. pooler:    patches x prompt                    -> relevance (t h w), per piece
    3. projector, pooler: patches x relevance         -> tokens (t h w m), fewer, per piece
    4. splice:    tokens into the words' embeddings   -> embeds (b l m), layouts
    5. rotary:    layouts                             -> positions (4 b l)
    6. llm:       embeds, positions (-> cos, sin)     -> hidden (b l m)
    7. loss:      hidden, labels                      -> losses (b), counts (b)

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
        self.encoder: Encoder = build(config.encoder or {}, Encoder)
        self.pooler: Pooler = build(config.pooler or {}, Pooler)
        self.rotary: RotaryScheme = build(config.rotary or {}, RotaryScheme)
        self.llm: LanguageModel = build(config.llm or {}, LanguageModel)
        if self.pooler.uses_prompt and not self.encoder.reads_prompts:
            raise ValueError(
                "a prompt guides the pooler, but the encoder has no text tower to read it with: "
                "take pooler=average or none, or an encoder with one (encoder=clip_large_336)"
            )
        for frames in (1, 10**6):  # raises if the kernel does not fit an image or a video
            self.pooler.grid(Grid(frames, *self.encoder.grid))
        self.llm.replace_rotary(lambda original: RotaryEmbedding(self.rotary, original))
        self.projector = Projector(self.encoder.width, self.llm.width)
        self.image_newline = None
        if config.tiles:
            self.pooler.grid(Grid(1, *(2 * side for side in self.encoder.grid)))
            if config.tiles["newline"]:
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
        patches = self.encoder(batch.frames, batch.clips)  # n p d
        inputs = self.compose(batch, patches, packing=packing)
        hidden = self.llm(inputs.embeds, inputs.attention_mask, inputs.positions)  # b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)
        return Output(-sums, counts, hidden, inputs)

    @torch.no_grad()
    def generate(self, batch: VideoBatch, **options: Any) -> Int[Tensor, "b l"]:
        """Returns the new token ids for each row; labels are not read.

        `options` go to transformers' `GenerationMixin.generate`: `max_new_tokens`, `num_beams`, …
        """
        patches = self.encoder(batch.frames, batch.clips)
        inputs = self.compose(batch, patches, padding_side="left")
        following = self.rotary.batch_following(inputs.layouts).to(patches.device)  # 3 b
        return self.llm.generate(inputs.embeds, inputs.mask, inputs.positions, following, **options)

    def log_probs(self, batch: PreferenceBatch) -> LogProbs:
        """Returns the log-probabilities of both answers to each question.

        Both answers are in one batch, and the frames are encoded only once.
        """
        patches = self.encoder(batch.chosen.frames, batch.chosen.clips)
        inputs = self.compose(batch.both(), torch.cat([patches, patches]))
        hidden = self.llm(inputs.embeds, inputs.mask, inputs.positions)  # 2b l m
        sums, counts = sequence_log_probs(hidden, inputs.labels, self.llm.head)
        sums, counts = (torch.stack(rows.chunk(2), dim=1) for rows in (sums, counts))  # 2b -> b 2
        return LogProbs(sums, counts, inputs.mask.sum(), inputs.mask.numel())

    def blocks(self) -> list[nn.Module]:
        """Returns the units to shard, in the order in which they run."""
        return [*self.encoder.blocks(), *self.llm.blocks()]

    def compose(
        self,
        batch: VideoBatch,
        patches: Float[Tensor, "n p d"],
        padding_side: str = "right",
        packing: int | None = None,
    ) -> LanguageInputs:
        """Runs steps 2 to 5: everything between the encoder and the LLM.

        With `packing`, samples share rows of at most `packing` tokens. Otherwise each sample has
        its own row.
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
        """Returns the tokens and the grid of each piece.

        The projector's second layer runs after pooling, on fewer tokens. The weights of a window
        sum to 1, so a linear map gives the same result before or after pooling.
        """
        pooled = [
            self.pooler(piece.patches, weight, self.projector.expand)
            for piece, weight in zip(pieces, relevance, strict=True)
        ]  # each t h w m
        if not pooled:
            return [], []
        grids = [Grid(*p.shape[:3]) for p in pooled]
        flat = self.projector.contract(torch.cat([p.flatten(0, 2) for p in pooled]))  # all m
        if self.image_newline is not None:  # needs a gradient on every rank, even without tiles
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
        """Splits the patches of a batch into one piece or two for each visual.

        Raises:
            ValueError: images are cut into tiles, but the model was not built for tiles.
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
        """Replaces each visual's slot by the tokens of its pieces, and drops padding.

        Returns one (embeddings, labels) pair per row, and the layout of each row.
        """
        embeds = self.llm.embed(batch.input_ids.clamp(min=0))  # b l m; slots get any embedding
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
        """Returns 0, computed from a blank frame that runs through all visual components.

        Ranks reduce gradients together, and gather sharded weights together. If one rank has
        visuals, the others must run the same blocks and give each weight a gradient, even if it
        is zero. A single process does the same, so that its optimizer takes the same steps.
        """
        size, ids = self.encoder.image_size, batch.input_ids.clone()
        ids[0, 0] = VISUAL_SLOT
        frames = batch.frames.new_zeros(1, 3, size, size)
        blank = replace(batch, input_ids=ids, frames=frames, frame_counts=[1])
        visuals = self._visuals(blank, self.encoder(frames, [1]))
        tokens, _ = self.pool(visuals, self._relevance(blank, visuals))
        return 0 * tokens[0].sum()

    def _init_weights(self, module: Any) -> None:
        """Does nothing: each component initialises its own weights when it is built.

        The initialisation of transformers would overwrite them.
        """


def _positions(
    scheme: RotaryScheme, layouts: Sequence[Layout], rows: Placement
) -> Float[Tensor, "4 b l"]:
    padded = scheme.batch_positions(layouts).movedim(0, -1)  # per sample: s l 4
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
