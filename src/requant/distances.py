"""How far a served model's log-probabilities are from the chain's own, and how far rounding alone takes them.

Two right implementations of one model differ, and how much is measured on the model: the distances of the chain's
other roundings (`requant.roundings`) from its own are what a right engine's may be like. A served model is held against
them as a whole: its distances may not be so many times larger in distribution (`deploy.rounding`), beyond what chance
does to samples of their size.

A damaged expert is seen by the tokens that are routed to it. So the same is asked expert by expert, of the positions
whose token the chain sends there, beside what rounding does to these very positions. The few tokens that rounding sends
to another expert are among either.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from requant import chance

if TYPE_CHECKING:
    import torch

    from requant.roundings import Passed

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


@dataclass(frozen=True)
class Part:
    """Positions that are looked at together. places: bool [positions of all rows]; noise: all distances of other
    roundings there; spread: their overdispersion (`chance`), at least that of parts in general."""

    name: str
    places: "torch.Tensor"
    noise: "torch.Tensor"
    spread: float


@dataclass
class Reading:
    """Views of rows, [pieces, values] each: as the chain itself has them, and by other roundings of it. experts: by
    (block, expert), for each row which pieces end in one of its tokens, bool [pieces]."""

    rows: list[Row]
    own: list["torch.Tensor"]
    others: list[list["torch.Tensor"]]
    experts: dict[tuple[int, int], list["torch.Tensor"]]

    @cached_property
    def noise(self) -> list[list["torch.Tensor"]]:
        """How far each other rounding is from the chain's own, by row."""
        return [distances(views, self.own) for views in self.others]

    @cached_property
    def parts(self) -> list[Part]:
        """All positions, and those of each expert that has enough of them."""
        import torch

        noise = torch.stack([torch.cat(part) for part in self.noise])
        places = {EVERYWHERE: distinct(self.rows)}
        for (block, expert), reached in self.experts.items():
            here = torch.cat(reached) & places[EVERYWHERE]
            if int(here.sum()) >= FEWEST:
                places[f"tokens of expert {expert} of block {block}"] = here
        spreads = {name: chance.overdispersion(noise[:, part]) for name, part in places.items()}
        apart = [spread for name, spread in spreads.items() if name != EVERYWHERE] or list(spreads.values())
        # Of a few repeats of one part little is known: what all parts say is the least.
        usual = max(1.0, sum(apart) / len(apart))
        spreads[EVERYWHERE] = usual
        return [Part(name, part, noise[:, part].flatten(), max(usual, spreads[name])) for name, part in places.items()]


@dataclass(frozen=True)
class Farthest:
    """So many times farther off than rounding takes them, for sure, are `positions` positions: those of `where`."""

    times: float
    where: str
    positions: int


def centred(scores: "torch.Tensor") -> "torch.Tensor":
    """scores [..., labels], logits or log-probabilities, less their mean: what all constants fall out of."""
    scores = scores.double()
    return scores - scores.mean(-1, keepdim=True)


def reading(
    done: "Passed", head: Callable[["torch.Tensor"], "torch.Tensor"], rows: list[Row], view: View, first: int = 0
) -> Reading:
    """The views of `rows`, which are those of `done` from number `first` on. head: final norm and output matrix."""
    numbers = range(first, first + len(rows))
    views = [
        [view(head(states[number]), row).cpu() for number, row in zip(numbers, rows, strict=True)]
        for states in done.states
    ]
    experts = {
        expert: [reached[number][row.places] for number, row in zip(numbers, rows, strict=True)]
        for expert, reached in done.experts.items()
    }
    return Reading(rows, views[0], views[1:], experts)


def distances(these: list["torch.Tensor"], those: list["torch.Tensor"]) -> list["torch.Tensor"]:
    """For each row the root mean square of the differences of two views, nats, [pieces]; NaN is left out."""
    return [(a - b).square().nanmean(-1).sqrt() for a, b in zip(these, those, strict=True)]


def seen_by(found: list["torch.Tensor"], read: Reading) -> Reading:
    """The reading of what an engine gave: what it has as NaN is NaN in all views, so that all have the same values."""

    def masked(views: list["torch.Tensor"]) -> list["torch.Tensor"]:
        return [view.masked_fill(row.isnan(), float("nan")) for view, row in zip(views, found, strict=True)]

    return Reading(read.rows, masked(read.own), [masked(views) for views in read.others], read.experts)


def farthest(found: list["torch.Tensor"], read: Reading) -> Farthest:
    """Where `found`, the distances of an engine by row, are farthest beyond those of other roundings of the chain."""
    import torch

    every = torch.cat(found)
    tried = []
    for part in read.parts:
        values = every[part.places]
        allowed = chance.apart(len(values) / part.spread, len(part.noise) / part.spread, len(read.parts))
        tried.append(Farthest(chance.times_larger(values, part.noise, allowed), part.name, len(values)))
    return max(tried, key=lambda it: it.times)


def distinct(rows: list[Row]) -> "torch.Tensor":
    """Bool [pieces of all rows]: not what another row has up to there too, which is the same computation again."""
    import torch

    seen: set[tuple[int, ...]] = set()
    found = []
    for row in rows:
        for end in row.ends:
            before = tuple(row.ids[:end])
            found.append(before not in seen)
            seen.add(before)
    return torch.tensor(found)
