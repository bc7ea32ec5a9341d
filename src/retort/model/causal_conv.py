"""The short convolution in front of a state-space mixer, as a module.

Shapes: B rows, T tokens, E channels, K taps, W = K - 1 past inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from retort.model.context import Context
from retort.model.state import MambaState
from retort.ops import conv


class CausalConv(nn.Module):
    """A causal depthwise convolution with the parameters, and their shapes, of `nn.Conv1d`; where
    `activated`, silu of it.
    """

    def __init__(self, channels: int, width: int, activated: bool) -> None:
        super().__init__()
        self.width, self.activated = width, activated
        bound = width**-0.5
        self.weight = nn.Parameter(torch.empty(channels, 1, width).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(channels).uniform_(-bound, bound))

    def forward(self, x_BTE: Tensor, context: Context, state: MambaState | None) -> Tensor:
        """The outputs y_BTE; with a state, its past inputs come first and are updated in place.

        A state of more past inputs than the taps reach back holds on to the older ones.
        """
        if state is None:
            return self._scan(x_BTE, None, context)
        if x_BTE.shape[1] == 1 and context.valid_BT is None:
            weight_EK = self.weight.squeeze(1)
            y_BE, past_BWE = conv.step(x_BTE.squeeze(1), weight_EK, self.bias, state.conv_BWE)
            state.conv_BWE.copy_(past_BWE)
            return (silu(y_BE) if self.activated else y_BE)[:, None]
        before_BWE = state.conv_BWE.clone()
        count_B = context.count_B
        if count_B is None:
            count_B = torch.full(x_BTE.shape[:1], x_BTE.shape[1], device=x_BTE.device)
        held = before_BWE.shape[1]
        state.conv_BWE.copy_(conv.last_inputs(x_BTE, held + 1, count_B, before_BWE))
        reached_BWE = before_BWE[:, held - (self.width - 1) :]
        return self._scan(x_BTE, reached_BWE, context)

    def _scan(self, x_BTE: Tensor, state_BWE: Tensor | None, context: Context) -> Tensor:
        weight_EK = self.weight.squeeze(1)
        documents = context.document_BT
        return conv.scan(x_BTE, weight_EK, self.bias, state_BWE, documents, self.activated)

    def empty_past(self, batch: int) -> Tensor:
        """The past inputs of rows that have read nothing, conv_BWE."""
        return self.weight.new_zeros(batch, self.width - 1, self.weight.shape[0])

    @torch.no_grad()
    def pass_through(self) -> None:
        """Makes it hand on the current input."""
        self.bias.zero_()
        self.weight.zero_()
        self.weight[:, :, -1] = 1
