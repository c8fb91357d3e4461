"""Token sets: several texts with their shares, tokenized and packed to one tensor each for tuning and evaluation.

A document never serves both: held-out text comes from sources of its own or, failing that, from the tenth of the
calibration documents whose hash says so.
"""

import hashlib
import random
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from requant.checkpoint import Checkpoint
from requant.config import Calibration, TextSource, source_name
from requant.documents import read_documents, remarks
from requant.errors import RequantError, brief
from requant.hashing import file_entry
from requant.jobs import progress
from requant.records import CalibrationRecord, TextSourceRecord, TokenSetRecord, write_json


@dataclass(frozen=True)
class TokenSet:
    """tokens int32 [n, seqlen]; mask uint8 [n, seqlen], 1 where a token is real and 0 where it is padding."""

    tokens: np.ndarray
    mask: np.ndarray
    sources: list[TextSourceRecord]


def is_held_out(document: str) -> bool:
    """Whether a document is in the tenth that is set aside for evaluation: a function of its text alone."""
    return hashlib.sha256(document.encode()).digest()[0] < 26


def sample_counts(shares: list[float], nsamples: int) -> list[int]:
    """Samples of each source: in proportion to its share, largest remainders first, `nsamples` in all."""
    total = sum(shares)
    exact = [share * nsamples / total for share in shares]
    counts = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda i: (counts[i] - exact[i], i))
    for index in by_remainder[: nsamples - sum(counts)]:
        counts[index] += 1
    return counts


def draw(
    documents: list[list[int]], samples: int, seqlen: int, pack: str, seed: str, pad: int
) -> tuple[np.ndarray, np.ndarray]:
    """Draws samples from tokenized documents in an order that `seed` decides.

    concat: documents joined and cut every `seqlen` tokens. pad: one document a sample, cut at `seqlen`, padded with
    `pad` on the right. Returns tokens and mask [found, seqlen], with found <= samples where the text does not suffice.
    """
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    tokens = np.full((samples, seqlen), pad, dtype=np.int32)
    mask = np.zeros((samples, seqlen), dtype=np.uint8)
    if pack == "pad":
        order = [index for index in order if len(documents[index]) > 1][:samples]
        for row, index in enumerate(order):
            cut = documents[index][:seqlen]
            tokens[row, : len(cut)], mask[row, : len(cut)] = cut, 1
        return tokens[: len(order)], mask[: len(order)]
    stream: list[int] = []
    for index in order:
        stream += documents[index]
        if len(stream) >= samples * seqlen:
            break
    found = min(len(stream) // seqlen, samples)
    tokens[:found] = np.array(stream[: found * seqlen], dtype=np.int32).reshape(found, seqlen)
    mask[:found] = 1
    return tokens[:found], mask[:found]


def token_set(
    sources: list[tuple[TextSource, list[str]]], nsamples: int, calibration: Calibration, tokenizer, what: str
) -> TokenSet:
    """Tokenizes and packs `sources`, each with the documents it may use.

    Raises RequantError with the numbers if a source has too few tokens for its part of `nsamples`.
    """
    shares = [source.share for source, _ in sources]
    counts = sample_counts(shares, nsamples)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    tokens, masks, records = [], [], []
    for (source, texts), count in zip(sources, counts, strict=True):
        name = source_name(source)
        documents = tokenize(tokenizer, texts)
        available = sum(map(len, documents))
        rows, mask = draw(
            documents, count, calibration.seqlen, calibration.pack, f"{calibration.seed}/{what}/{name}", pad
        )
        if len(rows) < count:
            unit = f"{count * calibration.seqlen} tokens" if calibration.pack == "concat" else f"{count} documents"
            raise RequantError(
                f"{source.path}: {available} tokens in {len(documents)} documents found; {what} of {count} samples of "
                f"{calibration.seqlen} tokens expects {unit}: add text or lower nsamples"
            )
        tokens.append(rows)
        masks.append(mask)
        records.append(
            TextSourceRecord(
                name=name,
                path=source.path,
                sha256=file_entry(source.path).sha256,
                share=source.share / sum(shares),
                documents=len(documents),
                tokens_available=available,
                samples=count,
                tokens=int(mask.sum()),
                remarks=remarks(texts),
            )
        )
    order = list(range(nsamples))
    random.Random(f"{calibration.seed}/{what}").shuffle(order)
    return TokenSet(np.concatenate(tokens)[order], np.concatenate(masks)[order], records)


def tokenize(tokenizer, texts: list[str]) -> list[list[int]]:
    """Token ids of each document, framed by the tokenizer's begin and end tokens where it has them."""
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    encoded = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
    return [begin + ids + end for ids in encoded]


def check_tokens(where: str, vocabulary: int, tokenizer) -> None:
    """Raises RequantError if a token that frames or pads text, or that the chat template writes, has no embedding.

    Tokens beyond the embedding that nothing uses are let be: makers add them for later.
    """
    used = {name: getattr(tokenizer, f"{name}_id") for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    if tokenizer.chat_template:
        used["chat template"] = max(_template_tokens(tokenizer), default=None)
    for name, token in used.items():
        if token is not None and token >= vocabulary:
            raise RequantError(
                f"{where}: the tokenizer's {name}: token {token}, {brief(tokenizer.convert_ids_to_tokens(token))}; "
                f"config.json has a vocabulary of {vocabulary}: expected the tokenizer that the model was trained with"
            )


def _template_tokens(tokenizer) -> list[int]:
    """The tokens of a short exchange as the chat template writes it; none if it takes other messages."""
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception:  # a template is a program, and may want roles, tools or texts of its own
        return []
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def make_token_sets(
    model: str,
    source: str | Path,
    name: str,
    calibration: Calibration,
    out_tokens: str | Path,
    out_record: str | Path,
) -> CalibrationRecord:
    """Writes the calibration and held-out tokens of `calibration` for the tokenizer of the checkpoint in `source`."""
    import torch

    from requant.safetensors_io import save

    start = time.monotonic()
    checkpoint = Checkpoint(source)
    tokenizer = checkpoint.tokenizer()
    vocabulary = checkpoint.config.get("vocab_size")
    if vocabulary is not None:
        check_tokens(str(source), vocabulary, tokenizer)
    held_sources = calibration.heldout.sources
    texts = [(text, read_documents(text)) for text in calibration.sources]
    if held_sources is None:
        tuning = [(text, [d for d in documents if not is_held_out(d)]) for text, documents in texts]
        held = [(text, [d for d in documents if is_held_out(d)]) for text, documents in texts]
    else:
        aside = {document for text in held_sources for document in read_documents(text)}
        tuning = [(text, [d for d in documents if d not in aside]) for text, documents in texts]
        held = [(text, read_documents(text)) for text in held_sources]
    sets = {
        "calibration": token_set(tuning, calibration.nsamples, calibration, tokenizer, "calibration"),
        "heldout": token_set(held, calibration.heldout.nsamples, calibration, tokenizer, "heldout"),
    }
    largest = max(int(found.tokens.max()) for found in sets.values())
    if vocabulary is not None and largest >= vocabulary:
        raise RequantError(
            f"{source}: the tokenizer gives token {largest} for these texts; config.json has a vocabulary of "
            f"{vocabulary}: expected the tokenizer that the model was trained with"
        )
    warned = (f"{text.path}: {remark}" for found in sets.values() for text in found.sources for remark in text.remarks)
    for line in dict.fromkeys(warned):
        progress(f"warning: calibration {name}: {line}")
    tensors = {part: torch.from_numpy(found.tokens) for part, found in sets.items()}
    tensors |= {f"{part}_mask": torch.from_numpy(found.mask) for part, found in sets.items()}
    save(out_tokens, tensors)
    files = [checkpoint.directory / name for name in checkpoint.tokenizer_files]
    record = CalibrationRecord(
        model=model,
        calibration=name,
        tokenizer_sha256=hashlib.sha256("".join(file_entry(file).sha256 for file in files).encode()).hexdigest(),
        seqlen=calibration.seqlen,
        pack=calibration.pack,
        seed=calibration.seed,
        calibration_set=_set_record(sets["calibration"]),
        heldout_set=_set_record(sets["heldout"]),
        seconds=time.monotonic() - start,
    )
    write_json(out_record, record)
    return record


def _set_record(found: TokenSet) -> TokenSetRecord:
    return TokenSetRecord(
        samples=len(found.tokens),
        tokens=int(found.mask.sum()),
        sha256=hashlib.sha256(found.tokens.astype("<i4").tobytes()).hexdigest(),
        sources=found.sources,
    )
