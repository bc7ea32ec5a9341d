"""MambaInLlama's Mamba-1 mixer (arXiv 2408.15237; the scan is that of Mamba, arXiv 2312.00752).

Shapes: B rows, T tokens, D model width, E inner width, X the width of x and B before they are
repeated, R rank of dt, H heads of P = N channels with a state of N for each channel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu, softplus

from retort.model.causal_conv import CausalConv
from retort.model.config import DecoderConfig, Mamba1Config
from retort.model.context import Context
from retort.model.mamba2 import random_dt_bias
from retort.model.recurrent import Recurrent
from retort.model.state import MambaState
from retort.ops import scan


@dataclass(frozen=True)
class Inputs:
    """What the scan and the gate read. All but the gate is in float32."""

    gate_BTE: Tensor
    x_BTHP: Tensor
    dt_BTHP: Tensor
    b_BTHN: Tensor
    c_BTHN: Tensor


class Mamba1(Recurrent[Inputs]):
    """h_t = exp(dt A) h_{t-1} + dt x B, y = h C + D x, with a decay for each channel and state.

    It has no mixing matrix for each head: every channel mixes tokens in its own way.
    """

    def __init__(self, decoder: DecoderConfig, config: Mamba1Config) -> None:
        super().__init__()
        self.config = config
        self.in_proj = nn.Linear(decoder.hidden_size, sum(self._sizes()), bias=False)
        self.conv1d = CausalConv(config.inner, config.conv_width, activated=True)
        self.dt_proj = nn.Linear(config.dt_rank, config.inner)
        self.A_log = nn.Parameter(torch.zeros(config.inner, config.state_size))
        self.D = nn.Parameter(torch.ones(config.inner))
        self.out_proj = nn.Linear(config.inner, decoder.hidden_size, bias=False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fresh A, dt and D: A = -(1 .. N) in every channel, dt as Mamba-1 starts, D = 1."""
        self.A_log.copy_(torch.arange(1, self.config.state_size + 1).log())
        bound = self.config.dt_rank**-0.5
        self.dt_proj.weight.uniform_(-bound, bound)
        bias = random_dt_bias(self.dt_proj.bias)
        self.dt_proj.bias.copy_(bias)
        self.D.fill_(1)

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the rows of in_proj for x, B and C."""
        _, x, b, c, _ = self.in_proj.weight.split(self._sizes())
        return x, b, c

    def _inputs(self, u_BTD: Tensor, context: Context, state: MambaState | None) -> Inputs:
        z_BTE, x_BTX, b_BTX, c_BTE, low_BTR = self.in_proj(u_BTD).split(self._sizes(), dim=-1)
        x_BTE = self.conv1d(self.repeat(x_BTX), context, state)
        dt_BTE = softplus(linear(low_BTR, self.dt_proj.weight).float() + self._dt_bias())
        if context.valid_BT is not None:
            # A token with dt = 0 neither decays the state nor adds to it.
            dt_BTE = dt_BTE * context.valid_BT[..., None]
        x_BTHP, dt_BTHP = self._heads(x_BTE.float()), self._heads(dt_BTE)
        b_BTHN, c_BTHN = self._heads(self.repeat(b_BTX).float()), self._heads(c_BTE.float())
        return Inputs(z_BTE, x_BTHP, dt_BTHP, b_BTHN, c_BTHN)

    def _dt_bias(self) -> Tensor:
        bias_E = self.dt_proj.bias.float()
        return 2 * bias_E if self.config.released_quirks else bias_E

    def repeat(self, x_BTX: Tensor) -> Tensor:
        """x or B of the key/value heads, once for every head that shares it."""
        config = self.config
        width = config.state_size if config.released_quirks else config.head_dim
        pieces = x_BTX.unflatten(-1, (-1, width))
        return pieces.repeat_interleave(config.heads // config.kv_heads, dim=-2).flatten(-2)

    def _scan(self, inputs: Inputs, start_BHPN: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        return scan.scan_chunked(
            inputs.x_BTHP,
            inputs.dt_BTHP,
            self._rate(),
            inputs.b_BTHN,
            inputs.c_BTHN,
            start_BHPN,
            context.document_BT,
            self.config.chunk_size,
        )

    def _step(self, inputs: Inputs, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        y_BHP, next_BHPN = scan.step(
            inputs.x_BTHP[:, 0],
            inputs.dt_BTHP[:, 0],
            self._rate(),
            inputs.b_BTHN[:, 0],
            inputs.c_BTHN[:, 0],
            state_BHPN,
        )
        return y_BHP[:, None], next_BHPN

    def _outputs_ahead(self, inputs: Inputs, state_BHPN: Tensor) -> Tensor:
        y_BTHP, _ = self._few(inputs, inputs.dt_BTHP, state_BHPN)
        return y_BTHP

    def _advance_(self, inputs: Inputs, kept_BT: Tensor, state_BHPN: Tensor) -> None:
        # A token with dt = 0 neither decays the state nor adds to it.
        dt_BTHP = inputs.dt_BTHP * kept_BT[..., None, None]
        state_BHPN.copy_(self._few(inputs, dt_BTHP, state_BHPN)[1])

    def _few(self, inputs: Inputs, dt_BTHP: Tensor, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """Token by token: a scan in chunks would hold a state for each of these few tokens."""
        return scan.scan_sequential(
            inputs.x_BTHP, dt_BTHP, self._rate(), inputs.b_BTHN, inputs.c_BTHN, state_BHPN
        )

    def _output(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        y_BTE = (y_BTHP + self._heads(self.D.float()) * inputs.x_BTHP).flatten(2)
        gated_BTE = y_BTE * silu(inputs.gate_BTE.float())
        return self.out_proj(gated_BTE.to(inputs.gate_BTE.dtype))

    def _rate(self) -> Tensor:
        """A, by head: a_HPN."""
        return -self.A_log.float().exp().unflatten(0, (-1, self.config.state_size))

    def _heads(self, x_E: Tensor) -> Tensor:
        """Channels in heads of N, each of which shares one B and one C."""
        return x_E.unflatten(-1, (-1, self.config.state_size))

    def _sizes(self) -> list[int]:
        """Rows of in_proj: z | x | B | C | dt."""
        config = self.config
        return [config.inner, config.kv_inner, config.kv_inner, config.inner, config.dt_rank]

    def _zeros(self, batch: int) -> Tensor:
        state = self.config.state_size
        shape = batch, self.config.inner // state, state, state
        return torch.zeros(shape, dtype=torch.float32, device=self.D.device)
