"""What the config names and is not there is said by its path and key, before anything runs."""

from pathlib import Path

import pytest

from requant.config import Calibration
from requant.errors import RequantError
from requant.planning import check_locked_source, file_rates, model_to_lock, text_files


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
