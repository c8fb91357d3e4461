"""Whether an engine has the release's tokenizer: each text means the same token, and each token the same text.

An engine that tells how it tokenizes is asked for the whole vocabulary. To one that doesn't, each token of a sample
is shown in several contexts: what the model makes of it must be what the chain makes of it in one of them at least.
Rounding may disturb a token once, but not in all its contexts; an exchanged token is another one everywhere.
"""

import random
from typing import TYPE_CHECKING, Any

from requant.distances import Reading, Row
from requant.errors import RequantError, brief

if TYPE_CHECKING:
    import torch
    from openai import OpenAI

CONTEXTS = 3
IN_A_ROW = 31  # tokens after the first
USUAL = 0.99  # part of the tokens that rounding moves less than what is usual
MARGIN = 2  # beside `deploy.rounding`: the largest of a thousand tokens is looked at, not the bulk of them
CHUNK = 2048  # tokens that a request of the vocabulary has
LARGEST = 2**63 - 1  # that sglang writes into an answer
SILENT = "sglang answers no /tokenize for a tokenizer without model_max_length"


def sample(tokenizer: Any, count: int) -> list[int]:
    """At most `count` ordinary tokens of the vocabulary whose text, alone, is read as them; added ones are not."""
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}  # some models have no embedding for
    ordinary = [token for token in range(len(tokenizer)) if token not in added]
    random.Random(0).shuffle(ordinary)
    texts = ((token, tokenizer.decode([token], clean_up_tokenization_spaces=False)) for token in ordinary)
    found: list[int] = []
    for token, text in texts:
        if len(found) == count:
            break
        if tokenizer(text, add_special_tokens=False)["input_ids"] == [token]:
            found.append(token)
    return found


def contexts(tokenizer: Any, tokens: list[int]) -> list[list[int]]:
    """Rows in which each of `tokens` stands CONTEXTS times, after other tokens each time."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    rows = []
    for seed in range(CONTEXTS):
        order = list(tokens)
        random.Random(seed).shuffle(order)
        rows += [begin + order[start : start + IN_A_ROW] for start in range(0, len(order), IN_A_ROW)]
    return rows


def nearest(rows: list[Row], distances: list["torch.Tensor"]) -> dict[int, float]:
    """By token the smallest of the distances behind it."""
    found: dict[int, float] = {}
    for row, values in zip(rows, distances, strict=True):
        for place, value in zip(row.places, values.tolist(), strict=True):
            token = row.ids[place]
            found[token] = min(found.get(token, value), value)
    return found


def limits_of(read: Reading, factor: float) -> dict[int, float]:
    """By token how far it may be off, given the largest `nearest` of any other rounding of the chain."""
    noise = [nearest(read.rows, part) for part in read.noise]
    return limits({token: max(part[token] for part in noise) for token in noise[0]}, factor)


def limits(noise: dict[int, float], factor: float) -> dict[int, float]:
    """By token how far it may be off, given what rounding does to it.

    A token that lies between two experts by itself is sent to either in all its contexts. So each token has its own
    limit, and none a smaller one than nearly all of them have.
    """
    ordered = sorted(noise.values())
    usual = ordered[int(USUAL * (len(ordered) - 1))]
    return {token: MARGIN * factor * max(usual, value) for token, value in noise.items()}


def answers_tokenize(engine: str, tokenizer: Any) -> bool:
    """Whether the engine can answer /tokenize: sglang (0.5.16) puts the tokenizer's model_max_length into each answer,
    and ends it with status 500 where that is the number that transformers has for none, 10^30."""
    return engine != "sglang" or tokenizer.model_max_length <= LARGEST


def differences(client: "OpenAI", url: str, model: str, tokenizer: Any, texts: list[str]) -> str | None:
    """What an engine with /tokenize and /detokenize has other than this tokenizer; None if nothing.

    All tokens are decoded by it, and `texts` encoded. RequantError if an answer has neither shape that is known.
    """
    ordinary = sorted(set(range(len(tokenizer))) - set(tokenizer.all_special_ids))
    for start in range(0, len(ordinary), CHUNK):
        chunk = ordinary[start : start + CHUNK]
        ours = tokenizer.decode(chunk, clean_up_tokenization_spaces=False)
        theirs = _post(client, f"{url}/detokenize", {"model": model, "tokens": chunk}, ("prompt", "text"))
        if theirs != ours:
            at = next((place for place, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
            return f"tokens {chunk[0]} to {chunk[-1]} read {brief(theirs[at:])} where ours read {brief(ours[at:])}"
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        body = {"model": model, "prompt": text, "add_special_tokens": False}
        if (found := _post(client, f"{url}/tokenize", body, ("tokens",))) != ids:
            return f"{brief(text)} is {str(found)[:60]}, where ours is {str(ids)[:60]}"
    return None


def _post(client: "OpenAI", url: str, body: dict, keys: tuple[str, ...]) -> Any:
    answer: Any = client.post(url, cast_to=object, body=body)
    for key in keys:
        if isinstance(answer, dict) and key in answer:
            return answer[key]
    raise RequantError(f"{url}: {brief(str(answer))}; expected an object with {' or '.join(keys)}")
