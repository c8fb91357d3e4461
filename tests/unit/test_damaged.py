"""A served checkpoint that is damaged fails the smoke test each time, by the checks that should see it.

The damage is done to what the engine gets; requant has the true release and its evaluation. The engine is the real
one. benchmarks/smoke_test.py has the figures of every expert, and of many pairs.
"""

import contextlib
from pathlib import Path

import damage
import pytest
from demo_release import DEMO, DemoRelease, heldout, make_release

from requant import deploy, smoke, vocabulary
from requant.config import Deploy, Target, Throughput
from requant.errors import RequantError
from requant.records import DeployRecord, FailedDeployRecord, read_json
from requant.safetensors_io import save

SETTINGS = Deploy(
    prompts=2,
    prompt_tokens=24,
    max_tokens=8,
    reference_tokens=1024,
    vocabulary_tokens=256,
    long_prompt_tokens=128,
    throughput=Throughput(concurrency=[1], max_tokens=2, repeats=1, warmup=0),
)


@pytest.fixture(scope="module", params=["NVFP4", "W3A16"])
def release(request, tmp_path_factory) -> DemoRelease:
    """NVFP4 is served decoded to BF16, W3A16 as it is packed."""
    return make_release(request.param, tmp_path_factory.mktemp(request.param))


def run(release: DemoRelease, folder: Path) -> DeployRecord:
    made = release.folder
    records = (made / "pack.json", made / "evaluate.json", made / "tokens.safetensors")
    outputs = (folder / "served", folder / "log", 1, folder / "deploy.json", folder / "throughput.json")
    return deploy.smoke_test("demo", DEMO / "model", made / "model", *records, SETTINGS, Target(), *outputs)


@pytest.fixture
def served_damaged(monkeypatch):
    """Does a damage to what is served, right before the engine starts."""
    serve_at = deploy.serve_at

    def install(done: damage.Damage) -> None:
        @contextlib.contextmanager
        def serve(target, model, log, threads, linked=()):
            done(model)
            with serve_at(target, model, log, threads, linked=linked) as server:
                yield server

        monkeypatch.setattr(deploy, "serve_at", serve)

    return install


def test_the_healthy_checkpoint_passes(release, tmp_path):
    record = run(release, tmp_path)
    assert {check.name: check.verdict for check in record.checks} == dict.fromkeys(smoke.ALL, "passed")
    assert (tmp_path / "throughput.json").exists() and not (tmp_path / "deploy.failed.json").exists()
    assert (record.why_decoded is None) == (release.scheme == "W3A16")


def fails(release: DemoRelease, folder: Path) -> FailedDeployRecord:
    """The record of a run that has to fail, in one line that names what failed."""
    with pytest.raises(RequantError) as raised:
        run(release, folder)
    record, line = read_json(folder / "deploy.failed.json", FailedDeployRecord), str(raised.value)
    assert [check.name for check in record.checks] == list(smoke.ALL), "all checks run"
    for check in record.checks:
        assert (f"{check.name}: {check.found}, expected {check.expected}" in line) == (check.verdict == "failed")
    assert "\n" not in line and "deploy.failed.json" in line
    assert not (folder / "deploy.json").exists() and not (folder / "throughput.json").exists()
    return record


def failed(record: FailedDeployRecord) -> set[str]:
    return {check.name for check in record.checks if check.verdict == "failed"}


def test_one_doubled_scale_fails(release, tmp_path, served_damaged):
    served_damaged(damage.double_scale(release.packed, "model.layers.3.mlp.experts.5.down_proj"))
    record = fails(release, tmp_path)
    assert smoke.LOG_PROBABILITIES in failed(record)
    found = next(check.found for check in record.checks if check.name == smoke.LOG_PROBABILITIES)
    assert "tokens of expert 5 of block 3" in found


def test_two_swapped_experts_fail(release, tmp_path, served_damaged):
    served_damaged(damage.swap_experts(4, 2, 11))
    assert smoke.LOG_PROBABILITIES in failed(fails(release, tmp_path))


@pytest.mark.parametrize("release", ["NVFP4"], indirect=True)
def test_two_exchanged_tokens_fail(release, tmp_path, served_damaged):
    """Two that are not in the reference text, so that the vocabulary has to be shown for it."""
    tokenizer = release.packed.tokenizer()
    shown = vocabulary.sample(tokenizer, SETTINGS.vocabulary_tokens)
    text = set(heldout(16).flatten().tolist())
    a, b = [token for token in shown if token not in text][:2]
    served_damaged(damage.swap_tokens(a, b))
    assert failed(fails(release, tmp_path)) == {smoke.TOKENIZER}


def test_a_packed_file_that_was_damaged_itself_is_not_served(release, tmp_path):
    copied = tmp_path / "release"
    model = copied / "model"
    model.mkdir(parents=True)
    for path in (release.folder / "model").iterdir():
        (model / path.name).symlink_to(path)
    for name in ("pack.json", "evaluate.json", "tokens.safetensors"):
        (copied / name).symlink_to(release.folder / name)
    damage.edit(model, lambda tensors: tensors["model.norm.weight"].mul_(2))
    with pytest.raises(RequantError, match=r"model-0000\d-of-00003\.safetensors: sha256 .* as packed"):
        run(DemoRelease(copied, release.scheme), tmp_path)


def test_another_held_out_text_than_the_evaluations_is_named(release, tmp_path):
    other = DemoRelease(tmp_path, release.scheme)
    for name in ("model", "pack.json", "evaluate.json"):
        (tmp_path / name).symlink_to(release.folder / name)
    tokens = heldout(16).flip(0).contiguous()
    save(tmp_path / "tokens.safetensors", {"heldout": tokens, "heldout_mask": tokens.new_ones(tokens.shape).byte()})
    with pytest.raises(RequantError, match=r"evaluate\.json: reference_text: not the beginning of the held-out tokens"):
        run(other, tmp_path)
