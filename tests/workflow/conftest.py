"""The whole small build that the workflow tests share."""

import pytest
from building import Build, lay_out, write_keys


@pytest.fixture(scope="session")
def built(tmp_path_factory) -> Build:
    """Four releases of three tiny models (MoE with and without a dense block, and a dense one), with their card.

    They are signed by key.pem, which goes with public.pem; their task passes for a benchmark of the hub.
    """
    build = lay_out(tmp_path_factory.mktemp("built"))
    write_keys(build.directory)

    def publish(data):
        data["publish"] = {"signing_key": "key.pem"}
        data["benchmarks"]["tiny"]["hub"] = {
            "tiny": {"dataset": "tests/tiny", "task": "default", "metric": "exact_match"}
        }

    build.configure(publish)
    build.run("model_card.md")
    return build
