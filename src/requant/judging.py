"""What an engine answered, held against requant's own chain of the packed checkpoint: verdicts."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from requant import smoke, vocabulary
from requant.config import Deploy
from requant.distances import Reading, Row, distances, farthest, read
from requant.engine_client import echo_rows
from requant.errors import RequantError
from requant.jobs import progress
from requant.questions import Asked
from requant.records import Check, ReferenceText
from requant.replay import Served, choose_control, replay
from requant.smoke_texts import Texts

if TYPE_CHECKING:
    import torch

    from requant.packed import PackedCheckpoint
    from requant.streamed import StreamedModel

ENOUGH = 0.25  # part of the served tokens that has to be told from their text, or the check means little


@dataclass
class Judgement:
    """checks: all of them, in order; control: what it lacks, and its agreement."""

    checks: list[Check]
    control: str = ""
    control_agreement: float = 1.0


def judge(
    release: str,
    checkpoint: "PackedCheckpoint",
    as_packed: bool,
    texts: Texts,
    asked: Asked,
    settings: Deploy,
    reference: ReferenceText,
    tokenizer: Any,
) -> Judgement:
    """Verdicts on all checks. as_packed: the engine has the packed weights, and so rounds activations as they say.

    The chain is run for the answers, for the control, and for the reference text in BF16 and in float32.
    """
    import torch

    from requant.streamed import StreamedModel

    rounds = as_packed and checkpoint.scheme.quantizes_activations
    own = StreamedModel(checkpoint, quantize_activations=rounds)
    progress(f"{release}: replaying the served tokens, block by block")
    replay(own, tokenizer, [*asked.served, *asked.together])
    replay(own, tokenizer, asked.long)
    found = Judgement([*asked.checks, *_in_answers(asked, settings)])
    if asked.served:
        verdict, found.control, found.control_agreement = _greedy(release, own, asked.served, settings)
        found.checks.append(verdict)
    progress(f"{release}: reading the reference text, in BF16 and in float32")
    exact = StreamedModel(checkpoint, dtype=torch.float32, quantize_activations=rounds)
    expected = reference if rounds else alone(reference)
    found.checks += compare(own, exact, texts, asked, settings.rounding, expected, tokenizer)
    found.checks = smoke.in_order(found.checks)
    return found


def _greedy(release: str, own: "StreamedModel", served: list[Served], settings: Deploy) -> tuple[Check, str, float]:
    """(verdict, what the control lacks, its agreement)."""
    steps, judged = sum(len(answer.steps) for answer in served), sum(len(answer.agrees) for answer in served)
    if judged < steps * ENOUGH:
        found = f"{judged} of {steps} served tokens could be told from their text"
        expected = f"{ENOUGH:.0%} or more: raise `deploy.prompts`, or choose other held-out text"
        return smoke.failed(smoke.GREEDY, found, expected), "", 1.0
    try:
        return smoke.greedy(
            served, settings.agreement, lambda: choose_control(release, own, served, settings.agreement)
        )
    except RequantError as error:  # the test is blind
        return smoke.failed(smoke.GREEDY, str(error), "answers that fit no other model"), "", 1.0


def _in_answers(asked: Asked, settings: Deploy) -> list[Check]:
    """The checks of answers that the chain has judged."""
    limit = settings.agreement
    everything = [*asked.served, *asked.together]
    checks = [smoke.repetition(everything, limit), smoke.garble(everything, limit)]
    if asked.together:
        checks.append(smoke.concurrency(asked.together, asked.served, limit))
    return checks + [smoke.long_prompt(answer) for answer in asked.long]


def alone(reference: ReferenceText) -> ReferenceText:
    """The reference text with the log-probabilities that decoded weights give."""
    return reference.model_copy(
        update={"log_probabilities": reference.weights_alone or reference.log_probabilities, "weights_alone": None}
    )


def compare(
    own: "StreamedModel",
    exact: "StreamedModel",
    texts: Texts,
    asked: Asked,
    factor: float,
    reference: ReferenceText,
    tokenizer: Any,
) -> list[Check]:
    """The checks for which log-probabilities of the engine and of evaluate.json are held against the chain's.

    own, exact: the chain as it is served, and in float32. factor: `deploy.rounding`.
    """
    if not asked.rows:  # the engine gave none, which is said already
        return []
    recorded = echo_rows(reference.tokens)
    rows = [*texts.rows, *texts.words, *recorded]
    ours, unrounded = (read(model, rows, texts.view) for model in (own, exact))
    first, last = len(texts.rows), len(texts.rows) + len(texts.words)
    checks = [_of_reference_text(texts, asked, factor, reference, ours, unrounded, slice(0, first), slice(last, None))]
    if asked.words:
        noise = distances(unrounded.views[first:last], ours.views[first:last])
        found = distances(asked.words, ours.views[first:last])
        checks.append(_of_vocabulary(texts.words, found, noise, factor, tokenizer))
    return checks


def _of_reference_text(
    texts: Texts,
    asked: Asked,
    factor: float,
    reference: ReferenceText,
    ours: Reading,
    unrounded: Reading,
    shown: slice,
    recorded: slice,
) -> Check:
    """shown, recorded: the rows that the engine was shown, and those of evaluate.json."""
    import torch

    experts = {expert: parts[shown] for expert, parts in ours.experts.items()}
    found, where = farthest(distances(asked.rows, ours.views[shown]), experts)
    limit = factor * farthest(distances(unrounded.views[shown], ours.views[shown]), experts)[0]
    evaluated = [torch.tensor(row, dtype=torch.float64)[:, None] for row in reference.log_probabilities if row]
    chain, exact = ([view[:, :1] for view in reading.views[recorded]] for reading in (ours, unrounded))
    noise = distances(exact, chain)
    moved, _ = farthest(distances(evaluated, chain), {})
    moved_limit = factor * farthest(noise, {})[0]
    answered = chain
    if not texts.labels:
        answered = [row[: len(part), :1] for row, part in zip(asked.rows, evaluated, strict=False)]
    mean, mean_evaluated = (float(torch.cat(part).mean()) for part in (answered, evaluated))
    mean_limit = factor * float(torch.cat(noise).mean())
    whose = "the chain's" if texts.labels else "the engine's"
    return smoke.judged(
        smoke.LOG_PROBABILITIES,
        found <= limit and moved <= moved_limit and abs(mean - mean_evaluated) <= mean_limit,
        f"{found:.4f} nats off ({where}), evaluate.json {moved:.4f} nats off, {whose} mean {mean:.4f} a token",
        f"at most {limit:.4f}, {moved_limit:.4f}, evaluate.json's mean {mean_evaluated:.4f} +- {mean_limit:.4f}: "
        f"{factor:g} times what rounding to BF16 does",
    )


def _of_vocabulary(
    rows: list[Row], found: "list[torch.Tensor]", noise: "list[torch.Tensor]", factor: float, tokenizer: Any
) -> Check:
    tokens = vocabulary.nearest(rows, found)
    limits = vocabulary.limits(vocabulary.nearest(rows, noise), factor)
    worst = max(tokens, key=lambda token: tokens[token] / limits[token])
    return smoke.judged(
        smoke.TOKENIZER,
        tokens[worst] <= limits[worst],
        f"{len(tokens)} of {len(tokenizer)} tokens shown, {tokenizer.decode([worst])!r} {tokens[worst]:.4f} nats off",
        f"at most {limits[worst]:.4f}: {vocabulary.MARGIN * factor:g} times what rounding to BF16 does to a token",
    )
