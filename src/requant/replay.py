"""Served answers, replayed: whether each token is what the packed checkpoint's own chain would choose.

Prompt and answer go through requant's block-by-block chain, teacher-forced. Greedy decoding has to give the chain's
own choice at every token, or one so close that BF16 rounding decides.
"""

import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from requant.errors import RequantError
from requant.jobs import progress

if TYPE_CHECKING:
    import torch

    from requant.streamed import StreamedModel

# The engine rounds its logits to BF16, which has 8 significant bits: two logits of size |l| that differ by
# less than 2^-7 |l| may change places. A token within that distance of the chain's best is the same choice.
TIE = 2.0**-7
TIE_TEXT = "served token within 2^-7 |l| of the chain's best logit l: one rounding step of BF16"
ROUNDS = 4  # passes through the chain at most; one is enough unless a token's text leaves its id open
RANKED = 256  # candidates for a token whose text leaves its id open


@dataclass
class Served:
    """What the engine made of one prompt: `steps[j]` is the whole text after token j."""

    prompt: str
    prompt_ids: list[int]
    steps: list[str]
    ids: list[int] = field(default_factory=list)  # of the tokens replayed so far
    gaps: list[float] = field(default_factory=list)  # best log-probability minus the served token's, nats
    agrees: list[bool] = field(default_factory=list)
    closed: bool = False  # nothing more can be replayed
    read: int | None = None  # prompt tokens as the engine counted them


def replay(model: "StreamedModel", tokenizer: Any, served: list[Served]) -> None:
    """Finds the ids of the served tokens and how `model` likes them; fills `ids`, `gaps` and `agrees`.

    Each pass feeds prompt and answer. Where a token's text fits several ids, the likeliest one that fits is
    taken; if the pass was fed another one, the tokens after it wait for the next pass. Answers that are not
    read to their end after ROUNDS passes count as far as they were read.
    """
    text_ids = _ids_by_text(tokenizer)
    for _ in range(ROUNDS):
        open_answers = [answer for answer in served if not answer.closed]
        if not open_answers:
            return
        rows = [answer.prompt_ids + answer.ids + _guesses(answer, text_ids) for answer in open_answers]
        for answer, row, logits in zip(open_answers, rows, _logits(model, rows), strict=True):
            _follow(answer, row, logits, tokenizer)


def _follow(answer: Served, row: list[int], logits: "torch.Tensor", tokenizer: Any) -> None:
    """Judges the tokens of `answer` as far as `row`, which was fed, is right. logits [len(row), vocab]."""
    while len(answer.ids) < len(answer.steps):
        position = len(answer.prompt_ids) + len(answer.ids)
        if position > len(row) or row[len(answer.prompt_ids) : position] != answer.ids:
            return
        scores = logits[position - 1].log_softmax(-1)
        ranked = scores.topk(min(RANKED, len(scores))).indices.tolist()
        fitting = (token for token in [*ranked, *row[position : position + 1]] if _fits(answer, token, tokenizer))
        token = next(fitting, None)
        judged = ranked[-1] if token is None else token
        answer.gaps.append(float(scores[ranked[0]] - scores[judged]))
        answer.agrees.append(token is not None and _ties(logits[position - 1], token))
        if token is None:  # unknown, so nothing after it can be replayed
            break
        answer.ids.append(token)
    answer.closed = True


def _ties(logits: "torch.Tensor", token: int) -> bool:
    """Whether `token` is the best of logits [vocab], or as good as BF16 can tell."""
    best = float(logits.max())
    return best - float(logits[token]) <= TIE * abs(best)


def _fits(answer: Served, token: int, tokenizer: Any) -> bool:
    """Whether the answer reads on as it was served, if its next token is `token`."""
    from tokenizers.decoders import DecodeStream

    stream, text = DecodeStream([], skip_special_tokens=True), ""
    try:
        for id in [*answer.ids, token]:
            text += stream.step(tokenizer.backend_tokenizer, id) or ""
    except Exception:  # the tokenizers library raises bare Exception for ids that no text can hold
        return False
    return text == answer.steps[len(answer.ids)]


def _ids_by_text(tokenizer: Any) -> dict[str, int]:
    """A token for each text that one token can add to an answer."""
    backend = tokenizer.backend_tokenizer
    before = backend.encode("a", add_special_tokens=False).ids[:1]
    skipped = len(backend.decode(before))
    texts = backend.decode_batch([[*before, id] for id in range(len(tokenizer))])
    return {text[skipped:]: id for id, text in reversed(list(enumerate(texts)))}


def _guesses(answer: Served, text_ids: dict[str, int]) -> list[int]:
    """Ids for the rest of the answer, up to the first token whose text tells nothing."""
    guesses: list[int] = []
    for place in range(len(answer.ids), len(answer.steps)):
        before = answer.steps[place - 1] if place else ""
        added = answer.steps[place][len(before) :]
        if not added or added not in text_ids:
            break
        guesses.append(text_ids[added])
    return guesses


def _logits(model: "StreamedModel", rows: list[list[int]], skip_block: int | None = None) -> list["torch.Tensor"]:
    """float32 logits [len(row), vocab] for each row; padding on the right changes nothing before it."""
    import torch

    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    logits = model.logits_of(tokens, skip_block=skip_block)
    return [part[: len(row)] for part, row in zip(logits, rows, strict=True)]


def agreement_of(served: list[Served]) -> float:
    """Part of the replayed tokens that agree."""
    judged = [agrees for answer in served for agrees in answer.agrees]
    return statistics.fmean(judged) if judged else 0.0


def disagreements(model: "StreamedModel", served: list[Served], skip_block: int | None = None) -> list[int]:
    """For each answer the number of its tokens that `model` would not have chosen."""
    rows = [answer.prompt_ids + answer.ids for answer in served]
    counts = []
    for answer, row, logits in zip(served, rows, _logits(model, rows, skip_block), strict=True):
        first = len(answer.prompt_ids)
        counts.append(sum(not _ties(logits[place - 1], row[place]) for place in range(first, len(row))))
    return counts


def choose_control(release: str, model: "StreamedModel", served: list[Served], limit: float) -> tuple[str, float]:
    """(what was left out, agreement without it) for a chain that the test tells from the served model.

    The middle block first. A model may hardly need one of its blocks, so the others follow, from the middle
    outwards. RequantError if the answers fit every one of these wrong models: then they prove nothing.
    """
    tokens = sum(len(answer.ids) for answer in served)
    middle = model.blocks // 2
    lowest = 1.0
    for block in sorted(range(model.blocks), key=lambda index: abs(index - middle)):
        progress(f"{release}: control: replaying without block {block} (of {model.blocks})")
        agreement = 1 - sum(disagreements(model, served, skip_block=block)) / tokens
        if agreement < limit:
            return f"without block {block}", agreement
        lowest = min(lowest, agreement)
    raise RequantError(
        f"{release}: the {tokens} served tokens fit the model without any one of its blocks too (agreement "
        f"{lowest:.3f} or more); expected less than {limit}: the test is blind: raise `deploy.prompts` or "
        "`deploy.max_tokens`"
    )
