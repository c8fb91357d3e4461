"""Log-probability ratios out of `transformers serve`, which gives no log-probabilities of a text.

It does answer typed questions, POST /v1/systemone, with the probabilities of labels that are single tokens. A decision
config beside the served weights makes the prompt the text itself, and asks after chosen tokens of it. The differences
between the log-probabilities of the labels are those of the model, whatever the tokens that are no labels have.

The engine tokenizes the text. To make it read these very tokens, they are parted by a special token that it drops
again (transformers.decision: `<|split|>`); a text that would still come out as other tokens is found beforehand.
"""

import json
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from requant.distances import Row, centred
from requant.errors import RequantError

if TYPE_CHECKING:
    import torch
    from openai import OpenAI

LABELS = 26  # that the engine accepts for a question
QUESTIONS = 64  # that it accepts for a request
FEWEST_LABELS = 4
LONGEST_PIECE = 8  # tokens that may be needed for a text that reads back as these tokens: parts of one character
MARK, SPLIT = "<|mark|>", "<|split|>"  # of transformers.decision
# `state` is a list of parts, one a question, each a list of pieces of text; `questions` makes them one prompt.
TEMPLATE = (
    "{% set asked = questions %}{% for part in state %}"
    f"{{% for piece in part %}}{{{{ piece }}}}{SPLIT}{{% endfor %}}{MARK}"
    "{% endfor %}"
)


def rows_of(tokenizer: Any, rows: list[list[int]]) -> list[Row]:
    """The rows as pieces of text that read back as their tokens; a row ends before tokens of which none can be made."""
    return [_row(tokenizer, ids) for ids in rows]


def _row(tokenizer: Any, ids: list[int]) -> Row:
    ends: list[int] = []
    texts: list[str] = []
    start = 0
    while start < len(ids):
        end = next((end for end in range(start + 1, start + 1 + LONGEST_PIECE) if _reads(tokenizer, ids[start:end])), 0)
        if not end or end > len(ids):
            break
        texts.append(tokenizer.decode(ids[start:end], clean_up_tokenization_spaces=False))
        ends.append(end)
        start = end
    return Row(ids[:start], ends, texts)


def _reads(tokenizer: Any, ids: list[int]) -> bool:
    """Whether the text of these tokens, alone, is read as them."""
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"] == ids


def choose_labels(tokenizer: Any, rows: list[list[int]]) -> list[int]:
    """The most frequent ordinary tokens of `rows` whose text, alone, is read as them: LABELS at most.

    RequantError if there are too few of them to compare.
    """
    special = set(tokenizer.all_special_ids)
    counted = Counter(token for row in rows for token in row if token not in special)
    ranked = sorted(counted, key=lambda token: (-counted[token], token))
    labels: list[int] = []
    for token in ranked:
        if len(labels) < LABELS and _reads(tokenizer, [token]):
            labels.append(token)
    if len(labels) < FEWEST_LABELS:
        raise RequantError(
            f"held-out tokens: {len(labels)} of them are read back from their own text; expected {FEWEST_LABELS} "
            "or more"
        )
    return labels


def lay_out(folder: Path, tokenizer: Any, labels: list[int]) -> None:
    """Puts the decision config of `labels` beside the served weights in `folder`."""
    texts = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in labels]
    settings = {"labels": {"choice": texts}, "sanitize_control_tokens": False}
    (folder / "decision.json").write_text(json.dumps(settings), encoding="utf-8")
    (folder / "decision_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def ask(client: "OpenAI", model: str, row: Row, labels: int) -> "torch.Tensor":
    """Centred log-probabilities float64 [pieces, labels] after each piece of `row`, as the engine has them.

    OpenAIError if it refuses, RequantError if it counts other tokens than were sent.
    """
    import torch

    criteria = {str(index): None for index in range(labels)}
    found = []
    for first in range(0, len(row.ends), QUESTIONS):
        last = min(first + QUESTIONS, len(row.ends))
        parts = [row.texts[: first + 1], *([text] for text in row.texts[first + 1 : last])]
        names = [str(index) for index in range(len(parts))]
        questions = {name: {"type": "choice", "criteria": criteria} for name in names}
        body = {"model": model, "state": parts, "questions": questions}
        data: Any = client.post("/systemone", cast_to=object, body=body)
        if (read := data["usage"]["input_tokens"]) != row.ends[last - 1]:
            raise RequantError(
                f"/v1/systemone: the engine read {read} tokens; expected {row.ends[last - 1]}: its tokenizer is not "
                "the release's"
            )
        found += [[data["answers"][name]["probabilities"][key] for key in criteria] for name in names]
    return centred(torch.tensor(found, dtype=torch.float64).clamp(min=torch.finfo(torch.float32).tiny).log())


def own(logits: "torch.Tensor", row: Row, labels: list[int]) -> "torch.Tensor":
    """The same float64 [pieces, labels] from a chain's logits [tokens, vocabulary] of the row."""
    return centred(logits[row.places][:, labels])
