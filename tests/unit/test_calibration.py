"""Token sets: shares, packing, seeds, disjoint held-out text, and errors that say how much text there is."""

import json

import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file

from requant.calibration import draw, is_held_out, make_token_sets, sample_counts
from requant.config import Calibration, HeldOut, TextSource
from requant.documents import read_documents
from requant.errors import RequantError
from requant.records import CalibrationRecord, read_json


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    tiny.write_tokenizer(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    return directory


def build(source, folder, calibration):
    record = make_token_sets("m", source, "c", calibration, folder / "t.safetensors", folder / "c.json")
    return load_file(folder / "t.safetensors"), record


def calibration(folder, **changes):
    a, b = tiny.write_text(folder / "a.txt", 300, 1), tiny.write_text(folder / "b.txt", 300, 2)
    sources = [TextSource(path=str(a), share=3), TextSource(path=str(b), share=1)]
    settings = {"sources": sources, "nsamples": 16, "seqlen": 32, "heldout": HeldOut(nsamples=4)} | changes
    return Calibration(**settings)


def test_shares_decide_the_samples_of_each_source(source, tmp_path):
    tensors, record = build(source, tmp_path, calibration(tmp_path))
    assert tensors["calibration"].shape == (16, 32) and tensors["heldout"].shape == (4, 32)
    assert [text.samples for text in record.calibration_set.sources] == [12, 4]
    assert [text.tokens for text in record.calibration_set.sources] == [12 * 32, 4 * 32]
    assert record.calibration_set.tokens == 16 * 32
    assert read_json(tmp_path / "c.json", CalibrationRecord) == record


def test_the_hash_is_of_the_tokens_and_the_seed_decides_them(source, tmp_path):
    import hashlib

    tensors, record = build(source, tmp_path, calibration(tmp_path))
    again, same = build(source, tmp_path, calibration(tmp_path))
    _, other = build(source, tmp_path, calibration(tmp_path, seed=1))
    assert record.calibration_set.sha256 == hashlib.sha256(tensors["calibration"].astype("<i4").tobytes()).hexdigest()
    assert same.model_copy(update={"seconds": record.seconds}) == record and np.array_equal(
        again["heldout"], tensors["heldout"]
    )
    assert other.calibration_set.sha256 != record.calibration_set.sha256


def test_concat_joins_documents_framed_by_their_marks(source, tmp_path):
    tensors, _ = build(source, tmp_path, calibration(tmp_path))
    assert tensors["calibration_mask"].all()
    begin, end = 0, 1  # <s>, </s>
    for row in tensors["calibration"]:
        for at in np.flatnonzero(row[:-1] == end):
            assert row[at + 1] == begin


def test_pad_gives_each_document_a_sample(source, tmp_path):
    tensors, record = build(source, tmp_path, calibration(tmp_path, pack="pad", seqlen=128))
    tokens, mask = tensors["calibration"], tensors["calibration_mask"]
    assert (tokens[:, 0] == 0).all(), "each sample begins a document"
    for row, valid in zip(tokens, mask, strict=True):
        length = int(valid.sum())
        assert 0 < length < 128 and valid[:length].all()
        assert row[length - 1] == 1 and (row[length:] == 2).all()
    assert record.calibration_set.tokens == int(mask.sum())


def test_held_out_documents_are_not_tuned_on(source, tmp_path):
    text = tmp_path / "docs.jsonl"
    documents = tiny.sentences(400, 5)
    text.write_text("".join(json.dumps({"body": document}) + "\n" for document in documents))
    settings = Calibration(
        sources=[TextSource(path=str(text), field="body")],
        nsamples=40,
        seqlen=96,
        pack="pad",
        heldout=HeldOut(nsamples=10),
    )
    tensors, _ = build(source, tmp_path, settings)
    rows = {part: {bytes(row) for row in tensors[part]} for part in ("calibration", "heldout")}
    assert not rows["calibration"] & rows["heldout"]
    aside = sum(map(is_held_out, documents))
    assert 10 <= aside <= 80, "about a tenth"


def test_text_of_its_own_for_evaluation_is_left_out_of_tuning(source, tmp_path):
    shared = tiny.write_text(tmp_path / "same.txt", 60, 9)
    held = HeldOut(nsamples=2, sources=[TextSource(path=str(shared))])
    with pytest.raises(RequantError, match="0 tokens in 0 documents found"):
        build(source, tmp_path, calibration(tmp_path, sources=[TextSource(path=str(shared))], heldout=held))


def test_too_little_text_says_how_much_there_is(source, tmp_path):
    with pytest.raises(RequantError) as error:
        build(source, tmp_path, calibration(tmp_path, nsamples=4096))
    message = str(error.value)
    available = read_json_tokens(source, tmp_path / "a.txt")
    assert f"{available} tokens in" in message
    assert "calibration of 3072 samples of 32 tokens expects 98304 tokens" in message
    assert str(tmp_path / "a.txt") in message and "\n" not in message
    assert not (tmp_path / "t.safetensors").exists()


def read_json_tokens(source, path):
    from requant.calibration import tokenize
    from requant.checkpoint import Checkpoint

    documents = [text for text in read_documents(TextSource(path=str(path))) if not is_held_out(text)]
    return sum(map(len, tokenize(Checkpoint(source).tokenizer(), documents)))


def test_sample_counts_add_up():
    assert sample_counts([1, 1, 1], 10) == [4, 3, 3]
    assert sample_counts([0.5, 0.5], 7) == [4, 3]
    assert sample_counts([9, 1], 4) == [4, 0]


def test_draw_gives_what_there_is():
    tokens, mask = draw([[1, 2, 3], [4, 5]], 4, 2, "concat", "s", 0)
    assert tokens.shape == (2, 2) and mask.all()
    assert sorted(tokens.flatten().tolist()) in ([1, 2, 3, 4], [1, 2, 4, 5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"txt": "b"}\n', "line 2: ['txt'] found; expected a JSON object with the key 'text'"),
        ('{"text": "a"}\nnot json\n', "line 2: no JSON: expected ident"),
        ('{"text": 5}\n', "line 1: 'text' is no text"),
    ],
)
def test_a_bad_line_is_named(tmp_path, content, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(RequantError) as error:
        read_documents(TextSource(path=str(path)))
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def test_a_line_separator_inside_a_text_parts_nothing(tmp_path):
    path = tmp_path / "u.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three"}, ensure_ascii=False) + "\n\n", encoding="utf-8")
    assert read_documents(TextSource(path=str(path))) == ["one\u2028two\u0085three"]


def test_a_missing_or_binary_text_is_named(tmp_path):
    with pytest.raises(RequantError, match="nowhere.txt: not there"):
        read_documents(TextSource(path=str(tmp_path / "nowhere.txt")))
    (tmp_path / "b.txt").write_bytes(b"abc\xff\xfe")
    with pytest.raises(RequantError, match="not UTF-8 at byte 3"):
        read_documents(TextSource(path=str(tmp_path / "b.txt")))


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(source, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    tiny.write_tokenizer(small)
    (small / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 100}))
    with pytest.raises(RequantError, match="config.json has a vocabulary of 100"):
        build(small, tmp_path, calibration(tmp_path))
