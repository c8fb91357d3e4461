"""How fast a served model answers: time to the first token, and tokens a second, at several numbers of requests.

Each repeat sends so many requests at once and waits for all of them. The first repeats are thrown away: an engine
compiles, and fills its caches, when it is first asked.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from requant.config import Throughput
from requant.engine_client import client_of, unanswered
from requant.errors import RequantError
from requant.jobs import progress
from requant.records import Spread, ThroughputLevel
from requant.serving import Server

if TYPE_CHECKING:
    from openai import OpenAI


@dataclass(frozen=True)
class Timed:
    """One answer: seconds from its request to its first text and to its end; tokens as the engine counted them."""

    first: float
    last: float
    prompt_tokens: int
    tokens: int

    @property
    def decode_rate(self) -> float | None:
        """Tokens a second behind the first; None if there is none."""
        return (self.tokens - 1) / (self.last - self.first) if self.tokens > 1 and self.last > self.first else None


def measure(
    release: str, server: Server, engine: str, prompts: list[str], settings: Throughput, seconds: float
) -> list[ThroughputLevel]:
    """All levels, lowest first. Requests take `prompts` in turn, so that prompts differ as far as there are enough.

    engine: as the target calls it. RequantError if a request is refused, or takes longer than `seconds`.
    """
    from openai import OpenAIError

    try:
        with client_of(server, seconds) as client:
            return [
                _level(release, client, server.model, engine, prompts, settings, count)
                for count in sorted(set(settings.concurrency))
            ]
    except OpenAIError as error:
        raise RequantError(f"{release}: throughput: {unanswered(error, server, seconds)}") from error


def _level(
    release: str, client: "OpenAI", model: str, engine: str, prompts: list[str], settings: Throughput, concurrency: int
) -> ThroughputLevel:
    timed: list[Timed] = []
    totals: list[float] = []
    with ThreadPoolExecutor(concurrency) as pool:
        for repeat in range(-settings.warmup, settings.repeats):
            turn = (repeat + settings.warmup) * concurrency
            asked = [prompts[(turn + number) % len(prompts)] for number in range(concurrency)]
            started = time.perf_counter()
            answers = list(pool.map(lambda prompt: time_one(client, model, engine, prompt, settings.max_tokens), asked))
            took = time.perf_counter() - started
            if repeat >= 0:
                timed += answers
                totals.append(sum(answer.tokens for answer in answers) / took)
    rates = [rate for answer in timed if (rate := answer.decode_rate) is not None]
    level = ThroughputLevel(
        concurrency=concurrency,
        requests=len(timed),
        prompt_tokens=spread([answer.prompt_tokens for answer in timed]),
        tokens=spread([answer.tokens for answer in timed]),
        first_token_seconds=spread([answer.first for answer in timed]),
        decode_tokens_per_second=spread(rates) if rates else None,
        total_tokens_per_second=spread(totals),
    )
    progress(
        f"{release}: {concurrency} at a time: first token after {level.first_token_seconds.median:.3f} s, "
        f"{level.total_tokens_per_second.median:.1f} tokens/s in all"
    )
    return level


def time_one(client: "OpenAI", model: str, engine: str, prompt: str, max_tokens: int) -> Timed:
    """One streamed answer. vLLM and sglang are told not to stop at an end of text; transformers can't be."""
    extra = {} if engine == "transformers" else {"extra_body": {"ignore_eos": True}}
    request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    started, first, usage = time.perf_counter(), None, None
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}, **extra):
        if first is None and any(choice.text for choice in chunk.choices):
            first = time.perf_counter() - started
        usage = chunk.usage or usage
    last = time.perf_counter() - started
    if usage is None:
        raise RequantError(f"{model}: the engine's stream ended without `usage`; expected it in the last chunk")
    return Timed(last if first is None else first, last, usage.prompt_tokens, usage.completion_tokens)


def spread(values: list[float]) -> Spread:
    return Spread(median=statistics.median(values), lowest=min(values), highest=max(values))
