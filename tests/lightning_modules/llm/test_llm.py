"""Decoders of transformers from a folder, a GGUF file or a config."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config

from lightning_modules.llm.causal_lm import CausalLM
from lightning_modules.rotary.base import RotaryEmbedding
from lightning_modules.rotary.videorope import VideoRope
from lightning_modules.spec import build

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


@torch.no_grad()
def hidden(llm, embeds):
    positions = VideoRope().batch_positions([[embeds.shape[1]]] * embeds.shape[0])
    return llm(embeds, None, positions)


@pytest.mark.parametrize("config", [LlamaConfig, Qwen2Config])
def test_from_a_folder(tmp_path, config):
    saved = AutoModelForCausalLM.from_config(config(**SIZES)).eval()
    saved.save_pretrained(tmp_path)
    llm = CausalLM(source=str(tmp_path)).eval()
    llm.replace_rotary(lambda original: RotaryEmbedding(VideoRope(), original))
    embeds = torch.randn(2, 9, 64)
    stock = saved.get_decoder()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(hidden(llm, embeds), stock, atol=1e-5, rtol=0)


def test_a_spec_needs_the_folder_no_more(tmp_path):
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained(tmp_path)
    llm = CausalLM(source=str(tmp_path)).eval()
    again = build(llm.to_spec()).eval()
    again.load_state_dict(llm.state_dict())
    embeds = torch.randn(1, 5, 64)
    assert torch.equal(again.embed(torch.tensor([[3]])), llm.embed(torch.tensor([[3]])))
    assert torch.equal(again.head(embeds), llm.head(embeds))


def write_gguf(path, model):
    """Writes a llama in the names and permutation of llama.cpp, which transformers reverses."""
    gguf = pytest.importorskip("gguf")
    config, heads = model.config, model.config.num_attention_heads
    names = {
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "model.layers.": "blk.",
        "lm_head": "output",
    }
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy().astype(np.float32)
        if "q_proj" in name or "k_proj" in name:
            rows, columns = data.shape
            data = data.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
            data = data.reshape(rows, columns)
        for theirs, llama_cpp in names.items():
            name = name.replace(theirs, llama_cpp)
        writer.add_tensor(name, np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_from_a_gguf_file(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False)).eval()
    write_gguf(tmp_path / "tiny.gguf", model)
    llm = CausalLM(source=str(tmp_path / "tiny.gguf")).eval()
    llm.replace_rotary(lambda original: RotaryEmbedding(VideoRope(), original))
    embeds = torch.randn(1, 6, 64)
    stock = model.get_decoder()(inputs_embeds=embeds).last_hidden_state
    torch.testing.assert_close(hidden(llm, embeds), stock, atol=1e-5, rtol=0)
    # Plain floats again, so they can be trained and saved.
    assert all(parameter.dtype == torch.float32 for parameter in llm.parameters())
    llm.lm.save_pretrained(tmp_path / "again")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "either `source`"),
        ({"source": "x", "config": {"model_type": "llama"}}, "either `source`"),
        ({"config": {"hidden_size": 8}}, "model_type"),
    ],
)
def test_mistakes(arguments, message):
    with pytest.raises(ValueError, match=message):
        CausalLM(**arguments)


def test_blocks_are_the_layers():
    llm = CausalLM(config={"model_type": "qwen2", **SIZES})
    assert llm.blocks() == list(llm.lm.model.layers)
