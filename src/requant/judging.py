"""What an engine answered, held against requant's own chain of the packed checkpoint: verdicts.

The chain is run with the arithmetic that the engine has, as it is and with other roundings beside it: what right
implementations of this very model differ by is measured where the engine is judged.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from requant import chance, smoke, vocabulary
from requant.config import Deploy
from requant.distances import Reading, distances, farthest, reading, seen_by
from requant.engine_client import echo_rows
from requant.jobs import progress
from requant.questions import Asked
from requant.records import Arithmetic, Check, ReferenceText
from requant.replay import Served, differing, find_control, replay
from requant.roundings import ROUNDINGS, passed
from requant.smoke import Allowed
from requant.smoke_texts import Texts

if TYPE_CHECKING:
    from requant.packed import PackedCheckpoint
    from requant.streamed import StreamedModel

DECIMALS = 1e-6  # nats, to which evaluate.json has log-probabilities
LONG_TAIL = 64  # places at the end of a long prompt that are looked at for what rounding does


@dataclass
class Judgement:
    """checks: all of them, in order; allowed: how many served tokens may be other than the chain's choice; control:
    what it lacks, None if there is none, and its agreement."""

    checks: list[Check]
    allowed: Allowed
    control: str | None = None
    control_agreement: float = 1.0


def chain_of(checkpoint: "PackedCheckpoint", arithmetic: Arithmetic) -> "StreamedModel":
    """The chain of a release that has an engine's arithmetic."""
    from requant.streamed import StreamedModel

    rounds = {"all": True, "none": False}.get(arithmetic.rounds, arithmetic.rounds)
    return StreamedModel(checkpoint, quantize_activations=rounds)


def evaluated_alike(reference: ReferenceText, arithmetic: Arithmetic) -> ReferenceText | None:
    """The reference text with the log-probabilities that this arithmetic gave at the evaluation; None if none did."""
    if arithmetic.rounds == "all" or reference.weights_alone is None:
        return reference
    if arithmetic.rounds != "none":
        return None
    return reference.model_copy(update={"log_probabilities": reference.weights_alone, "weights_alone": None})


def judge(
    release: str,
    checkpoint: "PackedCheckpoint",
    arithmetic: Arithmetic,
    texts: Texts,
    asked: Asked,
    settings: Deploy,
    reference: ReferenceText,
    tokenizer: Any,
) -> Judgement:
    """Verdicts on all checks.

    The chain is run for the answers, for the control, and, with other roundings beside it, for all texts once.
    """
    own = chain_of(checkpoint, arithmetic)
    everything = [*asked.served, *asked.together]
    progress(f"{release}: replaying the served tokens, block by block")
    replay(own, tokenizer, everything)
    replay(own, tokenizer, asked.long)
    answers, long = _rows_of(everything), _rows_of(asked.long)
    shown, recorded = [*texts.rows, *texts.words], echo_rows(reference.tokens)
    if not asked.rows:  # the engine gave no log-probabilities, which is said already
        shown, recorded = [], []
    progress(f"{release}: reading all texts, with {ROUNDINGS} other roundings")
    done = passed(own, [*answers, *long, *(row.ids for row in (*shown, *recorded))])
    head, first = own.head(), len(answers) + len(long)
    allowed = Allowed(settings.agreement, chance.upper_bound(*differing(done, head, range(len(answers)))))
    at_length = Allowed(
        settings.agreement, chance.upper_bound(*differing(done, head, range(len(answers), first), LONG_TAIL))
    )
    found = Judgement([*asked.checks, *_in_answers(asked, allowed, at_length)], allowed)
    if asked.served:
        verdict, found.control, found.control_agreement = smoke.greedy(
            asked.served, allowed, lambda most: find_control(release, own, asked.served, most)
        )
        found.checks.append(verdict)
    if shown:
        compared = reading(done, head, texts.rows, texts.view, first)
        words = reading(done, head, texts.words, texts.view, first + len(texts.rows))
        again = reading(done, head, recorded, texts.view, first + len(shown))
        expected = evaluated_alike(reference, arithmetic)
        found.checks.append(of_reference_text(texts, asked, settings.rounding, expected, compared, again))
        if asked.words:
            found.checks.append(of_vocabulary(asked, words, settings.rounding, tokenizer))
    found.checks = smoke.in_order(found.checks)
    return found


def _rows_of(served: list[Served]) -> list[list[int]]:
    """Prompts and answers as far as their tokens are known; of equal ones one."""
    return list(map(list, dict.fromkeys(tuple([*answer.prompt_ids, *answer.ids]) for answer in served)))


def _in_answers(asked: Asked, allowed: Allowed, at_length: Allowed) -> list[Check]:
    """The checks of answers that the chain has judged."""
    everything = [*asked.served, *asked.together]
    checks = [smoke.repetition(everything, allowed), smoke.garble(everything, allowed)]
    if asked.together:
        checks.append(smoke.concurrency(asked.together, asked.served, allowed))
    return [*checks, *([smoke.long_prompt(asked.long, at_length)] if asked.long else [])]


def of_reference_text(
    texts: Texts, asked: Asked, factor: float, evaluated: ReferenceText | None, read: Reading, again: Reading
) -> Check:
    """The engine's log-probabilities of the reference text against the chain's, and evaluate.json's against either.

    read: what the engine was shown; again: the text of evaluate.json, of which `evaluated` has the values, if there are
    any of the engine's arithmetic. factor: `deploy.rounding`.
    """
    import torch

    read = seen_by(asked.rows, read)
    far = farthest(distances(asked.rows, read.own), read)
    found = [f"{far.times:.2f} times as far off as rounding takes them ({far.where}, {far.positions} positions)"]
    expected = [f"at most {factor:g} times, beyond chance"]
    good = far.times <= factor
    if evaluated is None:
        found.append("no evaluation has this arithmetic")
    else:
        values = [torch.tensor(row, dtype=torch.float64)[:, None] for row in evaluated.log_probabilities if row]
        chain = Reading(
            again.rows,
            [view[:, :1] for view in again.own],
            [[view[:, :1] for view in views] for views in again.others],
            {},
        )
        moved = farthest([(part - DECIMALS).clamp(min=0) for part in distances(values, chain.own)], chain)
        answered = chain.own
        if not texts.labels:
            answered = [row[: len(part), :1] for row, part in zip(asked.rows, values, strict=False)]
        mean, mean_evaluated = (float(torch.cat(part).mean()) for part in (answered, values))
        limit = factor * float(torch.cat([row for rows in chain.noise for row in rows]).mean())
        whose = "the chain's" if texts.labels else "the engine's"
        found += [f"evaluate.json {moved.times:.2f} times", f"{whose} mean {mean:.4f} a token"]
        expected.append(f"evaluate.json's mean {mean_evaluated:.4f} +- {limit:.4f}")
        good = good and moved.times <= factor and abs(mean - mean_evaluated) <= limit
    count = sum(len(row.ends) for row in read.rows)
    return smoke.judged(smoke.LOG_PROBABILITIES, good, ", ".join(found), ", ".join(expected), count)


def of_vocabulary(asked: Asked, read: Reading, factor: float, tokenizer: Any) -> Check:
    """Whether each token that the engine was shown is, in one of its contexts at least, the chain's."""
    tokens = vocabulary.nearest(read.rows, distances(asked.words, read.own))
    limits = vocabulary.limits_of(read, factor)
    worst = max(tokens, key=lambda token: tokens[token] / limits[token])
    return smoke.judged(
        smoke.TOKENIZER,
        tokens[worst] <= limits[worst],
        f"{len(tokens)} of {len(tokenizer)} tokens shown, {tokenizer.decode([worst])!r} {tokens[worst]:.4f} nats off",
        f"at most {limits[worst]:.4f}: {vocabulary.MARGIN * factor:g} times what rounding does to a token",
        len(tokens),
    )
