"""Bad input at the command line: a line, a status other than 0, and a directory that is as it was before."""

import os

import pytest
import yaml
from bad_input import edit_header, edit_json, listing
from building import Build, lay_out

OWN = (".snakemake", "logs")  # Snakemake's own, and the logs of jobs


@pytest.fixture(scope="module")
def laid_out(tmp_path_factory) -> Build:
    return lay_out(tmp_path_factory.mktemp("bad"), ("ll",))


@pytest.fixture
def build(laid_out) -> Build:
    """The directory of all cases; what one has changed is put back."""
    watched = ["mine.yaml", "models/ll/config.json", "models/ll/model.safetensors", "text/b.txt"]
    kept = {name: (laid_out.directory / name).read_bytes() for name in watched}
    yield laid_out
    for name, data in kept.items():
        path = laid_out.directory / name
        path.unlink(missing_ok=True)
        path.write_bytes(data)


def state(build: Build) -> dict[str, str]:
    """All files; Snakemake makes the folders of a job's outputs before it starts."""
    found = listing(build.directory)
    return {path: what for path, what in found.items() if path.split("/")[0] not in OWN and what != "directory"}


def refused(build: Build, *arguments: str) -> str:
    """The one error line of a command that fails and changes nothing."""
    before = state(build)
    done = build.run(*arguments, check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    assert state(build) == before
    return lines[0]


def test_a_shard_that_lies_is_refused_by_a_dry_run(build):
    edit_header(build.directory / "models/ll/model.safetensors", lambda header: header.update({"a\n": 1}))
    assert "error: models/ll/model.safetensors: 'a\\n': expected a tensor's name" in refused(build, "-n")


def test_a_fifo_is_refused_and_not_waited_for(build):
    path = build.directory / "models/ll/config.json"
    path.unlink()
    os.mkfifo(path)
    line = "error: models/ll/config.json: a FIFO found; expected a Hugging Face checkpoint directory"
    assert line in refused(build, "model_card.md")


def test_a_billion_layers_are_refused_by_a_plan_without_counting_them(build):
    edit_json(build.directory / "models/ll/config.json", lambda config: config.update(num_hidden_layers=10**9))
    assert "models/ll: config.json: num_hidden_layers: 1000000000; expected" in refused(build, "plan")


def test_an_absurd_number_of_the_config_is_refused(build):
    data = yaml.safe_load((build.directory / "mine.yaml").read_text())
    data["calibrations"]["small"]["sources"][0]["share"] = float("inf")
    (build.directory / "mine.yaml").write_text(yaml.safe_dump(data))
    line = "error: config: calibrations.small.sources.0.share: inf; expected: a finite number"
    assert refused(build, "-n") == line


def test_a_lock_of_another_format_is_refused(build):
    locks = build.directory / "locks"
    locks.mkdir()
    (locks / "ll.json").write_text('{"model": "ll", "files": {"../x": 1}}')
    assert "error: locks/ll.json: revision: Field required; expected a Lock" in refused(build, "-n")
    (locks / "ll.json").unlink()
    locks.rmdir()


def test_a_broken_text_is_refused_by_a_plan(build):
    (build.directory / "text/b.txt").write_bytes(b"the cat \xff sat")
    line = refused(build, "results/calibration/ll/small/tokens.safetensors")
    assert line.startswith("error: text/b.txt: not UTF-8 at byte 8; expected UTF-8 text")
    assert line.endswith("(calibrations.small.sources[1].path)")
