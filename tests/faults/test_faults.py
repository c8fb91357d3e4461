"""The faults of `python -m tests.faults`, in short."""

import random

import pytest
from building import Build

from . import bits, clocks, disks, kills
from .scene import PACKED, copied, digests, emptied, undisturbed

pytestmark = pytest.mark.workflow


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """A pruned and quantized release of two blocks, packed."""
    return undisturbed(tmp_path_factory.mktemp("faults") / "undisturbed", PACKED)


def there(build: Build, victim: bits.Victim) -> bool:
    return any(build.directory.glob(victim.path))


@pytest.mark.parametrize("harm", [bits.flip_a_bit, bits.cut_short])
def test_whoever_reads_a_harmed_file_names_it(build, tmp_path, harm):
    copy, draw = copied(build, tmp_path / "copy"), random.Random(1)
    victims = [victim for victim in bits.VICTIMS if there(copy, victim)]
    assert {"tokens", "hidden states", "block", "keep list", "lock", "source shard"} <= {v.kind for v in victims}
    for victim in victims:
        counts = bits.harmed_copies(copy, victim, harm, 20, draw)
        assert counts["found"] + counts["harmless"] == 20 and counts["found"] > 10, (victim.kind, counts)


def test_a_build_that_is_killed_twice_ends_in_the_same_bytes(build, tmp_path):
    fresh = emptied(build, tmp_path / "killed")
    outcomes = kills.killed(fresh, PACKED, digests(build), kills=2, longest=12.0)
    assert all(outcome.same_bytes for outcome in outcomes), outcomes


def test_a_full_disk_is_named_and_the_build_goes_on_with_room(build, tmp_path):
    copy = copied(build, tmp_path / "full")
    with disks.small_disk(copy.directory) as mounted:
        fault = disks.full_disk if mounted else disks.limited_files
        outcome = fault(copy, "quantize", digests(build))
    assert outcome.how == "found" and outcome.same_bytes, outcome


def test_a_second_build_is_refused_and_the_first_one_ends_well(build, tmp_path):
    outcome = clocks.second_build(copied(build, tmp_path / "copy"), digests(build))
    assert outcome.how == "found" and outcome.same_bytes, outcome


@pytest.mark.parametrize(
    ("name", "how"), [("results of thirty years ago", "resumed"), ("a source of tomorrow", "found")]
)
def test_a_clock_that_was_set_changes_no_byte(build, tmp_path, name, how):
    outcome = clocks.clock_set(copied(build, tmp_path / "copy"), name, digests(build))
    assert outcome.how == how and outcome.same_bytes, outcome
