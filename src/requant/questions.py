"""Everything that the smoke test asks an engine, in one run of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from requant import decisions, smoke, vocabulary
from requant.config import Deploy, Target
from requant.distances import Row
from requant.engine_client import ask_all, client_of, log_probabilities
from requant.errors import RequantError, plain
from requant.jobs import progress
from requant.records import Check, ThroughputLevel
from requant.replay import Served
from requant.serving import Server, trouble
from requant.smoke_texts import Texts
from requant.throughput import measure

if TYPE_CHECKING:
    import torch
    from openai import OpenAI

LONG_TOKENS = 32  # of answers to long prompts: as many prompts are asked as it takes


@dataclass
class Asked:
    """What the engine answered. checks: those that need no chain; rows, words: what is compared of those texts;
    engine_error: how the engine ended, if it did, and the first error in its log if it did not answer."""

    checks: list[Check] = field(default_factory=list)
    served: list[Served] = field(default_factory=list)
    together: list[Served] = field(default_factory=list)
    long: list[Served] = field(default_factory=list)
    rows: "list[torch.Tensor]" = field(default_factory=list)
    words: "list[torch.Tensor]" = field(default_factory=list)
    other_model_status: int = 0
    levels: list[ThroughputLevel] = field(default_factory=list)
    levels_seconds: float = 0.0
    levels_error: RequantError | None = None
    engine_error: str | None = None


def ask_everything(
    release: str, server: Server, tokenizer: Any, texts: Texts, settings: Deploy, target: Target
) -> Asked:
    """All questions to the engine; one that is not answered is a failed check, or `levels_error`."""
    seconds, engine, model, most = float(target.request_seconds), target.engine, server.model, settings.max_tokens
    asked = Asked()

    def answers(prompts: list[str], at_once: int = 1) -> list[Served]:
        return ask_all(release, server, tokenizer, prompts, most, seconds, at_once)

    def keep(name: str, ask: Callable[[], Any]) -> None:
        """What `ask` gives is judged later; if it goes wrong, the check has failed."""
        try:
            ask()
        except (OpenAIError, RequantError) as error:
            asked.checks.append(smoke.failed(name, plain(error), "an answer"))
            asked.engine_error = asked.engine_error or trouble(server)

    def check(name: str, ask: Callable[[], Check]) -> None:
        keep(name, lambda: asked.checks.append(ask()))

    def ask_long() -> None:
        for prompt in texts.long:
            asked.long.extend(answers([prompt]))
            if sum(len(answer.steps) for answer in asked.long) >= LONG_TOKENS:
                break

    def other_name() -> Check:
        verdict, asked.other_model_status = smoke.wrong_model_name(client, model, engine)
        return verdict

    def check_with_answers(name: str, ask: Callable[[], Check]) -> None:
        if asked.served:
            check(name, ask)
        else:
            asked.checks.append(smoke.not_applicable(name, "there are no greedy answers to compare with"))

    from openai import OpenAIError

    keep(smoke.GREEDY, lambda: asked.served.extend(answers(texts.prompts)))
    _time(release, server, engine, texts, settings, seconds, asked)
    with client_of(server, seconds) as client:
        check_with_answers(smoke.STREAMING, lambda: smoke.streaming(client, model, asked.served, most))
        check_with_answers(smoke.STOP, lambda: smoke.stop_sequences(client, model, asked.served, most))
        check(smoke.WRONG_NAME, other_name)
        keep(smoke.CONCURRENCY, lambda: asked.together.extend(answers(texts.prompts, len(texts.prompts))))
        keep(smoke.LONG_PROMPT, ask_long)
        check_with_answers(
            smoke.TOO_LONG,
            lambda: smoke.over_long_input(client, model, engine, texts.too_long, texts.context, asked.served),
        )
        progress(f"{release}: asking for log-probabilities")
        keep(smoke.LOG_PROBABILITIES, lambda: asked.rows.extend(_read(client, model, texts, texts.rows)))
        keep(smoke.TOKENIZER, lambda: _ask_for_tokens(client, server, engine, tokenizer, texts, asked))
    return asked


def _time(
    release: str, server: Server, engine: str, texts: Texts, settings: Deploy, seconds: float, asked: Asked
) -> None:
    started = time.monotonic()
    try:
        asked.levels = measure(release, server, engine, texts.speed_prompts, settings.throughput, seconds)
    except RequantError as error:
        asked.levels_error = error
    asked.levels_seconds = time.monotonic() - started


def _read(client: "OpenAI", model: str, texts: Texts, rows: list[Row]) -> "list[torch.Tensor]":
    if texts.labels:
        return [decisions.ask(client, model, row, len(texts.labels)) for row in rows]
    return [log_probabilities(client, model, row) for row in rows]


def _ask_for_tokens(client: "OpenAI", server: Server, engine: str, tokenizer: Any, texts: Texts, asked: Asked) -> None:
    """Leaves a verdict, or, in `words`, what the chain has to be asked too."""
    expected = "this tokenizer's tokens"
    if found := smoke.texts_read([*asked.served, *asked.long]):
        asked.checks.append(smoke.failed(smoke.TOKENIZER, found, expected))
    elif texts.labels:
        asked.words.extend(_read(client, server.model, texts, texts.words))
    else:
        encoded = [*texts.prompts, texts.long[0]] if vocabulary.answers_tokenize(engine, tokenizer) else []
        found = vocabulary.differences(client, server.url, server.model, tokenizer, encoded)
        texts_too = f"and {len(encoded)} texts the same" if encoded else f"the same, texts as long: {vocabulary.SILENT}"
        told = found or f"{len(tokenizer)} tokens {texts_too}"
        asked.checks.append(smoke.judged(smoke.TOKENIZER, found is None, told, expected, len(tokenizer)))
