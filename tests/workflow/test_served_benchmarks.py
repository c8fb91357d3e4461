"""Benchmarks of the served model in a build: asked once, judged again at no cost, refused without a sandbox."""

import json

import pytest
from building import lay_out

BENCHMARK = {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}
RECORD = "results/ll-nvfp4/served_benchmarks/questions.json"


@pytest.fixture(scope="module")
def asked(tmp_path_factory):
    """A build of one release up to its served benchmark; (build, output)."""
    build = lay_out(tmp_path_factory.mktemp("served"), ("ll",), iters=0)
    questions = {"task": "tiny", "limit": 3, "expected": [0.9, 1.0]}
    build.configure(lambda data: data["benchmarks"].update(tiny=BENCHMARK | {"served": {"questions": questions}}))
    build.configure(lambda data: data["releases"]["ll-nvfp4"]["deploy"].update(load_test_blocks=0))
    done = build.run(RECORD)
    return build, done.stdout + done.stderr


def test_a_release_is_asked_after_its_smoke_test_and_held_against_its_source(asked):
    build, output = asked
    record = json.loads((build.directory / RECORD).read_text())
    assert (build.directory / "results/ll-nvfp4/deploy.json").exists()
    assert record["measured"]["subject"] == "ll-nvfp4" and record["measured"]["weights"] == "decoded to BF16"
    assert record["source_model"] == "ll" and record["source_kind"] == "measured"
    assert record["unpaired_because"] is None and record["paired"][record["metric"]]["rows"] == 3
    assert record["verdict"] == "below"
    assert f"warning: ll-nvfp4: questions: {record['metric']} 0.0000 is below the expected range, 0.9 to 1" in output
    left = [path.name for path in (build.directory / RECORD).parent.iterdir()]
    assert sorted(left) == ["questions.json", "questions.measured.json", "questions.samples.jsonl"]


def test_what_scores_are_held_against_is_changed_without_asking_again(asked):
    build, _ = asked

    def change(**keys):
        return lambda data: data["benchmarks"]["tiny"]["served"]["questions"].update(keys)

    assert build.planned(RECORD) == {}
    build.configure(change(expected=[0.0, 0.5]))
    assert build.planned(RECORD) == {"served_benchmark": 1}
    build.configure(change(source=None))
    assert build.planned(RECORD) == {"served_benchmark": 1}
    build.configure(change(expected=[0.9, 1.0], source="measured", limit=2))
    assert build.planned(RECORD) == {"measure_served": 1, "measure_served_source": 1, "served_benchmark": 1}
    build.configure(change(limit=3))


def test_programs_of_a_model_need_a_sandbox_before_anything_runs(asked, monkeypatch):
    build, _ = asked
    monkeypatch.setenv("DOCKER_HOST", f"unix://{build.directory}/no.sock")
    build.configure(lambda data: data["benchmarks"]["tiny"]["served"].update(humaneval={}))
    build.configure(lambda data: data.update(sandbox={"backend": "docker"}))
    target = "results/ll-nvfp4/served_benchmarks/humaneval.json"
    done = build.run(target, check=False)
    assert done.returncode != 0 and "error: docker: " in done.stderr
    planned = build.run(target, "-n")
    assert "warning: docker: " in planned.stderr
