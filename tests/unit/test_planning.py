"""What the config names and is not there is said by its path and key, before anything runs."""

import json
from pathlib import Path

import pytest

from requant.config import Calibration
from requant.errors import RequantError
from requant.planning import (
    check_chat_template,
    check_locked_source,
    check_path,
    check_source_names,
    file_rates,
    model_to_lock,
    text_files,
)


def settings(sources, heldout=None) -> dict:
    calibration = {"sources": [{"path": str(path)} for path in sources]}
    if heldout is not None:
        calibration["heldout"] = {"sources": [{"path": str(path)} for path in heldout]}
    return Calibration.model_validate(calibration).model_dump(mode="json")


@pytest.fixture
def texts(tmp_path) -> list[Path]:
    paths = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for path in paths:
        path.write_text("the cat sat")
    return paths


def test_a_missing_text_is_named_with_its_key(texts):
    a, b = texts
    assert text_files("prose", settings([a], [b])) == [str(a), str(b)]
    a.unlink()
    with pytest.raises(RequantError) as raised:
        text_files("prose", settings([b, a]))
    assert str(raised.value) == f"{a}: not there (calibrations.prose.sources[1].path)"
    with pytest.raises(RequantError, match=r"a\.txt: not there \(calibrations\.prose\.heldout\.sources\[0\]\.path\)$"):
        text_files("prose", settings([b], [a]))


def test_a_folder_is_no_text(texts):
    with pytest.raises(RequantError, match="no file; expected one"):
        text_files("prose", settings([texts[0].parent]))


def test_texts_that_the_graph_makes_may_be_absent():
    paths = ["results/demo/calibration/stories.jsonl", "results/demo/test/stories.jsonl"]
    assert text_files("demo", settings(paths[:1], paths[1:])) == paths


TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% break %}{% endfor %}"
GENERATING = "{%- generation %}{{ messages }}{% endgeneration -%}"


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("chat_template.jinja", TEMPLATE),
        ("chat_template.jinja", GENERATING),
        ("chat_template.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", json.dumps({"chat_template": TEMPLATE})),
        ("tokenizer_config.json", json.dumps({"chat_template": [{"name": "default", "template": TEMPLATE}]})),
    ],
)
def test_a_chat_template_is_found_wherever_it_may_be(tmp_path, name, data):
    (tmp_path / name).write_text(data)
    check_chat_template("key", "mine", str(tmp_path), ["config.json", "tokenizer_config.json", name])


def test_a_template_that_has_not_come_yet_is_waited_for(tmp_path):
    check_chat_template("key", "mine", str(tmp_path), ["chat_template.jinja", "tokenizer_config.json"])
    check_chat_template("key", "mine", str(tmp_path / "none"), ["tokenizer_config.json"])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "key: model 'mine' has no chat template"),
        ({"tokenizer_config.json": "{}"}, "key: model 'mine' has no chat template"),
        ({"tokenizer_config.json": '{"chat_template": [{"name": "rag", "template": "x"}]}'}, "has no chat template"),
        (
            {"chat_template.jinja": "a\n{% for m in messages %}"},
            "key: the chat template of model 'mine': line 2: Unexpected",
        ),
        ({"chat_template.jinja": "{{ messages"}, "the chat template of model 'mine': line 1"),
    ],
)
def test_a_model_that_can_not_be_asked_by_chat_is_named(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RequantError) as caught:
        check_chat_template("key", "mine", str(tmp_path), list(files))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_source_that_is_not_where_its_lock_has_it_is_named(tmp_path):
    source = tmp_path / "model"
    with pytest.raises(RequantError) as raised:
        check_locked_source("mine", str(source), "locks/mine.json", ["config.json"])
    assert str(raised.value).startswith(f"{source}: not there (models.mine.path)")
    source.mkdir()
    (source / "config.json").write_text("{}")
    check_locked_source("mine", str(source), "locks/mine.json", ["config.json"])
    with pytest.raises(RequantError) as raised:
        check_locked_source("mine", str(source), "locks/mine.json", ["config.json", "tokenizer.json"])
    assert str(raised.value).startswith(f"{source / 'tokenizer.json'}: not there; locks/mine.json names it")


def test_a_lock_is_of_a_model_of_the_config():
    assert model_to_lock("mine", {"mine": 1, "other": 2}) == "mine"
    assert model_to_lock(7, {"7": 1}) == "7", "the command line is read as YAML"
    with pytest.raises(RequantError, match=r"^lock: no model is named; expected --config model=NAME, one of a, b$"):
        model_to_lock(None, {"b": 1, "a": 2})
    with pytest.raises(
        RequantError, match=r"^--config model=c: not in `models`, or pruned from one; expected one of a, b$"
    ):
        model_to_lock("c", {"b": 1, "a": 2})


def test_rates_of_files_are_gigabytes_a_second():
    assert file_rates({"disk": 2, "hub": 0.1, "model": "m"}) == {"disk": 2e9, "hub": 1e8}
    for value in ("fast", 0, -1.0, True, float("inf")):
        with pytest.raises(RequantError, match=r"^--config shared=\S+: expected GB a second, a number above 0$"):
            file_rates({"shared": value})


@pytest.mark.parametrize("part", ["{x}", "{ x }", "{{x}}", "{x,\\d+}", "{x, a{2}}", "{0}", "<results>", "<a1_b>"])
def test_what_snakemake_replaces_is_refused_with_the_path_and_its_key(part, tmp_path):
    path = f"text/a{part}b.txt"
    with pytest.raises(RequantError) as raised:
        check_path(path, "models.m.path")
    assert str(raised.value).startswith(f"{path}: ") and "in it is a wildcard to Snakemake (models.m.path)" in str(
        raised.value
    )
    (tmp_path / path).parent.mkdir()
    (tmp_path / path).write_text("the cat sat")
    with pytest.raises(RequantError, match=r"\(calibrations\.prose\.sources\[0\]\.path\)"):
        text_files("prose", settings([tmp_path / path]))


@pytest.mark.parametrize(
    "part", ["{}", "{a-b}", "{a b}", "{", "}", "<A>", "< x>", "<a-b>", "[x]", "*", "?", "%s", "$x", "'", " "]
)
def test_what_snakemake_leaves_alone_is_taken(part):
    check_path(f"text/a{part}b.txt", "models.m.path")
    check_source_names("m", f"models/{part}", [f"a{part}.safetensors"])


def test_a_name_that_fits_no_record_or_line_is_refused():
    check_source_names("m", "models/m", ["x" * 188 + ".safetensors"])
    for name, said in (
        ("x" * 189 + ".safetensors", "a name of 201 bytes (models.m); expected 200 or less"),
        ("é" * 95 + ".safetensors", "a name of 202 bytes"),
        ("a\nb.safetensors", "a line break or the like in it (models.m)"),
    ):
        with pytest.raises(RequantError) as raised:
            check_source_names("m", "models/m", [name])
        assert said in str(raised.value) and "\n" not in str(raised.value)
