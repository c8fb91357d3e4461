"""The routed experts of a block in three grouped products: a pass of a block, whatever the number of experts."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from requant.blocks import Expert, Experts
from requant.routed import Routing
from requant.stacks import kernels_for


@dataclass(frozen=True)
class Rows:
    """One pass of tokens through experts, a row for each token and expert: see `routed.Routing`.

    inputs [rows, width], inner [rows, intermediate]: the inputs of an expert's first Linears and of its last, rounded
    if it rounds them. outputs [rows, width]: before the gates.
    """

    routing: Routing
    inputs: torch.Tensor
    inner: torch.Tensor
    outputs: torch.Tensor


class Grouped:
    """The weights of `experts` side by side; those of its Linears become views of them."""

    def __init__(self, experts: Experts):
        first = experts[0]
        inner, width = first.gate_proj.weight.shape
        self.gate_up = first.gate_proj.weight.new_empty(len(experts), 2 * inner, width)
        self.down = first.gate_proj.weight.new_empty(len(experts), width, inner)
        for number, expert in enumerate(experts):
            _move(expert.gate_proj, self.gate_up[number, :inner])
            _move(expert.up_proj, self.gate_up[number, inner:])
            _move(expert.down_proj, self.down[number])
        self._observers: OrderedDict[int, Callable[[Rows], None]] = OrderedDict()

    def watch(self, observer: Callable[[Rows], None]) -> RemovableHandle:
        """Lets `observer` see the `Rows` of every pass, until the handle is removed."""
        handle = RemovableHandle(self._observers)
        self._observers[handle.id] = observer
        return handle

    def run(self, experts: Experts, hidden: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """The call of `Experts`."""
        kernels = kernels_for(hidden.device)
        routing = Routing.of(chosen, len(experts))
        into, between = (_input_scales(experts, leaf, routing) for leaf in ("gate_proj", "down_proj"))
        ends = routing.ends_of(slice(0, len(experts)))
        inputs = kernels.spread(hidden.contiguous(), routing.token, into)
        gate_up = nn.functional.grouped_mm(inputs, self.gate_up.transpose(1, 2), offs=ends)
        inner = kernels.gate(gate_up, routing.token, between)
        outputs = nn.functional.grouped_mm(inner, self.down.transpose(1, 2), offs=ends)
        for observer in self._observers.values():
            observer(Rows(routing, inputs, inner, outputs))
        return kernels.combine(outputs, routing.rows, gates.float().contiguous())


def group(block: nn.Module) -> nn.Module:
    """Lets the experts of a complete block run as `Grouped`, where they can."""
    for module in block.modules():
        if isinstance(module, Experts) and _can_be_grouped(module):
            module.grouped = Grouped(module)
    return block


def ungroup(block: nn.Module) -> None:
    """Lets the experts run one by one again, by their Linears."""
    for module in block.modules():
        if isinstance(module, Experts):
            module.grouped = None


def _can_be_grouped(experts: Experts) -> bool:
    """Gated by SiLU, and either all round their inputs or none does; a grouped row starts at 16 bytes."""
    if not all(type(expert.act_fn).__name__.startswith("SiLU") for expert in experts):
        return False
    if any(side % 16 for side in experts[0].gate_proj.weight.shape):
        return False
    scales = [[_scale_of(expert, leaf) for leaf in ("gate_proj", "up_proj", "down_proj")] for expert in experts]
    if all(scale is None for found in scales for scale in found):
        return True
    return all(None not in found and torch.equal(found[0], found[1]) for found in scales)


def _scale_of(expert: Expert, leaf: str) -> torch.Tensor | None:
    return getattr(getattr(expert, leaf), "input_scale", None)


def _input_scales(experts: Experts, leaf: str, routing: Routing) -> torch.Tensor | None:
    """float32 [rows]: the tensor scale that each row is rounded with; None if no rows are."""
    if _scale_of(experts[0], leaf) is None:
        return None
    scales = torch.cat([_scale_of(expert, leaf).float().reshape(1) for expert in experts])
    return scales.to(routing.expert.device)[routing.expert]


def _move(linear: nn.Linear, place: torch.Tensor) -> None:
    place.copy_(linear.weight)
    linear.weight = nn.Parameter(place, requires_grad=False)
