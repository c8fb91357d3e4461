"""The whole small build that the workflow tests share."""

import pytest
from building import Build, lay_out


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Build:
    """Four releases of three tiny models (MoE with and without a dense block, and a dense one), with their card."""
    build = lay_out(tmp_path_factory.mktemp("built"))
    build.run("model_card.md")
    return build
