"""Snakemake beside a stand-in for Kubernetes' API: it writes down each job, and runs its command here as its pod would.

    python kubernetes_stand_in.py BODIES FIRST_TO_FAIL ARGUMENTS...

BODIES: a directory for the jobs as JSON, in order. FIRST_TO_FAIL: the first job whose command has this word ends as one
that was killed for its memory does, and its command is not run. There is no cluster: what Kubernetes itself would say
of a job is not known from this.
"""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import kubernetes
from snakemake.cli import main

KILLED = 137


class Api:
    """Both of the plugin's APIs."""

    bodies = Path()
    first_to_fail = ""
    exits: dict[str, int] = {}

    def create_namespaced_secret(self, namespace, body):
        """Variables that jobs need; there are none."""

    def delete_namespaced_secret(self, name, namespace, body):
        """The same."""

    def create_namespaced_job(self, namespace, body):
        """Writes the job down and runs it to its end."""
        found = kubernetes.client.ApiClient().sanitize_for_serialization(body) | {"namespace": namespace}
        number = len(Api.exits)
        (Api.bodies / f"{number:03d}.json").write_text(json.dumps(found))
        (container,) = found["spec"]["template"]["spec"]["containers"]
        command = [*container["command"], *container["args"]]
        if Api.first_to_fail in command[-1]:
            Api.first_to_fail, status = "\0", KILLED
        else:
            folder = Api.bodies / f"{number:03d}.workdir"  # where the pod starts: an empty folder of its own
            folder.mkdir()
            status = subprocess.run(command, cwd=folder, check=False).returncode
        Api.exits[found["metadata"]["name"]] = status

    def read_namespaced_job_status(self, name, namespace):
        """Whether it succeeded."""
        failed = Api.exits[name] != 0
        return SimpleNamespace(status=SimpleNamespace(failed=int(failed), succeeded=int(not failed)))

    def list_namespaced_pod(self, namespace, label_selector):
        """The job's pod, its container ended."""
        ended = SimpleNamespace(exit_code=Api.exits[label_selector.partition("=")[2]])
        container = SimpleNamespace(name="snakemake", state=SimpleNamespace(terminated=ended))
        return SimpleNamespace(
            items=[
                SimpleNamespace(
                    metadata=SimpleNamespace(name="pod"), status=SimpleNamespace(container_statuses=[container])
                )
            ]
        )

    def read_namespaced_pod_log(self, name, namespace, container, previous):
        """What the container printed."""
        return ""

    def delete_namespaced_pod(self, name, namespace, body):
        """Nothing is left of it."""

    def delete_namespaced_job(self, name, namespace, propagation_policy, body):
        """The same."""


if __name__ == "__main__":
    Api.bodies, Api.first_to_fail = Path(sys.argv[1]), sys.argv[2]
    kubernetes.config.load_kube_config = lambda: None
    kubernetes.client.CoreV1Api = kubernetes.client.BatchV1Api = Api
    main(sys.argv[3:])
