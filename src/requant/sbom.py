"""sbom.cdx.json: what is installed where a release was made, as a CycloneDX bill of materials.

cyclonedx-bom lists it from the packages' own metadata. Links are left out: some lead to folders of this machine, and
none says more than name and version.
"""

import json
import os
import subprocess
import sys
from typing import Any

from requant.errors import RequantError

COMMAND = ("cyclonedx_py", "environment", "--output-reproducible", "--short-PURLs", "--no-validate")
SPECIFICATION = "1.6"


def bill_of_materials() -> str:
    """CycloneDX JSON of the environment of this Python: the same bytes for the same packages, in any folder."""
    command = [sys.executable, "-m", *COMMAND, "--spec-version", SPECIFICATION, "--output-file", "-", sys.executable]
    # With a date of its own choice in the environment, it would be written down.
    environment = {name: value for name, value in os.environ.items() if name != "SOURCE_DATE_EPOCH"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RequantError(f"cyclonedx-py: {done.stderr.strip().splitlines()[-1:]}; expected a bill of materials")
    return json.dumps(_without_links(json.loads(done.stdout)), indent=1, sort_keys=True) + "\n"


def _without_links(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_links(inner) for key, inner in value.items() if key != "externalReferences"}
    return [_without_links(inner) for inner in value] if isinstance(value, list) else value
