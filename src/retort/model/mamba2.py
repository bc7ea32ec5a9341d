"""The stock Mamba-2 mixer, the one that other runtimes serve (Dao and Gu 2024, arXiv 2405.21060).

Shapes: B rows, T tokens, D model width, E inner width, F conv channels (x, B and C), H heads,
P head channels, G groups, N state.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, silu, softplus

from retort.model.config import DecoderConfig
from retort.model.context import Context
from retort.model.state import MambaState
from retort.ops import conv, ssd


class GatedNorm(nn.Module):
    """Gate first, then RMS over each group's channels."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, y_BTE: Tensor, z_BTE: Tensor) -> Tensor:
        """The normalised product, in the dtype of the gate."""
        gated = (y_BTE.float() * silu(z_BTE.float())).unflatten(-1, (self.groups, -1))
        normed = rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(z_BTE.dtype)


class _Inputs(NamedTuple):
    """What the recurrence reads, in float32."""

    x_BTHP: Tensor
    dt_BTH: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor


class Mamba2(nn.Module):
    """S_t = exp(dt A) S_{t-1} + dt x B^T, y = S C + D x, between a gated norm and projections."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        assert config.mixer is not None
        self.config = mixer = config.mixer
        self.in_proj = nn.Linear(
            config.hidden_size, mixer.inner + mixer.conv_channels + mixer.heads, bias=False
        )
        self.conv1d = nn.Conv1d(
            mixer.conv_channels, mixer.conv_channels, mixer.conv_width, groups=mixer.conv_channels
        )
        self.dt_bias = nn.Parameter(torch.zeros(mixer.heads))
        self.A_log = nn.Parameter(torch.zeros(mixer.heads))
        self.D = nn.Parameter(torch.ones(mixer.heads))
        self.norm = GatedNorm(mixer.inner, mixer.groups, config.norm_eps)
        self.out_proj = nn.Linear(mixer.inner, config.hidden_size, bias=False)

    def forward(self, u_BTD: Tensor, context: Context, state: MambaState | None = None) -> Tensor:
        """The mixer's output; with a state, it continues from it and updates it in place."""
        z_BTE, xbc_BTF, dt_BTH = self._project(u_BTD, context)
        if state is None:
            start_BHPN = self._zeros(u_BTD.shape[0])
            inputs = self._convolved(xbc_BTF, dt_BTH, context, None)
            y_BTHP, _ = self._scan(inputs, start_BHPN, context)
        elif u_BTD.shape[1] == 1 and context.valid_BT is None:
            inputs = self._convolved_step(xbc_BTF, dt_BTH, state)
            y_BTHP = self._step(inputs, state)
        else:
            inputs = self._convolved(xbc_BTF, dt_BTH, context, state)
            y_BTHP, last_BHPN = self._scan(inputs, state.ssm_BHPN, context)
            state.ssm_BHPN.copy_(last_BHPN)
        y_BTE = (y_BTHP + self.D.float()[:, None] * inputs.x_BTHP).flatten(2)
        return self.out_proj(self.norm(y_BTE, z_BTE))

    def mixing_matrix(self, u_BTD: Tensor, context: Context) -> Tensor:
        """M_BHTS with y = M x: dt_s times the recurrence's matrix, plus D on the diagonal."""
        _, xbc_BTF, dt_BTH = self._project(u_BTD, context)
        inputs = self._convolved(xbc_BTF, dt_BTH, context, None)
        matrix_BHTS = ssd.mixing_matrix(
            self._log_decay(inputs.dt_BTH), inputs.b_BTGN, inputs.c_BTGN, context.document_BT
        )
        skip_HTS = torch.diag_embed(self.D.float()[:, None].expand(-1, u_BTD.shape[1]))
        return matrix_BHTS * inputs.dt_BTH.transpose(1, 2)[:, :, None] + skip_HTS

    def values(self, u_BTD: Tensor, context: Context) -> Tensor:
        """What the mixing matrix is applied to, x_BTHP."""
        _, xbc_BTF, dt_BTH = self._project(u_BTD, context)
        return self._convolved(xbc_BTF, dt_BTH, context, None).x_BTHP

    def init_state(self, batch: int, max_length: int) -> MambaState:
        """The state of a mixer that has read nothing; its size does not depend on the length."""
        conv_BWE = self.conv1d.weight.new_zeros(
            batch, self.config.conv_width - 1, self.config.conv_channels
        )
        return MambaState(self._zeros(batch), conv_BWE)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh A, dt and D: A = -U(1, 16), dt log-uniform in [1e-3, 1e-1], D = 1."""
        self.A_log.uniform_(1, 16).log_()
        dt_H = torch.empty_like(self.dt_bias).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        self.dt_bias.copy_(dt_H + torch.log(-torch.expm1(-dt_H)))  # the inverse of softplus
        self.D.fill_(1)

    def _project(self, u_BTD: Tensor, context: Context) -> tuple[Tensor, Tensor, Tensor]:
        mixer = self.config
        sizes = [mixer.inner, mixer.conv_channels, mixer.heads]
        z_BTE, xbc_BTF, dt_BTH = self.in_proj(u_BTD).split(sizes, dim=-1)
        dt_BTH = softplus(dt_BTH.float() + self.dt_bias.float())
        if context.valid_BT is not None:
            # A token with dt = 0 neither decays the state nor adds to it.
            dt_BTH = dt_BTH * context.valid_BT[..., None]
        return z_BTE, xbc_BTF, dt_BTH

    def _convolved(
        self, xbc_BTF: Tensor, dt_BTH: Tensor, context: Context, state: MambaState | None
    ) -> _Inputs:
        weight_EK, past_BWE = self.conv1d.weight.squeeze(1), None
        bias_E = self.conv1d.bias
        assert bias_E is not None
        if state is not None:
            past_BWE = state.conv_BWE.clone()
            batch, length = xbc_BTF.shape[:2]
            count_B = context.count_B
            if count_B is None:
                count_B = torch.full((batch,), length, device=xbc_BTF.device)
            taps = self.config.conv_width
            state.conv_BWE.copy_(conv.last_inputs(xbc_BTF, taps, count_B, past_BWE))
        out_BTF = conv.scan(xbc_BTF, weight_EK, bias_E, past_BWE, context.document_BT)
        return self._inputs(out_BTF, dt_BTH)

    def _convolved_step(self, xbc_B1F: Tensor, dt_B1H: Tensor, state: MambaState) -> _Inputs:
        bias_E = self.conv1d.bias
        assert bias_E is not None
        out_BF, past_BWE = conv.step(
            xbc_B1F.squeeze(1), self.conv1d.weight.squeeze(1), bias_E, state.conv_BWE
        )
        state.conv_BWE.copy_(past_BWE)
        return self._inputs(out_BF[:, None], dt_B1H)

    def _inputs(self, out_BTF: Tensor, dt_BTH: Tensor) -> _Inputs:
        mixer = self.config
        sizes = [mixer.inner, mixer.groups * mixer.state_size, mixer.groups * mixer.state_size]
        x_BTE, b_BTE, c_BTE = silu(out_BTF).float().split(sizes, dim=-1)
        return _Inputs(
            x_BTE.unflatten(-1, (mixer.heads, -1)),
            dt_BTH,
            b_BTE.unflatten(-1, (mixer.groups, -1)),
            c_BTE.unflatten(-1, (mixer.groups, -1)),
        )

    def _scan(self, inputs: _Inputs, start_BHPN: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return ssd.scan_chunked(
            inputs.x_BTHP * inputs.dt_BTH[..., None],
            self._log_decay(inputs.dt_BTH),
            inputs.b_BTGN,
            inputs.c_BTGN,
            start_BHPN,
            context.document_BT,
            self.config.chunk_size,
        )

    def _step(self, inputs: _Inputs, state: MambaState) -> Tensor:
        y_BHP, next_BHPN = ssd.step(
            (inputs.x_BTHP * inputs.dt_BTH[..., None])[:, 0],
            self._log_decay(inputs.dt_BTH)[:, 0],
            inputs.b_BTGN[:, 0],
            inputs.c_BTGN[:, 0],
            state.ssm_BHPN,
        )
        state.ssm_BHPN.copy_(next_BHPN)
        return y_BHP[:, None]

    def _log_decay(self, dt_BTH: Tensor) -> Tensor:
        return dt_BTH * -self.A_log.float().exp()

    def _zeros(self, batch: int) -> Tensor:
        mixer = self.config
        shape = batch, mixer.heads, mixer.head_dim, mixer.state_size
        return torch.zeros(shape, dtype=torch.float32, device=self.A_log.device)
