"""A job's inputs are what was checked: by the places of files and records, not by names that others may have too."""

from pathlib import Path

import pytest

from requant.errors import RequantError
from requant.hashing import file_entry
from requant.intact import check_inputs
from requant.records import CheckedFile, write_json


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """Writes files of a model in a folder of any name, and the records of their check: (inputs, the folder)."""
    monkeypatch.chdir(tmp_path)

    def write(folder: str, *names: str) -> tuple[list[str], str]:
        inputs = []
        for name in names:
            path, record = Path(folder, name), f"results/source/m/files/{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"of the model: {name}")
            write_json(record, CheckedFile(**file_entry(path).model_dump(), seconds=0.0))
            inputs += [str(path), record]
        return inputs, folder

    return write


@pytest.mark.parametrize(
    "folder", ["files", "source/x/files", "./models/files/", "{x}/[a]*", "results/source/m/checkpoint"]
)
def test_a_model_in_a_folder_of_any_name_is_held_against_its_records(recorded, folder):
    inputs, source = recorded(folder, "config.json", "tokenizer.json")
    check_inputs(inputs, source)
    Path(folder, "config.json").write_text("another")
    with pytest.raises(RequantError, match=r"config\.json: sha256 .*when it was checked"):
        check_inputs(inputs, source)


def test_files_that_are_called_as_one_of_the_model_or_as_a_record_are_let_be(recorded):
    """Texts and tasks have the names that their owner gave them."""
    inputs, source = recorded("models/m", "config.json")
    own = ["text/config.json", "source/x/files/config.json", "files/config.json.json", "tasks/pack.json", "source.json"]
    for path in own:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text("of mine")
    check_inputs([*own, *inputs], source)
    check_inputs([*inputs, *own], str(Path(source).absolute()))
    check_inputs([*inputs, *own])


def test_the_record_of_a_whole_source_stands_for_those_of_its_files(recorded):
    inputs, source = recorded("files", "config.json", "tokenizer.json")
    Path("results/source/m/source.json").write_text("{}")
    whole = [*inputs[::2], "results/source/m/source.json"]
    check_inputs(whole, source)
    Path("files/tokenizer.json").write_text("another")
    with pytest.raises(RequantError, match=r"files/tokenizer\.json: sha256"):
        check_inputs(whole, source)
