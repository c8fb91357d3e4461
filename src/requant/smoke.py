"""The checks of the smoke test: what each asks or looks at, and its verdict.

A check never ends the test: whatever goes wrong in it is its finding. docs/smoke-test.md says what each one catches.
"""

import statistics
import unicodedata
from collections.abc import Callable
from itertools import pairwise
from typing import TYPE_CHECKING

from requant.engine_client import stream
from requant.errors import RequantError, brief
from requant.records import Check
from requant.replay import Served, agreement_of

if TYPE_CHECKING:
    from openai import OpenAI

GREEDY, LOG_PROBABILITIES, REPETITION, GARBLE = "greedy", "log_probabilities", "repetition", "garble"
LONG_PROMPT, STREAMING, STOP, CONCURRENCY = "long_prompt", "streaming", "stop_sequences", "concurrency"
WRONG_NAME, TOO_LONG, TOKENIZER = "wrong_model_name", "over_long_input", "tokenizer"
ALL = (
    *(GREEDY, LOG_PROBABILITIES, REPETITION, GARBLE, LONG_PROMPT, STREAMING, STOP, CONCURRENCY),
    *(WRONG_NAME, TOO_LONG, TOKENIZER),
)
LONG_AGREEMENT = 0.75  # of the answer to the long prompt: it has few tokens, and rounding adds up over a long prompt
LOOPS, LONGEST_LOOP = 4, 8  # so often is a run of at most so many tokens repeated at the end of an answer that loops
STRANGE = 0.02  # part of the characters of an answer that may be strange
ANSWERS_AGAIN = 3  # tries for the same text without streaming, where an engine batches
INCOMPLETE = "\ufffd"  # what stands for the bytes of a character that is not complete
# The longest context that is overrun at an engine which sets no limit, and so computes what it is sent.
COMPUTED_CONTEXT = 8192


def passed(name: str, found: str, expected: str) -> Check:
    return Check(name=name, verdict="passed", found=found, expected=expected)


def failed(name: str, found: str, expected: str) -> Check:
    return Check(name=name, verdict="failed", found=found, expected=expected)


def not_applicable(name: str, reason: str) -> Check:
    return Check(name=name, verdict="not applicable", reason=reason)


def judged(name: str, good: bool, found: str, expected: str) -> Check:
    return (passed if good else failed)(name, found, expected)


# Asked of the engine.


def streaming(client: "OpenAI", model: str, served: list[Served], max_tokens: int) -> Check:
    """The same text at once as token by token, and more than one piece of it.

    Tokens that complete no character add no text: an answer that grows once may come in one piece. A character that is
    not complete at the end of an answer is left out of a stream, and marked in a text that comes at once.
    """
    expected = "the same text with and without streaming, in more than one piece"
    answer = max(served, key=growths)
    pieces, _, _ = stream(client, model, answer.prompt, max_tokens)
    if growths(answer) > 2 and len(pieces) < 2:
        return failed(STREAMING, f"a text that grows {growths(answer)} times in {len(pieces)} piece", expected)
    request = {"model": model, "prompt": answer.prompt, "max_tokens": max_tokens, "temperature": 0}
    for _ in range(ANSWERS_AGAIN):
        whole = client.completions.create(**request).choices[0].text
        if whole.rstrip(INCOMPLETE) == answer.steps[-1].rstrip(INCOMPLETE):
            return passed(STREAMING, "the same text", expected)
    return failed(STREAMING, f"{brief(answer.steps[-1])} streamed, {brief(whole)} at once", expected)


def growths(answer: Served) -> int:
    """How many of its tokens add text."""
    return sum(step != before for before, step in zip(["", *answer.steps], answer.steps, strict=False))


def stop_sequences(client: "OpenAI", model: str, served: list[Served], max_tokens: int) -> Check:
    """An answer ends at text that it was asked to stop at. Engines may leave that text in."""
    chosen = _stop_in(served)
    if chosen is None:
        return not_applicable(STOP, "no answer has a text in its middle that could end it")
    answer, text = chosen
    at = next(number for number, step in enumerate(answer.steps) if text in step)
    start = answer.steps[at].index(text)
    allowed = {answer.steps[at][:start], answer.steps[at][: start + len(text)], answer.steps[at]}
    request = {"model": model, "prompt": answer.prompt, "max_tokens": max_tokens, "temperature": 0}
    found = client.completions.create(**request, stop=[text]).choices[0]
    good = found.text in allowed and found.finish_reason == "stop"
    return judged(
        STOP,
        good,
        f"{brief(found.text)}, finish_reason {found.finish_reason}",
        f"{brief(min(allowed, key=len))}, with or without {text!r}, finish_reason stop",
    )


def _stop_in(served: list[Served]) -> tuple[Served, str] | None:
    """(an answer, the text that a token in its middle adds, which nothing before it has)."""
    for answer in served:
        for before, step in pairwise(answer.steps[len(answer.steps) // 3 : -1]):
            added = step[len(before) :]
            if len(added.strip()) > 1 and added not in before and added.isascii():
                return answer, added
    return None


def wrong_model_name(client: "OpenAI", model: str, engine: str) -> tuple[Check, int]:
    """(verdict, HTTP status) for a request that names another model."""
    from openai import APIStatusError

    other = f"{model}-of-another-name"
    try:
        client.completions.create(model=other, prompt="a", max_tokens=1)
        status = 200
    except APIStatusError as error:
        status = error.status_code
    if status == 200 and engine == "sglang":
        return not_applicable(WRONG_NAME, "sglang answers whatever name a request gives"), status
    return judged(WRONG_NAME, 400 <= status < 500, f"status {status} for model {other!r}", "a refusal, 4xx"), status


def over_long_input(client: "OpenAI", model: str, engine: str, prompt: str, context: int, first: Served) -> Check:
    """A `prompt` of more tokens than the context is refused, and the engine answers as before."""
    from openai import APIStatusError

    if engine == "transformers" and context > COMPUTED_CONTEXT:
        return not_applicable(TOO_LONG, f"transformers sets no limit: it would compute more than {context} tokens")
    try:
        client.completions.create(model=model, prompt=prompt, max_tokens=1, temperature=0)
        status = 200
    except APIStatusError as error:
        status = error.status_code
    after = stream(client, model, first.prompt, len(first.steps))[0]
    alive = "".join(after)[:1] == first.steps[-1][:1]
    found = f"status {status}, then {'the same answer as before' if alive else brief(''.join(after))}"
    limit = "a refusal, 4xx" if engine != "transformers" else "any answer but an error of the server"
    good = 400 <= status < 500 or (status == 200 and engine == "transformers")
    return judged(TOO_LONG, good and alive, found, f"{limit}, then the same answer as before")


# Looked for in the answers, once the chain has judged their tokens.


def greedy(served: list[Served], limit: float, control: Callable[[], tuple[str, float]]) -> tuple[Check, str, float]:
    """(verdict, what the control lacks, its agreement); the control is asked for only where the answers agree.

    Raises what the control raises.
    """
    agreement, tokens = agreement_of(served), sum(len(answer.agrees) for answer in served)
    expected = f"{limit} of the served tokens or more are this checkpoint's own choice"
    if agreement < limit:
        worst = min(served, key=lambda answer: statistics.fmean(answer.agrees) if answer.agrees else 1.0)
        found = f"{agreement:.3f} of {tokens}, worst answer {brief(worst.steps[-1] if worst.steps else '')}"
        return failed(GREEDY, found, expected), "", 1.0
    lacks, without = control()
    return passed(GREEDY, f"{agreement:.3f} of {tokens}, {without:.3f} {lacks}", expected), lacks, without


def own_choice(answer: Served, limit: float) -> bool:
    """Whether the checkpoint itself would have written this answer."""
    return bool(answer.agrees) and statistics.fmean(answer.agrees) >= limit


def repetition(served: list[Served], limit: float) -> Check:
    """Answers that end in a loop which this checkpoint would not have written."""
    looping = [answer for answer in served if loops(answer.steps)]
    return _symptom(REPETITION, "end in a loop", looping, served, limit)


def garble(served: list[Served], limit: float) -> Check:
    """Answers with characters that no text has, which this checkpoint would not have written."""
    strange = [answer for answer in served if answer.steps and strangeness(answer.steps[-1]) > STRANGE]
    return _symptom(GARBLE, "have characters that no text has", strange, served, limit)


def _symptom(name: str, what: str, found: list[Served], served: list[Served], limit: float) -> Check:
    foreign = [answer for answer in found if not own_choice(answer, limit)]
    note = f"{len(found)} of {len(served)} answers {what}, {len(found) - len(foreign)} by this checkpoint's own choice"
    shown = f": {brief(foreign[0].steps[-1])}" if foreign else ""
    return judged(name, not foreign, note + shown, "none but by this checkpoint's own choice")


def loops(steps: list[str]) -> bool:
    """Whether the answer ends in a run of up to LONGEST_LOOP tokens, LOOPS times over. steps[j]: text after token j."""
    texts = [step[len(before) :] for before, step in zip(["", *steps], steps, strict=False)]
    return any(
        len(texts) >= size * LOOPS and texts[-size * LOOPS :] == texts[-size:] * LOOPS and any(texts[-size:])
        for size in range(1, LONGEST_LOOP + 1)
    )


def strangeness(text: str) -> float:
    """Part of the characters that are replacements, controls, unassigned or private."""
    if not text:
        return 0.0
    odd = sum(
        character == "\N{REPLACEMENT CHARACTER}"
        or (unicodedata.category(character) in ("Cc", "Cn", "Co", "Cs") and character not in "\n\r\t")
        for character in text
    )
    return odd / len(text)


def concurrency(together: list[Served], alone: list[Served], limit: float) -> Check:
    """Answers to requests at one time are this checkpoint's own too; their texts may differ where an engine batches."""
    same = sum(a.steps[-1:] == b.steps[-1:] for a, b in zip(together, alone, strict=True))
    agreement, tokens = agreement_of(together), sum(len(answer.agrees) for answer in together)
    found = f"{same} of {len(together)} answers the same as one at a time, {agreement:.3f} of {tokens} tokens agree"
    good = same == len(together) or agreement >= limit
    return judged(CONCURRENCY, good, found, f"the same answers, or {limit} of the tokens this checkpoint's own choice")


def long_prompt(answer: Served) -> Check:
    """The whole of a long prompt was read, and the answer to it is this checkpoint's."""
    agreement, count = agreement_of([answer]), len(answer.prompt_ids)
    found = f"{answer.read} of {count} prompt tokens read, {agreement:.3f} of {len(answer.agrees)} tokens agree"
    expected = f"{count} prompt tokens read, {LONG_AGREEMENT} of the tokens this checkpoint's own choice"
    return judged(LONG_PROMPT, answer.read == count and agreement >= LONG_AGREEMENT, found, expected)


def verdict_lines(checks: list[Check]) -> list[str]:
    """The table of verdicts, a line each."""
    wide = max(len(check.name) for check in checks)
    return [
        f"{check.name:{wide}}  {check.verdict:14}  "
        + (check.reason or f"found {check.found}; expected {check.expected}")
        for check in checks
    ]


def failure_line(release: str, checks: list[Check]) -> str:
    """All failed checks in one line."""
    bad = [check for check in checks if check.verdict == "failed"]
    told = "; ".join(f"{check.name}: {check.found}, expected {check.expected}" for check in bad)
    return f"{release}: the smoke test failed {len(bad)} of {len(checks)} checks: {told}"


def in_order(checks: list[Check]) -> list[Check]:
    """Sorted as docs/smoke-test.md has them; RequantError if one is missing or there twice."""
    found = {check.name: check for check in checks}
    if sorted(check.name for check in checks) != sorted(ALL):
        raise RequantError(f"checks {sorted(check.name for check in checks)}; expected {sorted(ALL)}")
    return [found[name] for name in ALL]


def texts_read(answers: list[Served]) -> str | None:
    """What is wrong with the numbers of prompt tokens that the engine counted; None if they are ours."""
    for answer in answers:
        if answer.read != len(answer.prompt_ids):
            return f"{answer.read} tokens read of a prompt of {len(answer.prompt_ids)}: {brief(answer.prompt)}"
    return None
