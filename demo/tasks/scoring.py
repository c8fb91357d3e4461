"""Scores of the lm-eval tasks beside this file."""


def exact_match_by_kind(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """1 or 0 for one exercise, counted over all kinds and under its own."""
    right = float(results[0].strip() == doc["answer"])
    return {"exact_match": right, doc["kind"]: right}


def perplexity(doc: dict[str, str], results: list[tuple[float, bool]]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of one story in nats, with the number of words or bytes that it is spread over."""
    ((log_likelihood, _),) = results
    words, size = len(doc["text"].split()), len(doc["text"].encode())
    return {
        "word_perplexity": (log_likelihood, words),
        "byte_perplexity": (log_likelihood, size),
        "bits_per_byte": (log_likelihood, size),
    }
