"""REAP (arXiv 2510.13999): how much each routed expert of a block adds to the block's output.

The saliency of an expert is the mean, over the tokens routed to it, of its gate times the L2 norm of its output before
the gate. Routing and gates are the model's own, as the block's router gives them to `Experts`: scores, correction
bias, groups, renormalization and factor included. One pass over the calibration tokens serves every ratio and method.

A norm is float32, every sum over tokens is float64 in the order of the tokens: the same bytes on every run, with any
number of threads.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from requant.blocks import Experts
from requant.grouped import Rows
from requant.saliency import table_of

if TYPE_CHECKING:
    import pandas as pd


class Watch:
    """Sums over the tokens that pass through the experts of a block, by expert; empty before the first batch.

    tokens: int64, how many were routed to an expert; gates, mass: float64, the sums of their gates, and of gate x norm
    of the expert's output. All [experts], on the CPU.
    """

    def __init__(self):
        self.tokens = torch.zeros(0, dtype=torch.int64)
        self.gates, self.mass = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
        self._norms: list[torch.Tensor] = []

    def hooks(self, experts: Experts) -> list:
        """Lets the watch see every batch of `experts`, until the handles that this returns are removed."""
        if experts.grouped is not None:
            handles = [experts.grouped.watch(self._see_rows)]
        else:
            handles = [expert.register_forward_hook(self._see_expert) for expert in experts]
        return [*handles, experts.register_forward_hook(self._see_batch)]

    def table(self, groups: int) -> "pd.DataFrame":
        """The block's saliencies, for a router with `groups` groups (see `requant.saliency`)."""
        return table_of(self.tokens.tolist(), self.gates.tolist(), self.mass.tolist(), groups)

    def _see_expert(self, expert: nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._norms.append(torch.linalg.vector_norm(output, dim=-1, dtype=torch.float32))

    def _see_rows(self, rows: Rows) -> None:
        outputs = rows.outputs[rows.routing.token >= 0]
        self._norms.append(torch.linalg.vector_norm(outputs, dim=-1, dtype=torch.float32))

    def _see_batch(self, experts: Experts, inputs: tuple, output: torch.Tensor) -> None:
        """`Experts` runs its experts in ascending order, each on its tokens in their order: a stable sort's order."""
        chosen, order = inputs[1].flatten().sort(stable=True)
        gates = inputs[2].flatten()[order].double()
        mass = gates * torch.cat(self._norms).double()
        self._norms.clear()
        chosen = chosen.cpu()
        batch = (None, gates.cpu(), mass.cpu())  # bincount adds in order on a CPU, and in any order on a GPU
        found = [torch.bincount(chosen, weights, minlength=len(experts)) for weights in batch]
        sums = [self.tokens, self.gates, self.mass] if len(self.tokens) else [torch.zeros_like(new) for new in found]
        self.tokens, self.gates, self.mass = (old + new for old, new in zip(sums, found, strict=True))
