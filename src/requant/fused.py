"""The `fused` engine: SignRound over stacked weights, a block's experts in one matrix product.

The same algorithm as AutoRound's (see `signround`), made for many experts: the routed experts of a block are one
stack a projection, their tokens are sorted by expert, and quantize-dequantize, backward and step are one pass each
over the stack. Everything else in the block is transformers' own module.
"""

import random
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from requant.architecture import NEVER_TUNED, fused_groups
from requant.attention import attention_chosen
from requant.blocks import Experts
from requant.config import Tuning
from requant.devices import fed, prepare_device, same_bytes
from requant.errors import RequantError
from requant.nvfp4 import global_scale
from requant.routed import ROW_MULTIPLE, Routing
from requant.schemes import Scheme
from requant.stacks import LARGEST_PART, Schedule, Stack, kernels_for
from requant.threads import in_parts, side_by_side
from requant.tuned import Tuned, check_finite, lowest, settings

# Elements that a block's dense part leaves for its backward pass, a token, for each input and output of its Linears.
DENSE_ACTIVATIONS = 1.9


@dataclass
class Iteration:
    """Where the tuner is, as the backward pass needs to know it. more: other batches follow before the step."""

    index: int = 0
    more: bool = False
    used: set[int] = field(default_factory=set)

    def use(self, stack: Stack) -> None:
        """Notes that a stack's values are used. RuntimeError if they were already: a step is made at every use."""
        if id(stack) in self.used:
            raise RuntimeError(f"{next(iter(stack.rows))}: used twice in one pass of its block")
        self.used.add(id(stack))


class TunedLinears:
    """Linears of one input, tuned as one stack: the first that is asked computes the outputs of all.

    input_scale: float32 [1], the static tensor scale of their NVFP4 inputs.
    """

    def __init__(self, stack: Stack, input_scale: torch.Tensor | None, iteration: Iteration):
        self.stack, self.input_scale, self.iteration = stack, input_scale, iteration
        self.anchor = torch.zeros(0, device=stack.weight.device, requires_grad=True)
        self._input: torch.Tensor | None = None
        self._outputs: dict[str, torch.Tensor] = {}

    def output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """x [..., in] -> [..., out] of the Linear `name`."""
        if self._input is not x:
            self.iteration.use(self.stack)
            self._input = x
            rows = x.reshape(-1, x.shape[-1])
            scale = None if self.input_scale is None else self.input_scale.expand(len(rows)).contiguous()
            output = _Product.apply(rows, self.anchor, self.stack, scale, self.iteration)
            parts = output.view(*x.shape[:-1], -1).split(list(self.stack.rows.values()), dim=-1)
            self._outputs = dict(zip(self.stack.rows, parts, strict=True))
        output = self._outputs.pop(name)
        if not self._outputs:
            self._input = None
        return output


class TunedLinear(nn.Module):
    """One of `TunedLinears`, in the place of the Linear `name`."""

    def __init__(self, linear: nn.Linear, name: str, linears: TunedLinears):
        super().__init__()
        self.name, self.linears, self.bias = name, linears, linear.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.linears.output(self.name, x)
        return output if self.bias is None else output + self.bias


class Norm(nn.Module):
    """An RMSNorm of transformers in one pass each way; its weight is not tuned."""

    def __init__(self, norm: nn.Module, kernels: ModuleType):
        super().__init__()
        self.weight, self.epsilon, self.kernels = norm.weight, norm.variance_epsilon, kernels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Normalized.apply(x, self)


class _Normalized(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, norm):
        rows = x.detach().reshape(-1, x.shape[-1]).contiguous()
        out, roots = norm.kernels.normalize(rows, norm.weight.detach(), norm.epsilon)
        ctx.save_for_backward(rows, roots)
        ctx.norm = norm
        return out.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        rows, roots = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1]).contiguous()
        of_rows = ctx.norm.kernels.normalize_backward(flat, rows, ctx.norm.weight.detach(), roots)
        return of_rows.view_as(gradient), None


class TunedExperts(nn.Module):
    """The routed experts of a block, tuned; the call of `Experts`.

    gate_up, down: stacks of all experts, expert after expert; in gate_up each expert's gate rows before its up rows.
    input_scales: float32 [experts] of gate_up's and of down's inputs, NVFP4 only.
    """

    def __init__(
        self, gate_up: Stack, down: Stack, input_scales: tuple[torch.Tensor, torch.Tensor] | None, iteration: Iteration
    ):
        super().__init__()
        self.gate_up, self.down, self.input_scales, self.iteration = gate_up, down, input_scales, iteration
        self.count = len(down.rows)
        self.anchor = nn.Parameter(torch.zeros(0, device=gate_up.weight.device))

    def forward(self, hidden: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """hidden [tokens, width], chosen and gates [tokens, k] -> [tokens, width]: the gated sum of the experts."""
        self.iteration.use(self.down)
        routing = Routing.of(chosen, self.count)
        scales = (None, None) if self.input_scales is None else [scale[routing.expert] for scale in self.input_scales]
        return _Experts.apply(hidden, gates.float(), self.anchor, self, routing, scales)


class _Experts(torch.autograd.Function):
    """All routed experts at once."""

    @staticmethod
    def forward(ctx, hidden, gates, anchor, experts, routing, scales):
        hidden, gates = hidden.detach().contiguous(), gates.detach().contiguous()
        kernels = experts.down.kernels
        rows = kernels.spread(hidden, routing.token, scales[0])
        gate_up = product(rows, experts.gate_up, routing)
        inner = kernels.gate(gate_up, routing.token, scales[1])
        outputs = product(inner, experts.down, routing)
        ctx.save_for_backward(hidden, gates, rows, gate_up, inner, outputs)
        ctx.experts, ctx.routing, ctx.scales = experts, routing, scales
        return kernels.combine(outputs, routing.rows, gates)

    @staticmethod
    def backward(ctx, gradient):
        hidden, gates, rows, gate_up, inner, outputs = ctx.saved_tensors
        experts, routing, scales = ctx.experts, ctx.routing, ctx.scales
        down, kernels, iteration = experts.down, experts.down.kernels, experts.iteration
        gradient, of_gates = kernels.combine_backward(
            gradient.contiguous(), outputs, routing.token, routing.rows, gates
        )
        of_inner = product_backward(gradient, down, routing)
        step(down, gradient, inner, iteration, routing)
        gradient = kernels.gate_backward(of_inner, gate_up, routing.token, scales[1])
        of_rows = product_backward(gradient, experts.gate_up, routing)
        step(experts.gate_up, gradient, rows, iteration, routing)
        of_hidden = kernels.spread_backward(of_rows, hidden, routing.rows, scales[0])
        return of_hidden, of_gates, None, None, None, None


class _Product(torch.autograd.Function):
    """rows [rows, in] times the transposed weights of a stack.

    Inputs are rounded to NVFP4 on the way in if there is a scale [rows]. The backward pass spends the gradient of
    the weights on the stack's step.
    """

    @staticmethod
    def forward(ctx, x, anchor, stack, scale, iteration):
        x = x.detach().contiguous()
        rounded = x if scale is None else stack.kernels.round_inputs(x, scale)
        ctx.save_for_backward(x, rounded, scale)
        ctx.stack, ctx.iteration = stack, iteration
        return product(rounded, stack)

    @staticmethod
    def backward(ctx, gradient):
        x, rounded, scale = ctx.saved_tensors
        gradient = gradient.contiguous()
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = product_backward(gradient, ctx.stack)
            if scale is not None:
                of_x = ctx.stack.kernels.round_inputs_backward(of_x, x, scale)
        step(ctx.stack, gradient, rounded, ctx.iteration)
        return of_x, None, None, None, None


def product(x: torch.Tensor, stack: Stack, routing: Routing | None = None) -> torch.Tensor:
    """x [rows, in] times the stack's values, transposed -> [rows, out]; with a routing, each row with its expert's."""
    if routing is None:
        return torch.mm(x, stack.values().t())
    out = x.new_empty(len(x), len(stack.weight) // routing.experts)
    for experts, weight in parts_of(stack, routing):
        by_expert(x, weight.transpose(1, 2), out, experts, routing)
    return out


def product_backward(gradient: torch.Tensor, stack: Stack, routing: Routing | None = None) -> torch.Tensor:
    """gradient [rows, out] of `product` -> that of x [rows, in]."""
    if routing is None:
        return torch.mm(gradient, stack.values())
    out = gradient.new_empty(len(gradient), stack.weight.shape[1])
    for experts, weight in parts_of(stack, routing):
        by_expert(gradient, weight, out, experts, routing)
    return out


def step(
    stack: Stack, gradient: torch.Tensor, x: torch.Tensor, iteration: Iteration, routing: Routing | None = None
) -> None:
    """Spends gradient [rows, out] and x [rows, in] of `product` on a step of the stack's weights."""
    if routing is None:
        stack.step(torch.mm(gradient.t(), x), iteration.index, iteration.more)
        return
    rows = len(stack.weight) // routing.experts
    for first, last in stack.parts(rows):
        experts = slice(first // rows, last // rows)
        of_weight = weight_gradient(gradient, x, experts, routing)
        stack.step(of_weight.flatten(0, 1), iteration.index, iteration.more, first)


def parts_of(stack: Stack, routing: Routing) -> Iterator[tuple[slice, torch.Tensor]]:
    """Some experts at a time, with their values [experts, out, in]."""
    rows = len(stack.weight) // routing.experts
    for first, last in stack.parts(rows):
        yield slice(first // rows, last // rows), stack.values(first, last).unflatten(0, (-1, rows))


def by_expert(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, experts: slice, routing: Routing) -> None:
    """Fills the rows of `experts` in out [rows, n]: x [rows, m] times weight [experts, m, n], each with its own."""
    rows = routing.rows_of(experts)
    if x.is_cuda:
        out[rows] = nn.functional.grouped_mm(x[rows], weight, offs=routing.ends_of(experts))
    elif routing.size:
        left, products = (tensor[rows].unflatten(0, (-1, routing.size)) for tensor in (x, out))

        def work(first: int, last: int) -> None:
            torch.bmm(left[first:last], weight[first:last], out=products[first:last])

        in_parts(work, len(weight), x.nbytes)
    else:
        for expert in range(experts.start, experts.stop):
            part = routing.rows_of(slice(expert, expert + 1))
            torch.mm(x[part], weight[expert - experts.start], out=out[part])


def weight_gradient(gradient: torch.Tensor, x: torch.Tensor, experts: slice, routing: Routing) -> torch.Tensor:
    """gradient [rows, n], x [rows, m] of `by_expert` -> the gradient of the weights of `experts` [experts, n, m]."""
    rows = routing.rows_of(experts)
    if x.is_cuda:
        return nn.functional.grouped_mm(gradient[rows].t(), x[rows], offs=routing.ends_of(experts))
    shape = (experts.stop - experts.start, gradient.shape[1], x.shape[1])
    out = x.new_empty(shape) if routing.size else x.new_zeros(shape)
    if routing.size:
        left, right = (tensor[rows].unflatten(0, (-1, routing.size)) for tensor in (gradient, x))
        left = left.transpose(1, 2)

        def work(first: int, last: int) -> None:
            torch.bmm(left[first:last], right[first:last], out=out[first:last])

        in_parts(work, len(out), x.nbytes)
    else:
        for expert in range(experts.start, experts.stop):
            part = routing.rows_of(slice(expert, expert + 1))
            torch.mm(gradient[part].t(), x[part], out=out[expert - experts.start])
    return out


def tune(
    block: nn.Module,
    linears: list[str],
    hidden: torch.Tensor,
    targets: torch.Tensor,
    mask: torch.Tensor | None,
    positions: tuple[torch.Tensor, torch.Tensor],
    scheme: Scheme,
    tuning: Tuning,
    seed: int,
    report: Callable[[int, float], None],
) -> Tuned:
    """Tunes the rounding of the Linears `linears` of `block`; the block is taken apart for it.

    hidden, targets: BF16 [n, T, width], the block's inputs and the full-precision block's outputs. mask: [n, T],
    1 for tokens that count, or None. Linears carry `weight_global_scale` and `act_max`, float32 [1], where the
    scheme has them. report: called with (iteration, loss) as tuning goes on. Raises NotFinite at a loss that is no
    number.
    """
    device = torch.device(tuning.device)
    chosen = settings(scheme, tuning)
    schedule = Schedule(tuning.iters, chosen["lr"], chosen["minmax_lr"], tuning.minmax)
    iteration = Iteration()
    prepare_device(device)
    block.to(device)
    positions = tuple(part.to(device) for part in positions)
    stacks = take_apart(block, linears, scheme, schedule, iteration)
    batches = sample_order(len(hidden), tuning.batch_size, tuning.gradient_accumulate_steps, seed)
    order = [next(batches) for _ in range(tuning.iters)]
    losses: list[float] = []

    def squared_error(part: list[int], inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        iteration.used.clear()
        error = block(inputs, position_embeddings=positions).float() - wanted.float()
        if mask is not None:
            error = error * mask[part].to(device)[..., None]
        return error.square().sum()

    def in_batches(samples: list[int]) -> list[list[int]]:
        return [samples[start : start + tuning.batch_size] for start in range(0, len(samples), tuning.batch_size)]

    def loss_of_all() -> float:
        every = in_batches(list(range(len(hidden))))
        error = sum(squared_error(part, *rows).item() for part, rows in fed(device, [hidden, targets], every))
        return error / (tokens_of(every) * hidden.shape[-1])

    def tokens_of(batches: list[list[int]]) -> int:
        samples = [sample for batch in batches for sample in batch]
        return len(samples) * hidden.shape[1] if mask is None else int(mask[samples].sum())

    feed = fed(device, [hidden, targets], (part for samples in order for part in in_batches(samples)))
    attention = attention_chosen(block, device, hidden.shape[1])
    with side_by_side(tuning.threads), attention, same_bytes(device), closing(feed):
        for index, samples in enumerate(order):
            tokens = tokens_of([samples])
            iteration.index, total = index, 0.0
            parts = len(in_batches(samples))
            for number in range(parts):
                part, rows = next(feed)
                with torch.set_grad_enabled(index + 1 < tuning.iters):
                    loss = squared_error(part, *rows) / (tokens * hidden.shape[-1])
                total += loss.item()
                check_finite(total, index)
                iteration.more = number + 1 < parts
                if not iteration.more and is_kept(total, losses, tuning):
                    for stack in stacks:
                        stack.keep()
                if index + 1 < tuning.iters:
                    loss.backward()
            losses.append(total)
            report(index, total)
        kept, judged = lowest(losses, tuning), {}
        if tuning.judges_by_samples:
            with torch.no_grad():
                kept, judged = keep_best(stacks, kept, len(losses) - 1, loss_of_all)
    weights = {name: weight for stack in stacks for name, weight in stack.quantized().items()}
    return Tuned(weights, losses, kept, judged)


def keep_best(
    stacks: list[Stack], kept: int, last: int, loss_of_all: Callable[[], float]
) -> tuple[int, dict[int, float]]:
    """(the iteration whose parameters are kept, the loss over all samples of each that there was to choose from).

    Of iteration `kept`, whose parameters the stacks have kept, of the `last` one, whose they have now, and of plain
    rounding, iteration 0. What they have now is lost: there is no room for it beside plain rounding's.
    """

    def measure(iteration: int) -> None:
        judged[iteration] = loss_of_all()
        check_finite(judged[iteration], iteration, "loss over all samples")

    def keep_if_better(iteration: int) -> int:
        if iteration == kept or judged[iteration] >= judged[kept]:
            return kept
        for stack in stacks:
            stack.keep()
        return iteration

    judged: dict[int, float] = {}
    measure(last)
    if kept != last:
        for stack in stacks:
            stack.show_kept(True)
        measure(kept)
        for stack in stacks:
            stack.show_kept(False)
        kept = keep_if_better(last)
    if 0 not in judged:
        for stack in stacks:
            stack.reset()
        measure(0)
        kept = keep_if_better(0)
    return kept, dict(sorted(judged.items()))


def peak_bytes(block: nn.Module, tokens: int, choices: int, scheme: Scheme, iters: int) -> int:
    """Memory of a GPU at its peak while `block` (it may be on the meta device) is tuned, in bytes.

    tokens: of a step's batch; choices: experts a token goes to. Every weight has its BF16 value, its offset and its
    best code; every group its shrinks and its best scale; one part of the largest stack its values and their gradient.
    The backward pass of the experts comes on top of what the forward pass of everything else left.
    """
    schedule = Schedule(iters, 1.0, 1.0, True)
    whole = torch.empty(0, dtype=schedule.dtype).element_size()
    a_weight = 2 + whole + 1 + ((1 if scheme.is_nvfp4 else 2) * whole + 2) / scheme.group_size
    experts = next((module for module in block.modules() if isinstance(module, Experts)), None)
    routed = set() if experts is None else {linear for linear in experts.modules() if isinstance(linear, nn.Linear)}
    named = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
    weights = sum(linear.weight.numel() for linear in named.values())
    dense = [linear for name, linear in named.items() if linear not in routed and not NEVER_TUNED.search(f".{name}")]
    elements = DENSE_ACTIVATIONS * tokens * sum(linear.in_features + linear.out_features for linear in dense)
    stacks = [linear.weight.numel() for linear in dense]
    if experts is not None:
        inner, width = experts[0].gate_proj.weight.shape
        rows = tokens * choices + len(experts) * ROW_MULTIPLE
        elements += tokens * width + rows * (3 * width + 6 * inner)
        stacks += [2 * inner * width * len(experts)]
    part = min(max(stacks), LARGEST_PART // 2)
    return int(weights * a_weight + 2 * (elements + 2 * part))


def is_kept(loss: float, losses: list[float], tuning: Tuning) -> bool:
    """Whether the parameters of this loss, after those `losses`, are the ones to keep so far."""
    if tuning.best_mse:
        return not losses or loss < min(losses)
    return len(losses) + 1 == tuning.iters


def sample_order(samples: int, batch_size: int, batches: int, seed: int) -> Iterator[list[int]]:
    """The samples of each step, as AutoRound draws them: shuffled, an incomplete last batch left out."""
    generator = random.Random(seed)
    size = min(samples, batch_size * batches)
    order = list(range(samples))
    while True:
        generator.shuffle(order)
        for start in range(0, samples - size + 1, size):
            yield order[start : start + size]


def take_apart(
    block: nn.Module, linears: list[str], scheme: Scheme, schedule: Schedule, iteration: Iteration
) -> list[Stack]:
    """Puts tuned modules in the places of `linears`, all experts of a block together; their stacks."""
    stacks = []
    waiting = set(linears)
    for name, module in list(block.named_modules()):
        if type(module).__name__.endswith("RMSNorm") and module.weight.dtype == torch.bfloat16:
            block.set_submodule(name, Norm(module, kernels_for(module.weight.device)))
        if isinstance(module, Experts):
            inside = [linear for linear in linears if linear.startswith(f"{name}.")]
            if inside:
                tuned = _tuned_experts(name, module, scheme, schedule, iteration)
                block.set_submodule(name, tuned)
                stacks += [tuned.gate_up, tuned.down]
                waiting -= set(inside)
            else:
                module.grouped = None  # it gives no gradient to what comes before the experts
    for names in together(sorted(waiting)):
        modules = [block.get_submodule(name) for name in names]
        stack = _stack(names, modules, scheme, schedule)
        input_scale = None
        if scheme.quantizes_activations:
            input_scale = global_scale(modules[0].act_max).to(stack.weight.device)
        shared = TunedLinears(stack, input_scale, iteration)
        for name, module in zip(names, modules, strict=True):
            block.set_submodule(name, TunedLinear(module, name, shared))
        stacks.append(stack)
    return stacks


def together(linears: list[str]) -> list[list[str]]:
    """Linears that have one input, together; every other alone."""
    groups = fused_groups(linears)
    grouped = {name for group in groups for name in group}
    return groups + [[name] for name in linears if name not in grouped]


def _tuned_experts(
    name: str, experts: Experts, scheme: Scheme, schedule: Schedule, iteration: Iteration
) -> TunedExperts:
    leaves = ("gate_proj", "up_proj", "down_proj")
    activation = type(experts[0].act_fn).__name__
    if not activation.startswith("SiLU"):
        raise RequantError(f"{name}: activation {activation}; expected SiLU, or tuning.engine: auto_round")
    gate_up = [(f"{name}.{number}.{leaf}", getattr(expert, leaf)) for number, expert in enumerate(experts)
               for leaf in leaves[:2]]  # fmt: skip
    down = [(f"{name}.{number}.down_proj", expert.down_proj) for number, expert in enumerate(experts)]
    stacks = [_stack(*zip(*part, strict=True), scheme, schedule) for part in (gate_up, down)]
    scales = None
    if scheme.quantizes_activations:
        scales = tuple(
            torch.cat([global_scale(getattr(expert, leaf).act_max) for expert in experts]).to(stacks[0].weight.device)
            for leaf in leaves[1:]
        )
    return TunedExperts(*stacks, scales, iteration)


def _stack(names, linears, scheme: Scheme, schedule: Schedule) -> Stack:
    rows = {name: len(linear.weight) for name, linear in zip(names, linears, strict=True)}
    weight = torch.cat([linear.weight.detach() for linear in linears])
    tensor_scale = None
    if scheme.is_nvfp4:
        scales = [linear.weight_global_scale.expand(len(linear.weight)) for linear in linears]
        tensor_scale = torch.cat(scales).to(weight.device)
    return Stack(rows, weight, tensor_scale, scheme, schedule)
