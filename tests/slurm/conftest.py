"""A Slurm for the tests here (tests/slurm/cluster.py)."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "workflow"))  # what runs whole builds

import cluster as slurm  # noqa: E402


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    """A Slurm of one node, of this session's own."""
    with slurm.started() as found:
        yield found
