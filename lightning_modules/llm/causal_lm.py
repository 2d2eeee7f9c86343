"""Any decoder of transformers with a rotary module of its own: the Llama and Qwen families."""

from collections.abc import Callable
from functools import lru_cache
from inspect import signature
from pathlib import Path
from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import AutoConfig, AutoModelForCausalLM, Cache, GgufConfig, PreTrainedModel
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids
from transformers.utils.generic import is_flash_attention_requested

from lightning_modules.llm.base import LanguageModel
from lightning_modules.llm.split import split_blocks
from lightning_modules.stage import set_attention


class CausalLM(LanguageModel):
    """transformers' own model; only its rotary module is ever replaced.

    Args:
        source: hub id, local folder or `.gguf` file whose weights to load; None: random weights.
        config: without `source`, the fields of the transformers config, `model_type` among them.
        attention: as transformers calls it: sdpa, eager, flash_attention_2, flex_attention, …
        dtype: of the weights loaded from `source`, by name; None: as they are stored.

    Raises:
        ValueError: neither or both of `source` and `config`, or a decoder without rotary module.
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
        if not hasattr(self.decoder, "rotary_emb"):
            raise ValueError(
                f"model.llm: {type(self.decoder).__name__} has no `rotary_emb` to replace; "
                "take a decoder of the Llama or Qwen family"
            )
        self.width = self.lm.config.hidden_size
        self.decoder.register_forward_pre_hook(_take_axis_positions, with_kwargs=True)
        self.decoder.register_forward_hook(_drop_axis_positions, always_call=True)

    @property
    def decoder(self) -> Any:
        """The LLM without its head."""
        return self.lm.get_decoder()

    def replace_rotary(self, build: Callable[[nn.Module], nn.Module]) -> None:
        self.decoder.rotary_emb = build(self.decoder.rotary_emb)

    def embed(self, ids: Int[Tensor, "*b l"]) -> Float[Tensor, "*b l m"]:
        return self.lm.get_input_embeddings()(ids)

    def forward(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b k"] | None,
        positions: Float[Tensor, "4 b l"],
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
        """What flash kernels take to keep the documents of all rows apart; others read `counts`."""
        implementation = self.lm.config._attn_implementation
        if not is_flash_attention_requested(requested_attention_implementation=implementation):
            return {}
        ends, longest = prepare_fa_kwargs_from_position_ids(counts)
        names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
        return dict(zip(names, (*ends, *longest), strict=True))

    def head(self, hidden: Float[Tensor, "*b m"]) -> Float[Tensor, "*b vocab"]:
        return self.lm.get_output_embeddings()(hidden)

    def generate(
        self,
        embeds: Float[Tensor, "b l m"],
        mask: Bool[Tensor, "b l"],
        positions: Float[Tensor, "4 b l"],
        **options,
    ) -> Int[Tensor, "b2 l2"]:
        return self.lm.generate(
            inputs_embeds=embeds, attention_mask=mask.long(), position_ids=positions, **options
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
        """As transformers asks a part of a model, so that tied weights are saved once."""
        return {f"lm.{a}": f"lm.{b}" for a, b in self.lm.all_tied_weights_keys.items()}


@lru_cache
def _cache_argument(decoder: type[nn.Module]) -> str:
    """Name of the decoder's argument for a KV cache.

    transformers 5.24 renamed `past_key_values` to `cache`, one model family at a time. The old
    name still works there, with a warning.
    """
    return "cache" if "cache" in signature(decoder.forward).parameters else "past_key_values"


def _load(source: str, dtype: str | None) -> PreTrainedModel:
    # Left open, transformers asks in the terminal whether to run code that comes with weights.
    options: dict[str, Any] = {"dtype": dtype or "auto", "trust_remote_code": False}
    if source.endswith(".gguf"):
        path = Path(source).expanduser()
        # Dequantised weights are plain floats, which can be trained and saved.
        options |= {
            "gguf_file": path.name,
            "quantization_config": GgufConfig(dequantize=True),
            "dtype": dtype or "float32",
        }
        source = str(path.parent)
    return AutoModelForCausalLM.from_pretrained(source, **options)


def _make(config: dict[str, Any]) -> PreTrainedModel:
    fields = dict(config)
    if "model_type" not in fields:
        raise ValueError("model.llm.config needs `model_type`, such as qwen2 or llama")
    width, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    if width and heads and not fields.get("head_dim") and width % heads:
        raise ValueError(
            f"model.llm.config.hidden_size {width} is no multiple of num_attention_heads {heads}"
        )
    made = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(made, trust_remote_code=False)


def _take_axis_positions(decoder: Any, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """Hands rows 1 to 3 of the positions to the rotary module, and row 0 to everything else.

    transformers reads masks and packed documents out of the positions; it must see text positions
    there. Bare positions on three axes fail in training, or are silently taken for documents.
    """
    positions = kwargs.get("position_ids")
    if positions is not None and positions.ndim == 3:
        decoder.rotary_emb.axis_positions = positions[1:].float()
        kwargs = kwargs | {"position_ids": positions[0].long()}
    return args, kwargs


def _drop_axis_positions(decoder: Any, args: tuple, output: Any) -> None:
    decoder.rotary_emb.axis_positions = None
