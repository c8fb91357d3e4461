"""The checks of the smoke test: what each asks or looks at, and its verdict.

A check never ends the test: whatever goes wrong in it is its finding. docs/smoke-test.md says what each one catches.
"""

import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, pairwise
from typing import TYPE_CHECKING

from requant import chance
from requant.engine_client import stream
from requant.errors import RequantError, brief
from requant.records import Check
from requant.replay import INCOMPLETE, Served, agreeing, agreement_of

if TYPE_CHECKING:
    from openai import OpenAI

GREEDY, LOG_PROBABILITIES, REPETITION, GARBLE = "greedy", "log_probabilities", "repetition", "garble"
LONG_PROMPT, STREAMING, STOP, CONCURRENCY = "long_prompt", "streaming", "stop_sequences", "concurrency"
WRONG_NAME, TOO_LONG, TOKENIZER = "wrong_model_name", "over_long_input", "tokenizer"
ALL = (
    *(GREEDY, LOG_PROBABILITIES, REPETITION, GARBLE, LONG_PROMPT, STREAMING, STOP, CONCURRENCY),
    *(WRONG_NAME, TOO_LONG, TOKENIZER),
)
LOOPS, LONGEST_LOOP = 4, 8  # so often is a run of at most so many tokens repeated at the end of an answer that loops
STRANGE = 0.02  # part of the characters of an answer that may be strange
ANSWERS_AGAIN = 3  # tries for the same text, each with another answer if there is one: near-ties are no fault
# The longest context that is overrun at an engine which sets no limit, and so computes what it is sent.
COMPUTED_CONTEXT = 8192


def passed(name: str, found: str, expected: str, samples: int | None = None) -> Check:
    return Check(name=name, verdict="passed", found=found, expected=expected, samples=samples)


def failed(name: str, found: str, expected: str, samples: int | None = None) -> Check:
    return Check(name=name, verdict="failed", found=found, expected=expected, samples=samples)


def not_applicable(name: str, reason: str, samples: int | None = None) -> Check:
    return Check(name=name, verdict="not applicable", reason=reason, samples=samples)


def judged(name: str, good: bool, found: str, expected: str, samples: int | None = None) -> Check:
    return (passed if good else failed)(name, found, expected, samples)


@dataclass(frozen=True)
class Allowed:
    """How many tokens of a right engine may be other than the chain's choice.

    limit: `deploy.agreement`. measured: how often other roundings of this very model choose another token, at most
    (`chance.upper_bound`): near-ties of a router or of logits are no fault of an engine.
    """

    limit: float
    measured: float = 0.0

    @property
    def rate(self) -> float:
        """Part of the tokens."""
        return max(1 - self.limit, self.measured)

    def most(self, of: int) -> int:
        """Of so many tokens; more is not chance."""
        return chance.most(of, self.rate)

    def tells(self, of: int) -> bool:
        """Whether so many tokens, all of them wrong, would be more than chance."""
        return self.most(of) < of

    def least(self, of: int) -> float:
        """The lowest agreement of so many tokens that chance explains."""
        return 1 - self.most(of) / of if of else 0.0

    def text(self, of: int) -> str:
        """What is expected, for people."""
        why = "" if self.rate <= 1 - self.limit else f", as of two right roundings of it (limit {self.limit:g})"
        return (
            f"{1 - self.rate:.3g} of the tokens or more are this checkpoint's own choice{why}; of {of}, chance "
            f"explains {self.least(of):.3f}"
        )


# Asked of the engine.


def streaming(client: "OpenAI", model: str, served: list[Served], max_tokens: int) -> Check:
    """The same text at once as token by token, and more than one piece of it.

    Tokens that complete no character add no text: an answer that grows once may come in one piece. A character that is
    not complete at the end of an answer is left out of a stream, and marked in a text that comes at once.
    """
    expected = "the same text with and without streaming, in more than one piece"
    for answer in islice(cycle(sorted(served, key=growths, reverse=True)), ANSWERS_AGAIN):
        pieces, _, _ = stream(client, model, answer.prompt, max_tokens)
        if growths(answer) > 2 and len(pieces) < 2:
            return failed(STREAMING, f"a text that grows {growths(answer)} times in {len(pieces)} piece", expected)
        request = {"model": model, "prompt": answer.prompt, "max_tokens": max_tokens, "temperature": 0}
        whole = client.completions.create(**request).choices[0].text
        if whole.rstrip(INCOMPLETE) in ("".join(pieces).rstrip(INCOMPLETE), answer.steps[-1].rstrip(INCOMPLETE)):
            return passed(STREAMING, "the same text", expected)
    return failed(STREAMING, f"{brief(answer.steps[-1])} streamed, {brief(whole)} at once", expected)


def growths(answer: Served) -> int:
    """How many of its tokens add text."""
    return sum(step != before for before, step in zip(["", *answer.steps], answer.steps, strict=False))


def stop_sequences(client: "OpenAI", model: str, served: list[Served], max_tokens: int) -> Check:
    """An answer ends at text that it was asked to stop at. Engines may leave that text in."""
    tried = list(islice(_stops_in(served), ANSWERS_AGAIN))
    if not tried:
        return not_applicable(STOP, "no answer has a text in its middle that could end it")
    for answer, text in tried:
        at = next(number for number, step in enumerate(answer.steps) if text in step)
        start = answer.steps[at].index(text)
        allowed = {answer.steps[at][:start], answer.steps[at][: start + len(text)], answer.steps[at]}
        request = {"model": model, "prompt": answer.prompt, "max_tokens": max_tokens, "temperature": 0}
        found = client.completions.create(**request, stop=[text]).choices[0]
        check = judged(
            STOP,
            found.text in allowed and found.finish_reason == "stop",
            f"{brief(found.text)}, finish_reason {found.finish_reason}",
            f"{brief(min(allowed, key=len))}, with or without {text!r}, finish_reason stop",
        )
        if check.verdict == "passed":
            break
    return check


def _stops_in(served: list[Served]) -> Iterator[tuple[Served, str]]:
    """(an answer, the text that a token in its middle adds, which nothing before it has), an answer each."""
    for answer in served:
        for before, step in pairwise(answer.steps[len(answer.steps) // 3 : -1]):
            added = step[len(before) :]
            if len(added.strip()) > 1 and added not in before and added.isascii():
                yield answer, added
                break


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


def over_long_input(
    client: "OpenAI", model: str, engine: str, prompt: str, context: int, served: list[Served]
) -> Check:
    """A `prompt` of more tokens than the context is refused, and the engine answers as before."""
    from openai import APIStatusError

    if engine == "transformers" and context > COMPUTED_CONTEXT:
        return not_applicable(TOO_LONG, f"transformers sets no limit: it would compute more than {context} tokens")
    try:
        client.completions.create(model=model, prompt=prompt, max_tokens=1, temperature=0)
        status = 200
    except APIStatusError as error:
        status = error.status_code
    for before in served[:ANSWERS_AGAIN]:
        after = "".join(stream(client, model, before.prompt, len(before.steps))[0])
        alive = after[:1] == before.steps[-1][:1]
        if alive:
            break
    found = f"status {status}, then {'the same answer as before' if alive else brief(after)}"
    limit = "a refusal, 4xx" if engine != "transformers" else "any answer but an error of the server"
    good = 400 <= status < 500 or (status == 200 and engine == "transformers")
    return judged(TOO_LONG, good and alive, found, f"{limit}, then the same answer as before")


# Looked for in the answers, once the chain has judged their tokens.


def greedy(
    served: list[Served], allowed: Allowed, control: Callable[[int], tuple[str | None, float]]
) -> tuple[Check, str | None, float]:
    """(verdict, what the control lacks, its agreement).

    control: given the most disagreements that chance explains; it is asked for only where the answers agree.
    """
    right, of = agreeing(served)
    if not allowed.tells(of):
        return _too_few(GREEDY, f"{of} served tokens could be read", of), None, 1.0
    agreement, expected = right / of, allowed.text(of)
    if of - right > allowed.most(of):
        worst = min(served, key=lambda answer: agreement_of([answer]))
        found = f"{agreement:.3f} of {of}, worst answer {brief(worst.steps[-1] if worst.steps else '')}"
        return failed(GREEDY, found, expected, of), None, 1.0
    lacks, without = control(allowed.most(of))
    if lacks is None:
        reason = (
            f"the {of} served tokens fit the model without one of its blocks too (agreement {without:.3f} or more): "
            "the test is blind; raise `deploy.prompts` or `deploy.max_tokens`"
        )
        return not_applicable(GREEDY, reason, of), None, without
    return passed(GREEDY, f"{agreement:.3f} of {of}, {without:.3f} {lacks}", expected, of), lacks, without


def _too_few(name: str, found: str, of: int) -> Check:
    return not_applicable(name, f"{found}: too few to tell; raise `deploy.prompts` or `deploy.max_tokens`", of)


def own_choice(answer: Served, rate: float, answers: int = 1) -> bool:
    """Whether the checkpoint itself would have written this answer, one of so many that are looked at.

    No token is foreign to it, and no more are other than its choice than chance explains, each with probability `rate`.
    What stands behind bytes that are no character, of which several tokens have the text, is not looked at.
    """
    told = answer.agrees[: answer.sure]
    most = chance.most(len(told), rate, chance.ALPHA / answers)
    return bool(told) and not answer.unread and told.count(False) <= most


def repetition(served: list[Served], allowed: Allowed) -> Check:
    """Answers that end in a loop which this checkpoint would not have written."""
    looping = [answer for answer in served if loops(answer.shown or answer.steps)]
    return _symptom(REPETITION, "end in a loop", looping, served, allowed)


def garble(served: list[Served], allowed: Allowed) -> Check:
    """Answers with characters that no text has, which this checkpoint would not have written."""
    strange = [it for it in served if it.steps and strangeness((it.shown or it.steps)[-1]) > STRANGE]
    return _symptom(GARBLE, "have characters that no text has", strange, served, allowed)


def _symptom(name: str, what: str, found: list[Served], served: list[Served], allowed: Allowed) -> Check:
    """A symptom is no chance yet: its answers are held against what rounding does to this model, not the limit."""
    foreign = [answer for answer in found if not own_choice(answer, allowed.measured, len(found))]
    note = f"{len(found)} of {len(served)} answers {what}, {len(found) - len(foreign)} by this checkpoint's own choice"
    shown = f": {brief(foreign[0].steps[-1])}" if foreign else ""
    return judged(name, not foreign, note + shown, "none but by this checkpoint's own choice", len(served))


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


def concurrency(together: list[Served], alone: list[Served], allowed: Allowed) -> Check:
    """Answers to requests at one time are this checkpoint's own too; their texts may differ where an engine batches."""
    same = sum(a.steps[-1:] == b.steps[-1:] for a, b in zip(together, alone, strict=True))
    right, of = agreeing(together)
    part = right / max(of, 1)
    found = f"{same} of {len(together)} answers the same as one at a time, {part:.3f} of {of} tokens agree"
    expected = f"the same answers, or {allowed.text(of)}"
    if same == len(together):
        return passed(CONCURRENCY, found, expected, of)
    if not allowed.tells(of):
        return _too_few(CONCURRENCY, found, of)
    return judged(CONCURRENCY, of - right <= allowed.most(of), found, expected, of)


def long_prompt(answers: list[Served], allowed: Allowed) -> Check:
    """The whole of each long prompt was read, and the answers to them are this checkpoint's."""
    cut = [answer for answer in answers if answer.read != len(answer.prompt_ids)]
    shown = (cut or answers)[0]
    right, of = agreeing(answers)
    found = f"{shown.read} of {len(shown.prompt_ids)} prompt tokens read, {right / max(of, 1):.3f} of {of} tokens agree"
    if cut:
        return failed(LONG_PROMPT, found, f"{len(shown.prompt_ids)} prompt tokens read", of)
    if not allowed.tells(of):
        return _too_few(LONG_PROMPT, found, of)
    expected = f"all prompt tokens read, {allowed.text(of)}"
    return judged(LONG_PROMPT, of - right <= allowed.most(of), found, expected, of)


def verdict_lines(checks: list[Check]) -> list[str]:
    """The table of verdicts, a line each."""
    wide = max(len(check.name) for check in checks)
    return [
        f"{check.name:{wide}}  {check.verdict:14}  "
        + (check.reason or f"found {check.found}; expected {check.expected}")
        for check in checks
    ]


def failure_line(release: str, checks: list[Check], engine_error: str | None = None) -> str:
    """All failed checks in one line, and what the engine itself said."""
    bad = [check for check in checks if check.verdict == "failed"]
    told = "; ".join(f"{check.name}: {check.found}, expected {check.expected}" for check in bad)
    became = "" if engine_error is None or engine_error in told else f"; {engine_error}"
    return f"{release}: the smoke test failed {len(bad)} of {len(checks)} checks: {told}{became}"


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
