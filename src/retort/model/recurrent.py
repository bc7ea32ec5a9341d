"""What all state-space mixers do alike: in parallel, from a state, one token at a time.

Shapes: B rows, T tokens, D model width, H heads, P head channels, N state, E conv channels,
W the convolution's past inputs, X = W + T.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from retort.model.causal_conv import CausalConv
from retort.model.context import Context
from retort.model.state import MambaState
from retort.ops import conv

Inputs = TypeVar("Inputs")


@dataclass(frozen=True)
class Unread(Generic[Inputs]):
    """What a mixer has computed of tokens that its state does not hold: the inputs of the
    recurrence, and those of the convolution with the ones before them.
    """

    inputs: Inputs
    conv_BXE: Tensor


class Recurrent(nn.Module, Generic[Inputs]):
    """A mixer between projections: `_inputs` of the recurrence, the recurrence, `_output`."""

    conv1d: CausalConv

    def forward(self, u_BTD: Tensor, context: Context, state: MambaState | None = None) -> Tensor:
        """The mixer's output; with a state, it continues from it and updates it in place."""
        inputs = self._inputs(u_BTD, context, state)
        if state is None:
            y_BTHP, _ = self._scan(inputs, self._zeros(u_BTD.shape[0]), context)
        elif u_BTD.shape[1] == 1 and context.valid_BT is None:
            y_BTHP, next_BHPN = self._step(inputs, state.ssm_BHPN)
            state.ssm_BHPN.copy_(next_BHPN)
        else:
            y_BTHP, last_BHPN = self._scan(inputs, state.ssm_BHPN, context)
            state.ssm_BHPN.copy_(last_BHPN)
        return self._output(y_BTHP, inputs)

    def ahead(
        self, u_BTD: Tensor, context: Context, state: MambaState
    ) -> tuple[Tensor, Unread[Inputs]]:
        """The output of two tokens or more, and what `keep` needs; the state stays as it is."""
        # With room for the past inputs and for those of all tokens, in which they are found again.
        longer_BXE = pad(state.conv_BWE, (0, 0, u_BTD.shape[1], 0))
        inputs = self._inputs(u_BTD, context, MambaState(state.ssm_BHPN, longer_BXE))
        y_BTHP = self._outputs_ahead(inputs, state.ssm_BHPN)
        return self._output(y_BTHP, inputs), Unread(inputs, longer_BXE)

    def keep(self, unread: Unread[Inputs], state: MambaState, count_B: Tensor) -> None:
        """Moves the state on by the first `count_B` of the tokens read ahead, in place."""
        past = state.conv_BWE.shape[1]
        before_BWE, new_BTE = unread.conv_BXE[:, :past], unread.conv_BXE[:, past:]
        kept_BT = torch.arange(new_BTE.shape[1], device=count_B.device) < count_B[:, None]
        self._advance_(unread.inputs, kept_BT, state.ssm_BHPN)
        state.conv_BWE.copy_(conv.last_inputs(new_BTE, past + 1, count_B, before_BWE))

    def init_state(self, batch: int, max_length: int) -> MambaState:
        """The state of a mixer that has read nothing; its size does not depend on the length."""
        return MambaState(self._zeros(batch), self.conv1d.empty_past(batch))

    def _inputs(self, u_BTD: Tensor, context: Context, state: MambaState | None) -> Inputs:
        """What the recurrence and the output read; the convolution's part of a state is updated."""
        raise NotImplementedError

    def _scan(self, inputs: Inputs, start_BHPN: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """Outputs y_BTHP and the last state, from a first one."""
        raise NotImplementedError

    def _step(self, inputs: Inputs, state_BHPN: Tensor) -> tuple[Tensor, Tensor]:
        """The same for a single token, T = 1."""
        raise NotImplementedError

    def _outputs_ahead(self, inputs: Inputs, state_BHPN: Tensor) -> Tensor:
        """Outputs y_BTHP of a few tokens, from a state that stays as it is."""
        raise NotImplementedError

    def _advance_(self, inputs: Inputs, kept_BT: Tensor, state_BHPN: Tensor) -> None:
        """Moves a state on by those of a few tokens where `kept_BT`, in place."""
        raise NotImplementedError

    def _output(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        """Skip, gate and projection."""
        raise NotImplementedError

    def _zeros(self, batch: int) -> Tensor:
        """The recurrent state, in float32, of rows that have read nothing."""
        raise NotImplementedError
