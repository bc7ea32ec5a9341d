"""The two Mamba-2 mixers: the stock one, which other runtimes serve (Dao and Gu 2024, arXiv
2405.21060), and Llamba's discrete one (arXiv 2502.14458, after phi-mamba, arXiv 2408.10189).

Both project their input, convolve x, B and C, run one linear recurrence, and gate what it gives.
They differ in the order of the projection, in activation and norm, and in where the decay is from.

Shapes: B rows, T tokens, D model width, E inner width, F conv channels (x, B and C), H heads,
P head channels, G groups, N state.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

from retort.model.causal_conv import CausalConv
from retort.model.config import DecoderConfig, DiscreteMamba2Config, Mamba2Config
from retort.model.context import Context
from retort.model.norms import GatedNorm
from retort.model.recurrent import Recurrent
from retort.model.state import MambaState
from retort.ops import kernels, norms, ssd

IDENTITY_GATE = 1.278464542761
"""The z with silu(z) = 1."""


@dataclass(frozen=True)
class Inputs:
    """What the recurrence and the gate read. All but the gate is in float32.

    `scale_BTH` multiplies x on its way into the state, and None is 1.
    """

    gate_BTE: Tensor
    x_BTHP: Tensor
    b_BTGN: Tensor
    c_BTGN: Tensor
    scale_BTH: Tensor | None
    log_decay_BTH: Tensor

    @property
    def values_BTHP(self) -> Tensor:
        """What the recurrence adds to the state, less B."""
        if self.scale_BTH is None:
            return self.x_BTHP
        return self.x_BTHP * self.scale_BTH[..., None]


class StateSpaceDual(Recurrent[Inputs]):
    """S_t = exp(a_t) S_{t-1} + s_t x_t B_t^T, y_t = S_t C_t + D x_t: what both mixers share."""

    D: nn.Parameter
    out_proj: nn.Linear

    def __init__(self, config: Mamba2Config | DiscreteMamba2Config) -> None:
        super().__init__()
        self.config = config

    def mixing_matrix(self, u_BTD: Tensor, context: Context) -> Tensor:
        """M_BHTS with y = M x: the recurrence's matrix times s_s, plus D on the diagonal."""
        inputs = self._inputs(u_BTD, context, None)
        matrix_BHTS = ssd.mixing_matrix(
            inputs.log_decay_BTH, inputs.b_BTGN, inputs.c_BTGN, context.document_BT
        )
        if inputs.scale_BTH is not None:
            matrix_BHTS = matrix_BHTS * inputs.scale_BTH.transpose(1, 2)[:, :, None]
        return matrix_BHTS + torch.diag_embed(self.D.float()[:, None].expand(-1, u_BTD.shape[1]))

    def values(self, u_BTD: Tensor, context: Context) -> Tensor:
        """What the mixing matrix is applied to, x_BTHP."""
        return self._inputs(u_BTD, context, None).x_BTHP

    def _gated(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        """With the skip, the gate, and the norm if there is one."""
        raise NotImplementedError

    def _output(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        return self.out_proj(self._gated(y_BTHP, inputs))

    def _split(self, xbc_BTF: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x_BTHP, b_BTGN and c_BTGN of what comes out of the convolution, in float32."""
        config = self.config
        shared = config.groups * config.state_size
        x_BTE, b_BTE, c_BTE = xbc_BTF.float().split([config.inner, shared, shared], dim=-1)
        groups = (config.groups, config.state_size)
        return (
            x_BTE.unflatten(-1, (config.heads, config.head_dim)),
            b_BTE.unflatten(-1, groups),
            c_BTE.unflatten(-1, groups),
        )

    def _scan(self, inputs: Inputs, start_BHPN: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        scan = kernels.open_scan(inputs.gate_BTE.device, inputs.gate_BTE.dtype)
        return scan(
            inputs.values_BTHP,
            inputs.log_decay_BTH,
            inputs.b_BTGN,
            inputs.c_BTGN,
            start_BHPN,
            context.document_BT,
            self.config.chunk_size,
        )

    def _step(self, inputs: Inputs, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        y_BHP, next_BHPN = ssd.step(
            inputs.values_BTHP[:, 0],
            inputs.log_decay_BTH[:, 0],
            inputs.b_BTGN[:, 0],
            inputs.c_BTGN[:, 0],
            state_BHPN,
        )
        return y_BHP[:, None], next_BHPN

    def _outputs_ahead(self, inputs: Inputs, state_BHPN: Tensor) -> Tensor:
        return ssd.outputs_ahead(
            inputs.values_BTHP, inputs.log_decay_BTH, inputs.b_BTGN, inputs.c_BTGN, state_BHPN
        )

    def _advance_(self, inputs: Inputs, kept_BT: Tensor, state_BHPN: Tensor) -> None:
        values_BTHP = inputs.values_BTHP.where(kept_BT[..., None, None], 0)
        log_decay_BTH = inputs.log_decay_BTH.where(kept_BT[..., None], 0)
        ssd.advance_(values_BTHP, log_decay_BTH, inputs.b_BTGN, state_BHPN)

    def _zeros(self, batch: int) -> Tensor:
        shape = batch, self.config.heads, self.config.head_dim, self.config.state_size
        return torch.zeros(shape, dtype=torch.float32, device=self.D.device)


class Mamba2(StateSpaceDual):
    """The stock mixer: a_t = dt_t A and s_t = dt_t, with a norm behind the gate."""

    def __init__(self, decoder: DecoderConfig, config: Mamba2Config) -> None:
        super().__init__(config)
        channels = config.inner + config.conv_channels + config.heads
        self.in_proj = nn.Linear(decoder.hidden_size, channels, bias=False)
        self.conv1d = CausalConv(config.conv_channels, config.conv_width, activated=True)
        self.dt_bias = nn.Parameter(torch.zeros(config.heads))
        self.A_log = nn.Parameter(torch.zeros(config.heads))
        self.D = nn.Parameter(torch.ones(config.heads))
        self.norm = GatedNorm(config.inner, config.groups, decoder.norm_eps)
        self.out_proj = nn.Linear(config.inner, decoder.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh A, dt and D: A = -U(1, 16), dt log-uniform in [1e-3, 1e-1], D = 1."""
        self.A_log.uniform_(1, 16).log_()
        self.dt_bias.copy_(random_dt_bias(self.dt_bias))
        self.D.fill_(1)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the rows of in_proj for x, B and C."""
        _, xbc, _ = self.in_proj.weight.split(self._sizes())
        return _xbc_rows(xbc, self.config)

    def _inputs(self, u_BTD: Tensor, context: Context, state: MambaState | None) -> Inputs:
        z_BTE, xbc_BTF, dt_BTH = self.in_proj(u_BTD).split(self._sizes(), dim=-1)
        dt_BTH = softplus(dt_BTH.float() + self.dt_bias.float())
        if context.valid_BT is not None:
            # A token with dt = 0 neither decays the state nor adds to it.
            dt_BTH = dt_BTH * context.valid_BT[..., None]
        x_BTHP, b_BTGN, c_BTGN = self._split(self.conv1d(xbc_BTF, context, state))
        log_decay_BTH = dt_BTH * -self.A_log.float().exp()
        return Inputs(z_BTE, x_BTHP, b_BTGN, c_BTGN, dt_BTH, log_decay_BTH)

    def _gated(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        return self.norm(y_BTHP.flatten(2), inputs.x_BTHP.flatten(2), self.D, inputs.gate_BTE)

    def _sizes(self) -> list[int]:
        """Rows of in_proj: z | x B C | dt."""
        return [self.config.inner, self.config.conv_channels, self.config.heads]


class DiscreteMamba2(StateSpaceDual):
    """Llamba's mixer: the decay exp(-softplus(a_t)) is projected, s_t = 1, and there is no norm."""

    def __init__(self, decoder: DecoderConfig, config: DiscreteMamba2Config) -> None:
        super().__init__(config)
        channels = config.conv_channels + config.inner + config.heads
        self.in_proj = nn.Linear(decoder.hidden_size, channels, bias=False)
        self.z_bias = nn.Parameter(torch.zeros(config.inner))
        self.conv1d = CausalConv(config.conv_channels, config.conv_width, activated=False)
        self.D = nn.Parameter(torch.ones(config.heads))
        self.out_proj = nn.Linear(config.inner, decoder.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh gate bias and D: 0 and 1."""
        self.z_bias.zero_()
        self.D.fill_(1)

    @torch.no_grad()
    def open_gate(self) -> None:
        """Makes the gate 1 for any input, and the convolution hand on the current one."""
        _, z, _ = self.in_proj.weight.split(self._sizes())
        z.zero_()
        self.z_bias.fill_(IDENTITY_GATE)
        self.conv1d.pass_through()

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the rows of in_proj for x, B and C."""
        xbc, _, _ = self.in_proj.weight.split(self._sizes())
        return _xbc_rows(xbc, self.config)

    def _inputs(self, u_BTD: Tensor, context: Context, state: MambaState | None) -> Inputs:
        xbc_BTF, z_BTE, a_BTH = self.in_proj(u_BTD).split(self._sizes(), dim=-1)
        log_decay_BTH = -softplus(a_BTH.float())
        scale_BTH = None
        if context.valid_BT is not None:
            scale_BTH = context.valid_BT[..., None].float().expand_as(log_decay_BTH)
            log_decay_BTH = log_decay_BTH * scale_BTH
        x_BTHP, b_BTGN, c_BTGN = self._split(self.conv1d(xbc_BTF, context, state))
        return Inputs(z_BTE + self.z_bias, x_BTHP, b_BTGN, c_BTGN, scale_BTH, log_decay_BTH)

    def _gated(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        y_BTE = (y_BTHP + self.D.float()[:, None] * inputs.x_BTHP).flatten(2)
        return norms.gated(inputs.gate_BTE.float(), y_BTE).to(inputs.gate_BTE.dtype)

    def _sizes(self) -> list[int]:
        """Rows of in_proj: x B C | z | a."""
        return [self.config.conv_channels, self.config.inner, self.config.heads]


def random_dt_bias(like: Tensor) -> Tensor:
    """Biases whose softplus is log-uniform in [1e-3, 1e-1], as Mamba starts (arXiv 2312.00752)."""
    dt = torch.empty_like(like).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
    return dt + torch.log(-torch.expm1(-dt))  # the inverse of softplus


def _xbc_rows(
    xbc: Tensor, config: Mamba2Config | DiscreteMamba2Config
) -> tuple[Tensor, Tensor, Tensor]:
    shared = config.groups * config.state_size
    x, b, c = xbc.split([config.inner, shared, shared])
    return x, b, c
