"""Blocks tuned on the source's hidden states, which go when they were read, and chains of a few blocks."""

import re
from pathlib import Path

import pytest
from building import Build, lay_out

BLOCKS = 3
RELEASES = {"apart": {"inputs": "reference"}, "pieces": {"segment": 2}}
TARGETS = [f"results/{name}/pack.json" for name in RELEASES]


def two_ways(directory: Path, keep: bool) -> Build:
    """A dense model of three blocks and a release for each way to tune it, nothing of them built."""
    build = lay_out(directory, ("ll",))
    of_release = {"model": "ll", "scheme": "W3A16", "calibration": "small", "deploy": {"load_test_blocks": 0}}
    releases = {
        name: of_release | {"tuning": {"iters": 2, "batch_size": 4, **inputs}} for name, inputs in RELEASES.items()
    }
    build.configure(lambda data: data.update(releases=releases, build=list(releases), keep_hidden_states=keep))
    return build


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> tuple[Build, str]:
    """Both releases packed, one job at a time, and what the build said."""
    build = two_ways(tmp_path_factory.mktemp("apart"), keep=False)
    done = build.run("--cores", "1", *TARGETS)
    return build, done.stdout + done.stderr


def states(build: Build) -> set[str]:
    """The files of hidden states that are there, those of held-out tokens left out."""
    folders = build.directory / "results/reference/ll/small", *build.directory.glob("results/*/chain")
    return {path.name for folder in folders for path in folder.glob("*.safetensors") if "heldout" not in path.name}


def test_the_chain_waits_for_the_tuners(built):
    """Or all its hidden states would be on the disk at a time."""
    lines = built[1].splitlines()

    def at(pattern: str) -> int:
        return next(number for number, line in enumerate(lines) if re.search(pattern, line))

    for block in range(BLOCKS - 1):
        tuned = [at(rf" {name} block {block} \(of 3\): loss .* -> ") for name in RELEASES]
        assert at(rf" ll reference block {block}: ") < min(tuned)
        assert max(tuned) < at(rf" ll reference block {block + 1}: ")


def test_hidden_states_are_gone_when_they_were_read_and_nothing_is_made_again(built):
    build, _ = built
    assert states(build) == set()
    heldout = {path.name for path in build.directory.glob("results/reference/ll/small/heldout_*")}
    assert heldout == {f"heldout_{name}.safetensors" for name in ("embedded", "hidden_0", "hidden_1", "hidden_2")}
    assert build.planned(*TARGETS) == {}


def test_a_block_that_is_made_again_needs_the_chain_and_no_other_block(built):
    build, _ = built
    block = build.directory / "results/apart/blocks/1.safetensors"
    content = block.read_bytes()
    block.unlink()
    assert build.planned("results/apart/blocks/1.safetensors") == {"embed": 1, "reference": 2, "quantize_apart": 1}
    build.run("results/apart/blocks/1.safetensors")
    assert block.read_bytes() == content


def test_kept_hidden_states_change_no_byte_and_a_piece_begins_on_the_source(built, tmp_path):
    build = two_ways(tmp_path, keep=True)
    targets = [f"results/{name}/blocks/2.safetensors" for name in RELEASES]
    jobs = build.planned(*targets)
    assert jobs["reference"] == BLOCKS and (jobs["quantize"], jobs["quantize_apart"]) == (1, 1), "no block before it"
    build.run(*targets)
    for target in targets:
        assert (tmp_path / target).read_bytes() == (built[0].directory / target).read_bytes()
    assert states(build) == {"embedded.safetensors", *[f"hidden_{block}.safetensors" for block in range(BLOCKS)]} | {
        "2.safetensors"
    }
