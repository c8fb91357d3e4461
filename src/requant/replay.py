"""Served answers, replayed: whether each token is what the packed checkpoint's own chain would choose.

Prompt and answer go through requant's block-by-block chain, teacher-forced. Greedy decoding has to give the chain's
own choice at every token, or one so close that BF16 rounding decides.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from requant.jobs import progress

if TYPE_CHECKING:
    import torch

    from requant.roundings import Passed
    from requant.streamed import StreamedModel

# The engine rounds its logits to BF16, which has 8 significant bits: two logits of size |l| that differ by
# less than 2^-7 |l| may change places. A token within that distance of the chain's best is the same choice.
TIE = 2.0**-7
TIE_TEXT = "served token within 2^-7 |l| of the chain's best logit l: one rounding step of BF16"
ROUNDS = 4  # passes through the chain at most; one is enough unless a token's text leaves its id open
RANKED = 256  # candidates for a token whose text leaves its id open
INCOMPLETE = "\ufffd"  # what stands for the bytes of a character that is not complete
CONTROLS = 6  # blocks that are left out, one after another, until the answers fit no more


@dataclass
class Served:
    """What the engine made of one prompt: `steps[j]` is the whole text after token j.

    shown: the same with the marks that it shows for characters that are cut off; empty if `steps` are all there is.
    """

    prompt: str
    prompt_ids: list[int]
    steps: list[str]
    ids: list[int] = field(default_factory=list)  # of the tokens replayed so far
    gaps: list[float] = field(default_factory=list)  # best log-probability minus the served token's, nats
    agrees: list[bool] = field(default_factory=list)
    closed: bool = False  # nothing more can be replayed
    guessed: bool = False  # a token that shows no text was taken for the likeliest one that fits
    doubtful: bool = False  # such a token, or one of bytes that are no character, is not the chain's choice
    sure: int | None = None  # tokens up to the first bytes that are no character; None if there are none
    unread: bool = False  # its next token is none that the chain would take for its text
    read: int | None = None  # prompt tokens as the engine counted them
    shown: list[str] = field(default_factory=list)


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
        if token is None and answer.guessed:  # the guess may have been wrong, which is no fault of the engine
            break
        judged = ranked[-1] if token is None else token
        answer.gaps.append(float(scores[ranked[0]] - scores[judged]))
        answer.agrees.append(token is not None and bool(ties(logits[position - 1], token)))
        if token is None:  # unknown, so nothing after it can be replayed
            answer.unread = True
            break
        added = _added(answer, len(answer.ids))
        answer.guessed = answer.guessed or not added
        answer.doubtful = answer.doubtful or (not answer.agrees[-1] and (not added or INCOMPLETE in added))
        answer.ids.append(token)
        if (
            INCOMPLETE in added
        ):  # which bytes they are is never told: the chain's choice, or nothing can be said further
            answer.sure = len(answer.agrees) if answer.sure is None else answer.sure
            if answer.doubtful:
                break
    answer.closed = True


def _added(answer: Served, place: int) -> str:
    """The text that token number `place` adds; none for a part of a character, and for a token that has no text."""
    return answer.steps[place][len(answer.steps[place - 1]) if place else 0 :]


def ties(logits: "torch.Tensor", tokens: "torch.Tensor | int") -> "torch.Tensor":
    """Whether `tokens` [...] are the best of logits [..., vocab], or as good as BF16 can tell."""
    import torch

    tokens = torch.as_tensor(tokens, device=logits.device)
    best = logits.max(-1).values
    return best - logits.gather(-1, tokens[..., None])[..., 0] <= TIE * best.abs()


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
        added = _added(answer, place)
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


def agreeing(served: list[Served]) -> tuple[int, int]:
    """(tokens that agree, tokens that were judged). What comes behind a token that no id of the chain's fits is judged
    too: it is not this model's."""
    right = sum(sum(answer.agrees) for answer in served)
    return right, sum(len(answer.steps if answer.unread else answer.agrees) for answer in served)


def agreement_of(served: list[Served]) -> float:
    """Part of the judged tokens that agree."""
    right, of = agreeing(served)
    return right / of if of else 0.0


def disagreements(model: "StreamedModel", served: list[Served], skip_block: int | None = None) -> list[int]:
    """For each answer the number of its tokens that `model` would not have chosen."""
    import torch

    rows = [answer.prompt_ids + answer.ids for answer in served]
    counts = []
    for answer, row, logits in zip(served, rows, _logits(model, rows, skip_block), strict=True):
        first = len(answer.prompt_ids)
        chosen = ties(logits[first - 1 : len(row) - 1], torch.tensor(row[first:], dtype=torch.long))
        counts.append(int((~chosen).sum()))
    return counts


def differing(
    done: "Passed", head: Callable[["torch.Tensor"], "torch.Tensor"], numbers: range, last: int | None = None
) -> tuple[int, int]:
    """(places at which another rounding of the chain chooses a token that this one would not, places looked at).

    A right engine is another rounding too: it may choose otherwise as often. numbers: of rows of `done`, of which the
    `last` places are looked at. head: final norm and output matrix.
    """
    own, *others = done.states
    count, places = 0, 0
    for number in numbers:
        tail = slice(-last if last else None, None)
        logits = head(own[number][tail])
        for states in others:
            chosen = head(states[number][tail]).argmax(-1)
            count += int((~ties(logits, chosen)).sum())
            places += len(chosen)
    return count, places


def find_control(release: str, model: "StreamedModel", served: list[Served], most: int) -> tuple[str | None, float]:
    """(what was left out, agreement without it) for a chain that the answers tell from the served model: more than
    `most` of their tokens are not its choice. (None, the lowest agreement) if they fit each of those that are tried.

    The middle block first. A model may hardly need one of its blocks, and needs its first one most.
    """
    tokens = sum(len(answer.ids) for answer in served)
    lowest = 1.0
    for block in _controls(model.blocks):
        progress(f"{release}: control: replaying without block {block} (of {model.blocks})")
        wrong = sum(disagreements(model, served, skip_block=block))
        agreement = 1 - wrong / max(tokens, 1)
        if wrong > most:
            return f"without block {block}", agreement
        lowest = min(lowest, agreement)
    return None, lowest


def _controls(blocks: int) -> list[int]:
    """Blocks to leave out, in turn: the middle, the first, the last, and others from the middle outwards."""
    middle = blocks // 2
    outwards = sorted(range(blocks), key=lambda index: abs(index - middle))
    return list(dict.fromkeys([middle, 0, blocks - 1, *outwards]))[:CONTROLS]
