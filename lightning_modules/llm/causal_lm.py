"""Wraps any transformers decoder that has its own rotary module: the Llama and Qwen families."""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GgufConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.modeling_outputs import MoeModelOutputWithPast
from transformers.modeling_rope_utils import RopeParameters
from transformers.utils.generic import is_flash_attention_requested

from lightning_modules.llm.base import LanguageModel
from lightning_modules.llm.split import split_blocks
from lightning_modules.private.transformers import attention_of
from lightning_modules.spec import set_attention


class CausalLM(LanguageModel):
    """A transformers model, unchanged except that its rotary module can be replaced.

    Args:
        source: hub id, local folder or `.gguf` file to load weights from; None: random weights.
        config: without `source`, the fields of the transformers config, including `model_type`.
        attention: attention implementation, as transformers names it: sdpa, eager,
            flash_attention_2, flex_attention, …
        dtype: name of the dtype for weights loaded from `source`; None: as stored.

    Raises:
        ValueError: neither or both of `source` and `config` are given, the decoder has no rotary
            module of its own, or its logits are not a scaled linear map.
    """

    def __init__(
        self,
        source: str | None = None,
        config: dict[str, Any] | None = None,
        attention: str = "sdpa",
        dtype: str | None = None,
    ):
        super().__init__()
        if (source is None) == (config is None):
            raise ValueError("model.llm needs either `source` (weights to load) or `config`")
        self.attention = attention
        self.lm: Any = _load(source, dtype) if source else _make(config or {})
        set_attention(self.lm, "llm", attention)
        check_rotary(self.decoder, self.lm.config)
        self.logit_scale = find_logit_scale(self.lm)
        self.width = self.lm.config.hidden_size
        self.decoder.register_forward_pre_hook(_take_axis_positions, with_kwargs=True)
        self.decoder.register_forward_hook(_drop_axis_positions, always_call=True)

    @property
    def decoder(self) -> Any:
        """Returns the LLM without its head."""
        return self.lm.get_decoder()

    def replace_rotary(self, build: Callable[[nn.Module], nn.Module]) -> None:
        self.decoder.rotary_emb = build(self.decoder.rotary_emb)

    def embed(self, ids: Int[Tensor, "*b l"]) -> Float[Tensor, "*b l m"]:
        return self.lm.get_input_embeddings()(ids)

    def forward(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b k"] | None,
        positions: Float[Tensor, "a1 b l"],
        cache: Cache | None = None,
    ) -> Float[Tensor, "b l m"]:
        packed = mask is None and cache is None
        return self.decoder(
            inputs_embeds=embeds,
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{_cache_argument(type(self.decoder)): cache},
            **(self._document_lengths(positions[0].long()) if packed else {}),
        ).last_hidden_state

    def _document_lengths(self, counts: Int[Tensor, "b l"]) -> dict[str, Any]:
        """Returns the lengths of packed documents, for flash kernels.

        Other kernels find the documents in `counts`: transformers starts one at every step other
        than +1. For flash kernels it does so only in a batch of one row.
        """
        implementation = attention_of(self.lm.config)
        if not is_flash_attention_requested(requested_attention_implementation=implementation):
            return {}
        ends, longest = prepare_fa_kwargs_from_position_ids(counts)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (*ends, *longest), strict=True))

    def head(self, hidden: Float[Tensor, "*b m"]) -> Float[Tensor, "*b vocab"]:
        logits = self.lm.get_output_embeddings()(hidden)
        return logits if self.logit_scale == 1 else logits * self.logit_scale

    def generate(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b l"],
        positions: Float[Tensor, "a1 b l"],
        following: Float[Tensor, " b"],
        **options,
    ) -> Int[Tensor, "b2 l2"]:
        return self.lm.generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            position_ids=_with_following(positions, following),
            **options,
        )

    def blocks(self) -> list[nn.Module]:
        return list(self.decoder.layers)

    def split(self, mesh: DeviceMesh) -> None:
        split_blocks(self.blocks(), self.lm.config, mesh)

    def to_spec(self) -> dict:
        return {
            "_target_": "lightning_modules.llm.causal_lm.CausalLM",
            "config": self.lm.config.to_diff_dict() | {"model_type": self.lm.config.model_type},
            "attention": self.attention,
        }

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Maps tied weights to their originals; transformers reads it to save them only once."""
        return {f"lm.{a}": f"lm.{b}" for a, b in self.lm.all_tied_weights_keys.items()}


@lru_cache
def _cache_argument(decoder: type[nn.Module]) -> str:
    """Returns the name of the decoder's argument for a KV cache.

    transformers 5.24 renamed `past_key_values` to `cache`, one model family at a time. The old
    name still works there, with a warning.
    """
    return "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"


def _load(source: str, dtype: str | None) -> PreTrainedModel:
    # Without this option, transformers asks in the terminal whether to run code from the source.
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": False}
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        # Dequantised weights are plain floats, so they can be trained and saved.
        options |= {
            "gguf_file": path.name,
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": dtype or "float32",
        }
        source = str(path.parent)
    return AutoModelForCausalLM.from_pretrained(source, **options)


def _make(config: dict[str, Any]) -> PreTrainedModel:
    fields = deepcopy(config)  # transformers modifies nested fields
    _check_rope_fields(fields)
    if "model_type" not in fields:
        raise ValueError("model.llm.config needs `model_type`, such as qwen2 or llama")
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if width and heads and not fields.get("head_dim") and width % heads:
        raise ValueError(
            f"model.llm.config.hidden_size {width} is not a multiple of num_attention_heads {heads}"
        )
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(made, trust_remote_code=False)


def _check_rope_fields(fields: dict[str, Any]) -> None:
    """Checks the names of the rope fields.

    Raises:
        ValueError: transformers would ignore a field, and so not use the requested frequencies.
    """
    known = {*RopeParameters.__annotations__, "type", "mrope_section", "mrope_interleaved"}
    for key in ("rope_parameters", "rope_scaling"):
        unknown = sorted(set(fields.get(key) or ()) - known)
        if unknown:
            raise ValueError(
                f"model.llm.config.{key} has no {unknown[0]!r}: take {', '.join(sorted(known))}"
            )


def check_rotary(decoder: Any, config: Any) -> None:
    """Checks that replacing `decoder.rotary_emb` changes every layer with rotary positions.

    Raises:
        ValueError: the decoder has no such module, does not use it, or has several.
    """
    own = getattr(decoder, "rotary_emb", None)
    if own is None or getattr(config, "alibi", False):
        raise ValueError(
            f"model.llm: {type(decoder).__name__} has no `rotary_emb` to replace, or does not use "
            "it; choose a decoder of the Llama or Qwen family"
        )
    others = [
        name
        for name, module in decoder.named_modules()
        if module is not own and "rotary" in type(module).__name__.lower()
    ]
    if others:
        raise ValueError(
            f"model.llm: {type(decoder).__name__} has more than one rotary module ({others[0]}), "
            "but a rotary scheme replaces exactly one; choose a decoder of the Llama or Qwen family"
        )


@torch.no_grad()
def find_logit_scale(lm: PreTrainedModel) -> float:
    """Returns the factor of `lm` on its head's output: 1 for Llama, 0.0625 for Cohere.

    It runs `lm.forward` while decoder and head return their input. So it needs no weights, and no
    model-specific field names.

    Raises:
        ValueError: `lm` changes its logits in another way, such as Gemma2's soft cap, or needs more
            from its decoder than hidden states, such as Gemma4.
    """
    decoder: Any = lm.get_decoder()
    head: Any = lm.get_output_embeddings()
    with torch.device("cpu"):  # even while a model is built on the meta device
        logits = torch.linspace(-60, 60, 7)[None, None]
        decoder.forward = lambda *_, **__: MoeModelOutputWithPast(last_hidden_state=logits)
        head.forward = lambda hidden: hidden
        try:
            seen = lm(inputs_embeds=logits).logits
        except Exception as error:
            raise ValueError(
                f"model.llm: {type(lm).__name__} reads more from its decoder than hidden states "
                f"({error}); choose a decoder of the Llama or Qwen family"
            ) from None
        finally:
            del decoder.forward, head.forward  # restores the methods of the classes
    scale = float(seen[0, 0, -1]) / 60
    if not torch.allclose(seen, scale * logits):
        raise ValueError(
            f"model.llm: {type(lm).__name__} limits its logits with a soft cap, which the loss "
            "here does not support: set model.llm.config.final_logit_softcapping=null, or choose "
            "another llm"
        )
    return scale


def _with_following(
    positions: Float[Tensor, "a1 b l"], following: Float[Tensor, " b"]
) -> Float[Tensor, "a2 b l"]:
    """Returns positions with which generation continues at `following`, not at the last one + 1.

    transformers adds 1 to every row for each generated token. Two more rows hold the values one
    step before the first such token: -1, and `following` - 1. So the first of them is negative for
    the given tokens and counts the generated ones; the second is their position on all axes.
    """
    before = following.to(positions)[None, :, None].expand(1, -1, positions.shape[-1]) - 1  # 1 b l
    return torch.cat([positions, torch.full_like(before, -1), before])


def _take_axis_positions(decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Passes the positions on the axes to the rotary module, and row 0 to everything else.

    transformers derives masks and packed documents from the positions, so it must get text
    positions. Positions on several axes would fail in training, or silently count as documents.
    """
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        count = 1 + decoder.rotary_emb.num_axes
        axes = positions[1:count]
        if len(positions) > count:  # generation; prepared by `_with_following`
            generated, position = positions[count:]
            axes = torch.where(generated >= 0, position, axes)
        decoder.rotary_emb.axis_positions = axes.float()
        kwargs = kwargs | {"position_ids": positions[0].long()}
    return args, kwargs


def _drop_axis_positions(decoder: Any, args: tuple, output: Any) -> None:
    decoder.rotary_emb.axis_positions = None
