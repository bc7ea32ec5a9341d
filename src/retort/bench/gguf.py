"""A Llama as a GGUF file in float32, the format of llama.cpp."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from torch import Tensor

from retort.model.config import DecoderConfig
from retort.model.decoder import Block, Decoder


def write_gguf(decoder: Decoder, path: Path) -> None:
    """Writes a Llama with its weights, and without a tokenizer."""
    writer = import_module("gguf").GGUFWriter(path, "llama")
    _describe(writer, decoder.config)
    for name, tensor in tensors(decoder):
        writer.add_tensor(name, tensor.detach().contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: DecoderConfig) -> None:
    writer.add_block_count(config.layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")


def tensors(decoder: Decoder) -> Iterator[tuple[str, Tensor]]:
    """Weights by their names in GGUF; a tied head is left out."""
    yield "token_embd.weight", decoder.model.embed_tokens.weight
    yield "output_norm.weight", decoder.model.norm.weight
    if not decoder.config.tie_embeddings:
        yield "output.weight", decoder.lm_head.weight
    for i, block in enumerate(decoder.blocks):
        for name, tensor in _block(block, decoder.config):
            yield f"blk.{i}.{name}.weight", tensor


def _block(block: Block, config: DecoderConfig) -> Iterator[tuple[str, Tensor]]:
    attention, mlp = block.self_attn, block.mlp
    yield "attn_norm", block.input_layernorm.weight
    yield "attn_q", _paired(attention.q_proj.weight, config.heads)
    yield "attn_k", _paired(attention.k_proj.weight, config.kv_heads)
    yield "attn_v", attention.v_proj.weight
    yield "attn_output", attention.o_proj.weight
    yield "ffn_norm", block.post_attention_layernorm.weight
    yield "ffn_gate", mlp.gate_proj.weight
    yield "ffn_up", mlp.up_proj.weight
    yield "ffn_down", mlp.down_proj.weight


def _paired(weight: Tensor, heads: int) -> Tensor:
    """Rows in the order of llama.cpp's RoPE, which turns neighbours and not halves of a head."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
