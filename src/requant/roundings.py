"""One chain with several roundings: what right implementations of one model differ by, measured on that model.

Each implementation rounds to BF16 where it likes. What comes of it depends on the model: where two experts score alike,
or two tokens, rounding decides between them. So the chain is run several times side by side: as it is, and with what
enters each block rounded anew, as another implementation would have it. Every block is read once for all of them.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from requant.streamed import StreamedModel

ROUNDINGS = 3  # beside the chain's own: enough to see most of the flips that another one may have
STEP = 2.0**-8  # half a step of BF16 at the lower end of a power of two, as a part of the value
SHORTEST = 0.75  # rows that are run together are at least this part of the longest


@dataclass
class Passed:
    """states[c][r]: last hidden states [tokens, width] of row r in chain c, the chain's own rounding first; experts: by
    (block, expert), for each row the tokens that the chain's own rounding sends there, bool [tokens]."""

    states: list[list["torch.Tensor"]]
    experts: dict[tuple[int, int], list["torch.Tensor"]]


def passed(model: "StreamedModel", rows: Sequence[Sequence[int]], roundings: int = ROUNDINGS) -> Passed:
    """Runs rows of token ids through `model`, and through it again with each of `roundings` other roundings."""
    import torch

    bundles = _bundles(rows)
    generators = [torch.Generator().manual_seed(seed) for seed in range(roundings)]
    hidden = []
    for bundle in bundles:
        longest = max(len(rows[number]) for number in bundle)
        tokens = torch.tensor([[*rows[number], *[0] * (longest - len(rows[number]))] for number in bundle])
        hidden.append([model.embed(tokens)] * (1 + roundings))
    experts: dict[tuple[int, int], list[torch.Tensor]] = {}
    for index in range(model.blocks):
        block = model.block(index, model.quantize_activations)
        for bundle, chains in zip(bundles, hidden, strict=True):
            with _watched(block) as chosen:
                output = model.run(block, chains[0])
            if chosen:
                _note(experts, index, torch.cat(chosen).view(*output.shape[:2], -1), bundle, rows)
            others = (model.run(block, again(x, g)) for x, g in zip(chains[1:], generators, strict=True))
            chains[:] = [output, *others]
    for chains in hidden:
        chains[1:] = [again(x, g) for x, g in zip(chains[1:], generators, strict=True)]
    places = {number: (at, row) for at, bundle in enumerate(bundles) for row, number in enumerate(bundle)}
    states = [
        [hidden[at][chain][row, : len(ids)] for number, ids in enumerate(rows) for at, row in [places[number]]]
        for chain in range(1 + roundings)
    ]
    return Passed(states, experts)


def again(hidden: "torch.Tensor", generator: "torch.Generator") -> "torch.Tensor":
    """`hidden` rounded anew: each value moved by up to STEP of itself either way, and rounded to its dtype.

    Beside the truth two independent roundings are 1 / sqrt(6) steps apart (root mean square), these are 1 / 2: a little
    more, for an implementation has roundings inside of a block too.
    """
    import torch

    noise = torch.rand(hidden.shape, generator=generator).mul_(2).sub_(1).to(hidden.device)
    return (hidden.float() * (1 + STEP * noise)).to(hidden.dtype)


def _bundles(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """Numbers of rows of like length, the longest first."""
    found: list[list[int]] = []
    for number in sorted(range(len(rows)), key=lambda number: -len(rows[number])):
        if not found or len(rows[number]) < SHORTEST * len(rows[found[-1][0]]):
            found.append([])
        found[-1].append(number)
    return found


def _note(
    experts: dict[tuple[int, int], list["torch.Tensor"]],
    block: int,
    routes: "torch.Tensor",
    bundle: list[int],
    rows: Sequence[Sequence[int]],
) -> None:
    """Adds what routes [bundled rows, tokens, k] says: which tokens each expert of `block` is sent."""
    import torch

    for expert in routes.unique().tolist():
        reached = (routes == expert).any(-1)
        noted = experts.setdefault((block, expert), [torch.zeros(len(ids), dtype=torch.bool) for ids in rows])
        for row, number in enumerate(bundle):
            noted[number] = reached[row, : len(rows[number])]


@contextmanager
def _watched(block: "nn.Module") -> Iterator[list["torch.Tensor"]]:
    """The experts chosen for each token, int [tokens, k] a batch, while the block runs."""
    from requant.blocks import Experts

    chosen: list[torch.Tensor] = []
    modules = [module for module in block.modules() if isinstance(module, Experts)]
    handles = [module.register_forward_pre_hook(lambda _, inputs: chosen.append(inputs[1].cpu())) for module in modules]
    try:
        yield chosen
    finally:
        for handle in handles:
            handle.remove()
