"""Files beside the weights go along with a release by their names: licences, templates and vocabularies, never code."""

import os
from pathlib import Path

import pytest
import tiny
from bad_input import edit_json, refused

from requant.carried import TOKENIZER_FILES, carried, carried_in, is_carried, is_source_name
from requant.checkpoint import INDEX, Checkpoint
from requant.errors import RequantError
from requant.intact import check_inputs
from requant.locks import check_lock, checked_file, load_lock, make_lock, source_record, tensors_of
from requant.preflight import check_files
from requant.records import write_json
from requant.reproduce import checkout
from requant.served_copy import mirror

TEMPLATE = "additional_chat_templates/tool_use.jinja"


@pytest.mark.parametrize(
    "name",
    ["LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "License.rst", "COPYING", "COPYING.md", "MODEL_LICENSE"]
    + ["LICENSE-MODEL", "LICENSE-CODE", "LICENSE-APACHE-2.0", "LICENSE.MIT", "Llama-3.2-LICENSE.txt", "NOTICE"]
    + ["NOTICE.txt", "THIRD_PARTY_NOTICES.md", "Notice", "USE_POLICY.md", "ACCEPTABLE_USE_POLICY.md", "COPYRIGHT"]
    + ["chat_template.json", "chat_template.jinja", TEMPLATE, "additional_chat_templates/rag.jinja"]
    + ["preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json", *TOKENIZER_FILES],
)
def test_it_goes_along(name):
    assert is_carried(name) and is_source_name(name) and carried([name, "config.json"]) == [name]


@pytest.mark.parametrize(
    "name",
    ["README.md", "config.json", INDEX, "model.safetensors", "consolidated.safetensors", "pytorch_model.bin"]
    + ["modeling_x.py", "configuration_x.py", "tokenization_kimi.py", "tool_parser.py", "license.py", "LICENSE.PY"]
    + ["license_plates.onnx", "licensing.json", "notebook.ipynb", "unnoticed.txt", "params.json", "figures/LICENSE"]
    + ["additional_chat_templates/x.py", "additional_chat_templates/a/x.jinja", "additional_chat_templates/..jinja/x"],
)
def test_it_stays_behind(name):
    assert not is_carried(name)


@pytest.mark.parametrize(
    "name",
    ["../LICENSE", "additional_chat_templates/../x.jinja", "additional_chat_templates/..", "/x.jinja", "a/x.jinja", 7]
    + ["additional_chat_templates/", "additional_chat_templates//x.jinja", "additional_chat_templates/a/x.jinja", ""]
    + [
        "additional_chat_templates/.\0.jinja",
        "../additional_chat_templates/x.jinja",
        "..",
        "additional_chat_templates",
    ],
)
def test_no_path_leads_out_of_a_source(name, tmp_path):
    if name == "additional_chat_templates":
        assert is_source_name(name) and not is_carried(name), "a file of that name is one of many"
        return
    assert not is_source_name(name)
    source = tiny.write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    lock = make_lock("m", source)
    if isinstance(name, str):
        lock.files[name] = lock.files["config.json"]
        with pytest.raises(RequantError, match="expected a file name without a path"):
            check_lock("locks/m.json", lock)


@pytest.fixture
def source(tmp_path):
    tensors_of.cache_clear()
    source = tiny.write_checkpoint(tmp_path / "m", "llama", num_hidden_layers=1)
    tiny.add_beside(source)
    return source


def test_a_directory_is_locked_checked_and_described_with_them(source, tmp_path):
    lock = make_lock("m", source)
    assert tiny.BESIDE.keys() <= lock.files.keys() and lock.left_behind == ["README.md", "figures/", "tool_parser.py"]
    checked = {name: checked_file(source, name, lock) for name in lock.files}
    record = source_record("m", source, lock, checked)
    assert record.files_left_behind == lock.left_behind and tiny.BESIDE.keys() <= record.files.keys()
    write_json(tmp_path / "m.json", lock)
    assert load_lock(tmp_path / "m.json") == lock
    (source / TEMPLATE).write_text("other")
    with pytest.raises(RequantError, match=r"additional_chat_templates/tool_use.jinja: \d+ bytes found; the lock of m"):
        checked_file(source, TEMPLATE, lock)


def test_a_lock_of_before_names_what_its_releases_do_not_have(source):
    lock = make_lock("m", source)
    del lock.files["LICENSE"], lock.files[TEMPLATE]
    record = source_record("m", source, lock.model_copy(update={"left_behind": []}), {})
    assert record.files_left_behind == ["LICENSE", "README.md", TEMPLATE, "figures/", "tool_parser.py"]


def test_the_lock_of_the_embedded_model_is_still_that_of_its_files():
    lock = load_lock(checkout() / "locks/demo-moe.json")
    assert make_lock("demo-moe", checkout() / "demo/model").files == lock.files


def test_a_template_that_changed_since_its_check_is_found_by_the_job_that_reads_it(source, tmp_path, monkeypatch):
    """Two files of one name, in the folder and beside it, each against its own record."""
    monkeypatch.chdir(tmp_path)
    (source / "additional_chat_templates/chat_template.jinja").write_text("in the folder")
    (source / "chat_template.jinja").write_text("beside it")
    names = ["chat_template.jinja", "additional_chat_templates/chat_template.jinja"]
    folder = Path("results/source/m/files")
    for name in names:
        write_json(folder / f"{name}.json", checked_file(source, name, None))
    inputs = [str(source / name) for name in names]
    records = [str(folder / f"{name}.json") for name in names]
    check_inputs(inputs + records, str(source))
    check_inputs([*inputs, "results/source/m/source.json"], str(source))
    for name, other in (names, reversed(names)):
        text = (source / name).read_text()
        (source / name).write_text((source / other).read_text())
        with pytest.raises(RequantError, match=f"^{source.name}/{name}: sha256"):
            check_inputs(inputs + records, str(source))
        (source / name).write_text(text)


def test_what_is_served_has_them_and_weights_as_links(source, tmp_path):
    mirror(source, Checkpoint(source).files, tmp_path / "served")
    assert (tmp_path / "served" / TEMPLATE).read_text() == tiny.BESIDE[TEMPLATE]
    assert all(path.is_symlink() for path in (tmp_path / "served").glob("*.safetensors"))


# Bad files


def test_a_folder_of_templates_that_leads_elsewhere_is_refused(source, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/x.jinja").write_text("secret")
    for path in sorted((source / "additional_chat_templates").iterdir()):
        path.unlink()
    (source / "additional_chat_templates").rmdir()
    (source / "additional_chat_templates").symlink_to(tmp_path / "elsewhere")
    with refused(tmp_path, f"{source}/additional_chat_templates: a link found; expected a folder of chat templates"):
        check_files(Checkpoint(source))


def test_files_that_are_none_are_told_when_it_is_planned(source, tmp_path):
    (source / "LICENSE").unlink()
    os.mkfifo(source / "LICENSE")
    with refused(tmp_path, f"{source}/LICENSE: no file; expected one"):
        check_files(Checkpoint(source))


def test_a_folder_called_as_a_licence_stays_behind(source):
    (source / "LICENSE").unlink()
    (source / "LICENSE").mkdir()
    assert "LICENSE" not in carried_in(source) and "LICENSE/" in Checkpoint(source).left_behind()
    check_files(Checkpoint(source))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json", "preprocessor_config.json"])
@pytest.mark.parametrize("text", ["", "[]", "{,}", '{"a": NaN}'])
def test_json_that_is_none_is_told_when_it_is_planned(source, tmp_path, name, text):
    (source / name).write_text(text)
    with refused(tmp_path, f"{source}/{name}: "):
        check_files(Checkpoint(source))


def test_a_file_of_the_hubs_cache_is_a_link_and_goes_along(source, tmp_path):
    (source / "LICENSE").rename(tmp_path / "blob")
    (source / "LICENSE").symlink_to(tmp_path / "blob")
    assert "LICENSE" in make_lock("m", source).files
    edit_json(source / "generation_config.json", lambda found: found.update(do_sample=False, temperature=0.6))
    check_files(Checkpoint(source))
