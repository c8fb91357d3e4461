"""What `snakemake -n` says of a config that can't be built: one line, and also where outputs are there already."""

import pytest
from building import Build, lay_out


@pytest.fixture
def build(tmp_path) -> Build:
    return lay_out(tmp_path, ("ll",))


def error_of(build: Build, *arguments: str) -> str:
    """The one line of ours that stops a dry run; without frames of a Snakefile."""
    done = build.run(*arguments, "-n", check=False)
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    assert "common.smk" not in done.stderr and "WorkflowError" not in done.stderr and "Traceback" not in done.stderr
    return lines[0]


def test_a_missing_text_is_noticed_though_its_tokens_are_there(build):
    folder = build.directory / "results/calibration/ll/small"
    folder.mkdir(parents=True)
    for name in ("tokens.safetensors", "calibration.json"):
        (folder / name).touch()
    (build.directory / "text/b.txt").unlink()
    assert (
        error_of(build, "results/reference/ll/small/embedded.safetensors")
        == "error: text/b.txt: not there (calibrations.small.sources[1].path)"
    )


def test_a_wrong_path_is_noticed_with_and_without_a_lock(build):
    build.run("lock", "--config", "model=ll")
    tokenizer = build.directory / "models/ll/tokenizer.json"
    tokenizer.rename(build.directory / "elsewhere")
    assert "models/ll/tokenizer.json: not there; locks/ll.json names it" in error_of(build)
    build.run("lock", "--config", "model=ll", "-n")
    build.configure(lambda data: data["models"]["ll"].update(path="nowhere"))
    assert "nowhere: not there (models.ll.path)" in error_of(build)
    (build.directory / "locks/ll.json").unlink()
    assert "nowhere/config.json: not there" in error_of(build)


def test_every_problem_of_a_config_is_a_line(build):
    build.configure(lambda data: data.update(biuld=[]))
    assert error_of(build).startswith("error: config: biuld: unknown key")
    build.configure(lambda data: data["releases"]["ll-nvfp4"].update(scheme="INT5"))
    done = build.run("-n", check=False)
    assert [line[:20] for line in done.stderr.splitlines() if "error" in line] == [
        "error: config: relea",
        "error: config: biuld",
    ]


def test_a_lock_without_a_model_of_the_config_is_refused_when_planned(build):
    assert (
        error_of(build, "lock") == "error: lock: no model is named; expected --config model=NAME, one of demo-moe, ll"
    )
    assert error_of(build, "lock", "--config", "model=zz").startswith("error: --config model=zz: not in `models`")
