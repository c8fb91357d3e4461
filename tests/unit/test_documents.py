"""Texts are what they hold, whatever their file is called; what is not read is refused when a build is planned."""

import codecs
import gzip
import json
import random

import pytest
import tiny

from requant.calibration import make_token_sets
from requant.config import Calibration, HeldOut, TextSource
from requant.documents import BEGINNING, check_text, read_documents, remarks
from requant.errors import RequantError
from requant.planning import text_files

DOCUMENTS = tiny.sentences(12, 3)
LINES = "".join(json.dumps({"id": number, "text": text}) + "\n" for number, text in enumerate(DOCUMENTS))
PROSE = "\n\n".join(DOCUMENTS) + "\n"
CHAT = "".join(json.dumps({"messages": [{"role": "user", "content": text}]}) + "\n" for text in DOCUMENTS)


def written(folder, name: str, data: str | bytes):
    path = folder / name
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("A.JSONL", LINES),
        ("a.ndjson", LINES),
        ("a.json", LINES),
        ("a.Json", LINES.rstrip("\n")),
        ("a.txt", LINES),
        ("marked.jsonl", codecs.BOM_UTF8 + LINES.encode()),
        ("windows.jsonl", LINES.replace("\n", "\r\n")),
        ("gaps.jsonl", LINES.replace("\n", "\n\n  \n")),
        ("a.txt", PROSE),
        ("A.TXT", PROSE),
        ("a.md", PROSE),
        ("noname", PROSE),
        ("marked.txt", codecs.BOM_UTF8 + PROSE.encode()),
        ("windows.txt", PROSE.replace("\n", "\r\n")),
        ("indented.txt", PROSE.replace("\n\n", "\n \t\n\n")),
        ("wiki.md", PROSE.replace(DOCUMENTS[0], "[[link]] " + DOCUMENTS[0])),
        ("reference.txt", PROSE.replace(DOCUMENTS[0], "[1] {a} " + DOCUMENTS[0])),
    ],
)
def test_the_same_documents_come_out_of_each_form(tmp_path, name, data):
    path = written(tmp_path, name, data)
    check_text(path, "text")
    found = read_documents(TextSource(path=str(path)))
    assert [text.removeprefix("[1] {a} ").removeprefix("[[link]] ") for text in found] == DOCUMENTS


REFUSED = {
    "table.csv": ("id,text\n1,the cat\n", "suffix '.csv' found; expected UTF-8 text: JSON lines (.jsonl"),
    "table.TSV": ("id\ttext\n", "suffix '.TSV' found"),
    "page.html": ("<p>the cat</p>", "suffix '.html' found"),
    "a.jsonl.gz": (gzip.compress(LINES.encode()), "gzip found; expected UTF-8 text"),
    "packed.jsonl": (gzip.compress(LINES.encode()), "gzip found"),
    "a.parquet": (b"PAR1\x15\x04", "Parquet found"),
    "renamed.txt": (b"PAR1\x15\x04", "Parquet found"),
    "a.jsonl.zst": (b"\x28\xb5\x2f\xfd\x00", "zstd found"),
    "paper.txt": (b"%PDF-1.7\n", "PDF found"),
    "wide.txt": (PROSE.encode("utf-16"), "UTF-16 found"),
    "wider.txt": (PROSE.encode("utf-32"), "UTF-32 found"),
    "zeros.txt": (PROSE.encode() + bytes(8), "binary data found"),
    "latin.txt": (PROSE.encode() + "caf\xe9".encode("latin-1"), "not UTF-8 at byte"),
    "array.json": (json.dumps([{"text": text} for text in DOCUMENTS]), "JSON that is no JSON lines found"),
    "pretty.json": (json.dumps([{"text": text} for text in DOCUMENTS], indent=1), "JSON that is no JSON lines found"),
    "object.json": (json.dumps({"texts": DOCUMENTS}, indent=1), "JSON that is no JSON lines found"),
    "strings.json": (json.dumps(DOCUMENTS), "JSON that is no JSON lines found"),
    "prose.json": (PROSE, "JSON that is no JSON lines found"),
    "array.txt": (json.dumps([{"text": text} for text in DOCUMENTS], indent=1), "JSON that is no JSON lines found"),
    "array.md": (json.dumps(DOCUMENTS), "JSON that is no JSON lines found"),
    "broken.txt": (LINES + "{\n", "JSON that is no JSON lines found"),
    "chat.jsonl": (CHAT, "line 1: ['messages'] found; expected a JSON object with the key 'text'"),
    "chat.txt": (CHAT, "line 1: ['messages'] found"),
    "null.jsonl": (LINES + '{"text": null}\n', "line 13: 'text' is no text, but None"),
    "half.jsonl": (LINES + '{"text": "half an emoji \\ud83d"}\n', "line 13: no JSON"),
    "prose.jsonl": (PROSE, "line 1: no JSON"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_is_refused_when_planned_by_file_and_key(tmp_path, name):
    data, message = REFUSED[name]
    path = written(tmp_path, name, data)
    held = [{"path": str(written(tmp_path, "held.txt", PROSE)), "field": "text"}]
    for sources, heldout, key in (
        ([{"path": str(path), "field": "text"}], None, "calibrations.c.sources[0].path"),
        (held, [*held, {"path": str(path), "field": "text"}], "calibrations.c.heldout.sources[1].path"),
    ):
        with pytest.raises(RequantError) as caught:
            text_files("c", {"sources": sources, "heldout": {"sources": heldout}})
        line = str(caught.value)
        assert line.startswith(f"{path}: ") and message in line and line.endswith(f"({key})") and "\n" not in line
    with pytest.raises(RequantError):
        read_documents(TextSource(path=str(path)))


@pytest.mark.parametrize(
    ("name", "data"), [("a.txt", ""), ("a.md", " \n\n \n"), ("a.jsonl", "\n \n"), ("b.jsonl", '{"text": " "}\n')]
)
def test_a_file_without_text_is_refused_when_planned(tmp_path, name, data):
    with pytest.raises(RequantError, match=f"{name}: no text in it; expected documents$"):
        check_text(written(tmp_path, name, data), "text")


def test_the_beginning_of_a_long_file_is_enough_to_plan_with(tmp_path):
    """Its last character and its last line may be cut; what is behind is met by the job that reads it all."""
    text = "é" * 97 + "."
    lines = json.dumps({"text": text}, ensure_ascii=False) + "\n"
    many = written(tmp_path, "many.jsonl", lines * (BEGINNING // len(lines.encode()) + 2))
    check_text(many, "text")
    assert set(read_documents(TextSource(path=str(many)))) == {text}
    long = written(tmp_path, "one.json", json.dumps({"text": text * BEGINNING}, ensure_ascii=False))
    check_text(long, "text")
    assert len(read_documents(TextSource(path=str(long)))) == 1
    prose = written(tmp_path, "long.txt", (text + "\n\n") * (BEGINNING // 100) + "\xe9")
    check_text(prose, "text")
    late = written(tmp_path, "late.txt", prose.read_bytes() + b"\xff")
    check_text(late, "text")
    with pytest.raises(RequantError, match="not UTF-8 at byte"):
        read_documents(TextSource(path=str(late)))


def test_blank_documents_do_not_count(tmp_path):
    lines = [json.dumps({"text": text}) for text in ("a", "", "  \n\t", "\u3000", "b")]
    path = written(tmp_path, "a.jsonl", "\n".join(lines))
    assert read_documents(TextSource(path=str(path))) == ["a", "b"]


def test_one_document_and_hardly_any_prose_are_told():
    draw = random.Random(1)
    numbers = " ".join(str(draw.random()) for _ in range(500))
    base64 = "".join(draw.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/", k=5000))
    assert remarks(DOCUMENTS) == [] and remarks([]) == []
    assert remarks(["猫坐在垫子上。狗跑了。" * 20] * 2) == []
    assert remarks(["def f(x):\n    return x + 1\n" * 20] * 2) == []
    (one,) = remarks([PROSE])
    assert one.startswith(f"one document of {len(PROSE):,} characters")
    (counted,) = remarks([numbers, numbers])
    assert "hardly any prose" in counted and "letters or blanks" in counted
    (coded,) = remarks([base64, base64])
    assert "hardly any prose: 0.0% of its characters are blanks" in coded
    (links,) = remarks([f"https://example.com/articles/{number}" for number in range(50)])
    assert "hardly any prose" in links


def test_remarks_stand_in_the_record_and_on_the_terminal(tmp_path, capsys):
    tiny.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 320}))
    text = written(tmp_path, "lines.txt", "\n".join(tiny.sentences(300, 1)))
    held = HeldOut(nsamples=2, sources=[TextSource(path=str(tiny.write_text(tmp_path / "held.txt", 60, 9)))])
    settings = Calibration(sources=[TextSource(path=str(text))], nsamples=4, seqlen=32, heldout=held)
    record = make_token_sets("m", tmp_path, "c", settings, tmp_path / "t.safetensors", tmp_path / "c.json")
    (found,) = record.calibration_set.sources
    assert found.documents == 1 and len(found.remarks) == 1 and str(tmp_path) not in found.remarks[0]
    assert record.heldout_set.sources[0].remarks == []
    assert f"warning: calibration c: {text}: one document of" in capsys.readouterr().err
