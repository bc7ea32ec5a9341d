"""What all state-space mixers do alike: in parallel, from a state, one token at a time.

Shapes: B rows, T tokens, D model width, H heads, P head channels, N state.
"""

from __future__ import annotations

from typing import Generic, TypeVar

from torch import Tensor, nn

from retort.model.causal_conv import CausalConv
from retort.model.context import Context
from retort.model.state import MambaState

Inputs = TypeVar("Inputs")


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

    def _output(self, y_BTHP: Tensor, inputs: Inputs) -> Tensor:
        """Skip, gate and projection."""
        raise NotImplementedError

    def _zeros(self, batch: int) -> Tensor:
        """The recurrent state, in float32, of rows that have read nothing."""
        raise NotImplementedError
