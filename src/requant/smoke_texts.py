"""What the smoke test shows an engine: held-out texts, and the tokens of the vocabulary."""

from dataclasses import dataclass, field
from itertools import groupby, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant import decisions, vocabulary
from requant.config import Deploy, Target
from requant.distances import Row
from requant.engine_client import echo_rows, next_tokens
from requant.errors import RequantError
from requant.reference_text import first_rows
from requant.safetensors_io import load

if TYPE_CHECKING:
    import torch

    from requant.packed import PackedCheckpoint

LONG_PROMPTS = 8  # at most: an answer may end after a token


@dataclass
class Texts:
    """What the engine is shown. long: prompts of which as many are asked as it takes; rows: the reference text; words:
    the vocabulary in several contexts, if it is shown; labels: ids of the tokens whose log-probabilities are compared,
    where an engine gives those of labels alone."""

    prompts: list[str]
    speed_prompts: list[str]
    long: list[str]
    too_long: str
    context: int
    rows: list[Row]
    words: list[Row] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)

    def view(self, logits: "torch.Tensor", row: Row) -> "torch.Tensor":
        """What is compared of the chain's logits [tokens, vocabulary] of `row`."""
        return decisions.own(logits, row, self.labels) if row.texts else next_tokens(logits, row)


def choose_texts(
    checkpoint: "PackedCheckpoint", tokenizer: Any, heldout: "torch.Tensor", settings: Deploy, target: Target
) -> Texts:
    """The texts of the smoke test, all from held-out tokens [m, seqlen], -1 where padded."""
    limits = (checkpoint.config.get("max_position_embeddings"), checkpoint.config.get("sliding_window"), target.context)
    context = min(limit for limit in (*limits, 1 << 20) if limit)
    room = context - settings.max_tokens
    speed = settings.throughput
    texts = Texts(
        prompts=choose_prompts(tokenizer, heldout, settings.prompts, settings.prompt_tokens),
        speed_prompts=choose_prompts(tokenizer, heldout, max(speed.concurrency) * speed.repeats, speed.prompt_tokens),
        long=_long_texts(tokenizer, heldout, min(settings.long_prompt_tokens, room)),
        too_long=_overlong_text(tokenizer, heldout, context),
        context=context,
        rows=[],
    )
    rows = heldout_rows(heldout, settings.reference_tokens)
    if target.engine != "transformers":
        texts.rows = echo_rows(rows)
        return texts
    texts.labels = decisions.choose_labels(tokenizer, rows)
    texts.rows = [row for row in decisions.rows_of(tokenizer, rows) if row.ends]
    words = vocabulary.contexts(tokenizer, vocabulary.sample(tokenizer, settings.vocabulary_tokens))
    texts.words = [row for row in decisions.rows_of(tokenizer, words) if row.ends]
    return texts


def _long_texts(tokenizer: Any, heldout: "torch.Tensor", length: int) -> list[str]:
    """LONG_PROMPTS held-out texts of `length` tokens at most, read anew by the tokenizer; each begins elsewhere."""
    texts = []
    for number in range(LONG_PROMPTS):
        ids = _repeated(heldout, length, number * length)
        while len(ids) > 1 and _count(tokenizer, _text(tokenizer, ids)) > length:
            ids = ids[: len(ids) * 19 // 20]
        texts.append(_text(tokenizer, ids))
    return list(dict.fromkeys(texts))


def _overlong_text(tokenizer: Any, heldout: "torch.Tensor", context: int) -> str:
    """Held-out text of more than `context` tokens."""
    ids = _repeated(heldout, context + 1)
    while _count(tokenizer, _text(tokenizer, ids)) <= context:
        ids += _repeated(heldout, context // 8 + 8)
    return _text(tokenizer, ids)


def _repeated(heldout: "torch.Tensor", length: int, start: int = 0) -> list[int]:
    """`length` held-out tokens from number `start` on, from the beginning again where there are fewer."""
    ids = [token for token in heldout.flatten().tolist() if token >= 0]
    start %= len(ids)
    return (ids[start:] + ids * (length // len(ids) + 1))[:length]


def _count(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def heldout_tokens(path: Path) -> "torch.Tensor":
    """Held-out token ids [m, seqlen] of a token file, -1 where padded."""
    tokens = load(path)
    return tokens["heldout"].masked_fill(tokens["heldout_mask"] == 0, -1)


def heldout_rows(heldout: "torch.Tensor", count: int) -> list[list[int]]:
    """The first `count` of the held-out tokens [m, seqlen], -1 where padded, as rows."""
    return first_rows(heldout, (heldout >= 0).int(), count)


def choose_prompts(tokenizer: Any, heldout: "torch.Tensor", count: int, length: int) -> list[str]:
    """Beginnings of held-out documents: at most `length` tokens, and two thirds of the document.

    heldout [m, seqlen], negative where padded. An engine tokenizes the text it is sent: a document that was
    cut inside a word comes back as other tokens than it was, and is passed over. The first document of each
    sample comes first, then the second ones. RequantError if none survives.
    """
    documents = [_documents(row, set(tokenizer.all_special_ids)) for row in heldout.tolist()]
    prompts: list[str] = []
    for document in (document for rank in zip_longest(*documents, fillvalue=()) for document in rank):
        ids = list(document[: min(length, len(document) * 2 // 3)])
        text = tokenizer.decode(ids)
        if ids and text not in prompts and tokenizer(text, add_special_tokens=False)["input_ids"] == ids:
            prompts.append(text)
        if len(prompts) == count:
            break
    if not prompts:
        raise RequantError(
            f"held-out tokens: none of {sum(map(len, documents))} documents begins with tokens that survive "
            "decoding and tokenizing again; expected documents of 2 tokens or more, and a tokenizer that "
            "reads its own text"
        )
    return prompts


def _documents(row: list[int], special: set[int]) -> list[list[int]]:
    """The runs of ordinary tokens between special ones and padding."""
    ordinary = groupby(row, key=lambda token: token >= 0 and token not in special)
    return [list(run) for is_text, run in ordinary if is_text]
