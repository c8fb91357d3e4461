"""How far a served model's log-probabilities are from the chain's own, and how far rounding alone takes them.

Two right implementations of one model differ: each rounds to BF16 where it likes, and where two experts score alike,
rounding decides between them. How much that is depends on the model, so it is measured: the chain in BF16 against the
same weights in float32. A served model may be farther off by a factor (`deploy.rounding`): two independent roundings
would be off by sqrt(2).

A damaged expert is seen by the tokens that are routed to it. So the distance is looked at expert by expert, on the
positions whose token the chain routes there; the upper quartile leaves out the few tokens that rounding sends to
another expert.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn

    from requant.streamed import StreamedModel

QUARTILE = 0.75
FEWEST = 32  # positions of an expert that are looked at by themselves
EVERYWHERE = "all tokens"


@dataclass(frozen=True)
class Row:
    """Token ids that are fed. ends[i]: how many of them make up the first i + 1 pieces; texts: the pieces, if any.

    What is compared comes behind each piece.
    """

    ids: list[int]
    ends: list[int]
    texts: list[str] = field(default_factory=list)

    @property
    def places(self) -> list[int]:
        """Index of the last token of each piece."""
        return [end - 1 for end in self.ends]


# What is compared of the logits [tokens, vocabulary] of a row: float64 [pieces, values].
View = Callable[["torch.Tensor", Row], "torch.Tensor"]


@dataclass
class Reading:
    """views: of each row [pieces, values]; experts: by (block, expert), for each row which pieces end in one of its
    tokens, bool [pieces]."""

    views: list["torch.Tensor"]
    experts: dict[tuple[int, int], list["torch.Tensor"]]


def centred(scores: "torch.Tensor") -> "torch.Tensor":
    """scores [..., labels], logits or log-probabilities, less their mean: what all constants fall out of."""
    scores = scores.double()
    return scores - scores.mean(-1, keepdim=True)


def read(model: "StreamedModel", rows: list[Row], view: View) -> Reading:
    """The chain's own views of `rows`, and the experts that its tokens reach: one pass."""
    import torch

    longest = max(len(row.ids) for row in rows)
    hidden = model.embed(torch.tensor([row.ids + [0] * (longest - len(row.ids)) for row in rows]))
    experts: dict[tuple[int, int], list[torch.Tensor]] = {}
    for index in range(model.blocks):
        block = model.block(index, model.quantize_activations)
        with _watched(block) as chosen:
            hidden = model.run(block, hidden)
        if chosen:
            routes = torch.cat(chosen).view(len(rows), longest, -1)
            for expert in routes.unique().tolist():
                reached = (routes == expert).any(-1)
                experts[index, expert] = [part[row.places] for part, row in zip(reached, rows, strict=True)]
    head = model.head()
    views = [view(head(states[: len(row.ids)]), row) for states, row in zip(hidden, rows, strict=True)]
    return Reading(views, experts)


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


def distances(these: list["torch.Tensor"], those: list["torch.Tensor"]) -> list["torch.Tensor"]:
    """For each row the root mean square of the differences of two views, nats, [pieces]."""
    return [(a - b).square().mean(-1).sqrt() for a, b in zip(these, those, strict=True)]


def farthest(found: list["torch.Tensor"], experts: dict[tuple[int, int], list["torch.Tensor"]]) -> tuple[float, str]:
    """The largest upper quartile of `found` over all positions, and over those of each expert; and whose it is."""
    import torch

    every = torch.cat(found)
    parts = {EVERYWHERE: every}
    for (block, expert), reached in experts.items():
        here = every[torch.cat(reached)]
        if len(here) >= FEWEST:
            parts[f"tokens of expert {expert} of block {block}"] = here
    quartiles = {name: float(part.quantile(QUARTILE)) for name, part in parts.items()}
    name = max(quartiles, key=lambda name: quartiles[name])
    return quartiles[name], name
