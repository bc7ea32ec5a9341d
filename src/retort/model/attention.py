"""Grouped-query attention with rotary positions: the teacher's mixer, and what a hybrid keeps.

Shapes: B rows, T tokens, C model width, H query heads, K key/value heads, G = H/K, D head channels,
L cached positions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.functional import scaled_dot_product_attention

from retort.model.config import DecoderConfig
from retort.model.context import Context
from retort.model.norms import RMSNorm
from retort.model.state import AttentionState
from retort.ops.rotary import rotate


class Attention(nn.Module):
    """GQA with RoPE (arXiv 2305.13245, 2104.09864), causal within each document.

    Biases of q, k and v (Qwen2) and norms of each head's q and k (Qwen3) where the config has them.
    """

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.heads, config.kv_heads
        self.head_dim = config.head_dim
        width, kv_width = self.heads * self.head_dim, self.kv_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, config.norm_eps) if config.qk_norm else nn.Identity()

    def forward(
        self, u_BTC: Tensor, context: Context, state: AttentionState | None = None
    ) -> Tensor:
        """The mixer's output; with a state, its keys and values are extended in place."""
        q_BHTD, k_BKTD = self._rotated(u_BTC, context)
        v_BKTD = self._split(self.v_proj(u_BTC), self.kv_heads)
        if state is None and not is_compiling() and context.runs is not None:
            return self.o_proj(_attend_within(q_BHTD, k_BKTD, v_BKTD, context.runs).flatten(2))
        if state is not None:
            k_BKTD = _extend(state.k_BKLD, k_BKTD, context)
            v_BKTD = _extend(state.v_BKLD, v_BKTD, context)
        if state is not None and u_BTC.shape[1] == 1:
            y_BHTD = _attend_one(q_BHTD, k_BKTD, v_BKTD, context)
        else:
            mask = None if context.mask_BTL is None else context.mask_BTL[:, None]
            if mask is not None and u_BTC.is_cuda:
                # The one kernel that takes a mask and never has all of T x T takes no groups.
                times = self.heads // self.kv_heads
                k_BKTD, v_BKTD = (x.repeat_interleave(times, dim=1) for x in (k_BKTD, v_BKTD))
            y_BHTD = scaled_dot_product_attention(
                q_BHTD, k_BKTD, v_BKTD, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        return self.o_proj(y_BHTD.transpose(1, 2).flatten(2))

    def mixing_matrix(self, u_BTC: Tensor, context: Context) -> Tensor:
        """The attention weights, M_BHTS with rows that sum to 1."""
        q_BHTD, k_BKTD = self._rotated(u_BTC, context)
        k_BHTD = k_BKTD.repeat_interleave(self.heads // self.kv_heads, dim=1)
        score_BHTS = q_BHTD @ k_BHTD.transpose(-1, -2) * self.head_dim**-0.5
        if context.mask_BTL is None:
            keep = torch.ones_like(score_BHTS[0, 0], dtype=torch.bool).tril()
        else:
            keep = context.mask_BTL[:, None]
        return score_BHTS.float().masked_fill(~keep, float("-inf")).softmax(-1)

    def values(self, u_BTC: Tensor) -> Tensor:
        """What the mixing matrix is applied to, v_BTHD."""
        v_BKTD = self._split(self.v_proj(u_BTC), self.kv_heads)
        return v_BKTD.repeat_interleave(self.heads // self.kv_heads, dim=1).transpose(1, 2)

    def init_state(self, batch: int, max_length: int) -> AttentionState:
        """An empty cache with room for `max_length` tokens a row."""
        weight = self.k_proj.weight
        shape = batch, self.kv_heads, max_length, self.head_dim
        return AttentionState(weight.new_zeros(shape), weight.new_zeros(shape))

    def _rotated(self, u_BTC: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        q_BHTD = self.q_norm(self._split(self.q_proj(u_BTC), self.heads))
        k_BKTD = self.k_norm(self._split(self.k_proj(u_BTC), self.kv_heads))
        cos_BTD, sin_BTD = context.cos_BTD, context.sin_BTD
        return rotate(q_BHTD, cos_BTD, sin_BTD), rotate(k_BKTD, cos_BTD, sin_BTD)

    def _split(self, x_BTC: Tensor, heads: int) -> Tensor:
        return x_BTC.unflatten(-1, (heads, self.head_dim)).transpose(1, 2)


def _attend_within(q_BHTD: Tensor, k_BKTD: Tensor, v_BKTD: Tensor, runs: tuple[int, ...]) -> Tensor:
    """Causal attention within each document alone, y_BTHD: no mask, and no score that it hides."""
    batch = q_BHTD.shape[0]
    # All rows one behind the other: no document goes on from one to the next.
    parts = (x.transpose(0, 1).flatten(1, 2).split(runs, dim=1) for x in (q_BHTD, k_BKTD, v_BKTD))
    outputs = [
        scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
        for q, k, v in zip(*parts, strict=True)
    ]
    y_XHD = torch.cat([y.squeeze(0).transpose(0, 1) for y in outputs])
    return y_XHD.unflatten(0, (batch, -1))


def _extend(cache_BKLD: Tensor, new_BKTD: Tensor, context: Context) -> Tensor:
    """Writes new entries at their rows' positions; returns the part of the cache in reach."""
    position_BT = context.position_BT
    rows_B1 = torch.arange(position_BT.shape[0], device=position_BT.device)[:, None]
    cache_BKLD[rows_B1, :, position_BT] = new_BKTD.transpose(1, 2)
    return cache_BKLD[:, :, : context.reach]


def _attend_one(q_BH1D: Tensor, k_BKLD: Tensor, v_BKLD: Tensor, context: Context) -> Tensor:
    """One query a row: the queries of a group share one product with the group's keys."""
    assert context.mask_BTL is not None
    q_BKGD = q_BH1D.squeeze(2).unflatten(1, (k_BKLD.shape[1], -1))
    score_BKGL = q_BKGD @ k_BKLD.transpose(-1, -2) * q_BKGD.shape[-1] ** -0.5
    score_BKGL = score_BKGL.masked_fill(~context.mask_BTL[:, None], float("-inf"))
    y_BKGD = score_BKGL.float().softmax(-1).to(v_BKLD.dtype) @ v_BKLD
    return y_BKGD.flatten(1, 2).unsqueeze(2)
