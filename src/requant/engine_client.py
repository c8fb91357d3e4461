"""Asking an engine over the OpenAI API: greedy answers token by token, and log-probabilities where it gives them."""

from typing import TYPE_CHECKING, Any

from requant.distances import Row
from requant.errors import RequantError, plain
from requant.jobs import progress
from requant.replay import INCOMPLETE, Served
from requant.serving import Server, trouble

if TYPE_CHECKING:
    import torch
    from openai import OpenAI


TOP = 20  # largest log-probabilities of a place: as many as vLLM gives unless it is told otherwise


def client_of(server: Server, seconds: float) -> "OpenAI":
    """A client for the loopback alone: no proxy, no key of the caller, no retry that hides a failure."""
    from openai import DefaultHttpxClient, OpenAI

    return OpenAI(
        base_url=f"{server.url}/v1",
        api_key="none",
        organization="",
        project="",
        timeout=seconds,
        max_retries=0,
        http_client=DefaultHttpxClient(trust_env=False),
    )


def ask_all(
    release: str, server: Server, tokenizer: Any, prompts: list[str], max_tokens: int, seconds: float, at_once: int = 1
) -> list[Served]:
    """A greedy continuation of each prompt, `at_once` of them at a time."""
    from concurrent.futures import ThreadPoolExecutor

    from openai import OpenAIError

    def one(number: int, client: "OpenAI") -> Served:
        try:
            return ask(client, server.model, tokenizer, prompts[number], max_tokens)
        except OpenAIError as error:
            raise RequantError(
                f"{release}: prompt {number + 1} of {len(prompts)}: {unanswered(error, server, seconds)}"
            ) from error

    with client_of(server, seconds) as client, ThreadPoolExecutor(at_once) as pool:
        served = list(pool.map(lambda number: one(number, client), range(len(prompts))))
    tokens = sum(len(answer.steps) for answer in served)
    progress(f"{release}: {len(served)} answers of {tokens} tokens, {at_once} at a time")
    return served


def unanswered(error: Exception, server: Server, seconds: float) -> str:
    """Why there is no answer, in one line: what the client says, and what became of the engine."""
    found = trouble(server) or "see the engine's log, or raise the target's `request_seconds`"
    return f"{type(error).__name__}: {plain(error)}; expected an answer within {seconds:g} s: {found}"


def ask(client: "OpenAI", model: str, tokenizer: Any, prompt: str, max_tokens: int) -> Served:
    """One prompt through /v1/completions, at temperature 0.

    The API returns text, not ids. Streaming shows the text token by token, except where a token completes no
    character or is a special one. Then the prompt is asked again with every smaller limit: greedy answers are
    prefixes of each other.
    """
    prompt_ids = tokenizer(prompt)["input_ids"]
    pieces, read, written = stream(client, model, prompt, max_tokens)
    end_of_text = written < max_tokens  # the last token shows no text
    if len(pieces) + end_of_text == written:
        steps = ["".join(pieces[: number + 1]) for number in range(written)]
    else:
        steps = ["".join(stream(client, model, prompt, limit)[0]) for limit in range(1, written)] + ["".join(pieces)]
    # Of bytes that complete no character an engine shows nothing, or a mark if the answer ends there.
    return Served(prompt, prompt_ids, [step.rstrip(INCOMPLETE) for step in steps], read=read, shown=steps)


def stream(client: "OpenAI", model: str, prompt: str, max_tokens: int) -> tuple[list[str], int, int]:
    """(pieces of text, prompt tokens, tokens written)."""
    pieces, usage = [], None
    request = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    for chunk in client.completions.create(**request, stream=True, stream_options={"include_usage": True}):
        pieces += [choice.text for choice in chunk.choices if choice.text]
        usage = chunk.usage or usage
    if usage is None:
        raise RequantError(f"{model}: the engine's stream ended without `usage`; expected it in the last chunk")
    return pieces, usage.prompt_tokens, usage.completion_tokens


def log_probabilities(client: "OpenAI", model: str, row: Row) -> "torch.Tensor":
    """float64 [pieces, 1 + TOP]: the log-probability of each token of `row` but the first, as the engine echoes them,
    and the TOP largest that the engine had in its place, in falling order.

    vLLM and sglang take token ids for a prompt. Which tokens are the largest is not read. vLLM names them by their ids
    if it is asked to; where an engine names them by their texts, of which several tokens may have one (parts of a
    character), it gives one value for all of these: then the largest are not known, and are NaN. RequantError if it
    gives none, or for another number of tokens.
    """
    import torch

    request = {"model": model, "prompt": row.ids, "max_tokens": 1, "temperature": 0}
    by_id = {"return_tokens_as_token_ids": True}
    answer = client.completions.create(**request, echo=True, logprobs=TOP, extra_body=by_id)
    echoed = answer.choices[0].logprobs
    found, tops = (echoed.token_logprobs or [], echoed.top_logprobs or []) if echoed else ([], [])
    count = len(row.ids)
    if min(len(found), len(tops)) < count or None in found[1:count] or not all(tops[1:count]):
        raise RequantError(
            f"/v1/completions: {len(found)} log-probabilities and {len(tops)} lists of the largest for a prompt of "
            f"{count} tokens with `echo`; expected both for each token"
        )
    largest = [sorted(top.values(), reverse=True)[:TOP] for top in tops[1:count]]
    known = [values if len(values) == TOP else [float("nan")] * TOP for values in largest]
    pairs = zip(found[1:count], known, strict=True)
    return torch.tensor([[own, *values] for own, values in pairs], dtype=torch.float64)


def next_tokens(logits: "torch.Tensor", row: Row) -> "torch.Tensor":
    """The same float64 [pieces, 1 + TOP] from a chain's logits [tokens, vocabulary] of the row."""
    import torch

    scores = logits[:-1].double().log_softmax(-1)
    own = scores.gather(-1, torch.tensor(row.ids[1:], device=scores.device)[:, None])
    return torch.cat([own, scores.topk(TOP, dim=-1).values], dim=-1).cpu()


def echo_rows(rows: list[list[int]]) -> list[Row]:
    """Rows of which every token but the first is compared."""
    return [Row(ids, list(range(1, len(ids)))) for ids in rows if len(ids) > 1]
