"""The jobs that a build makes of Kubernetes, as data; their commands run here, as their containers would run them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from building import ROOT, Build, environment, lay_out, with_plugins

PROFILE = ROOT / "profiles/kubernetes"
STAND_IN = Path(__file__).parent / "kubernetes_stand_in.py"
RECORD = "results/source/ll/source.json"


@pytest.fixture(scope="module")
def build(tmp_path_factory) -> Build:
    """A working directory, in the place of a volume that is mounted at the directory above."""
    return lay_out(tmp_path_factory.mktemp("volume") / "build", ("ll",))


@pytest.fixture(scope="module")
def bodies(build) -> list[dict]:
    """The jobs of a source's check, the first attempt at its last one killed."""
    folder = build.directory.parent / "bodies"
    folder.mkdir()
    inherited = with_plugins(environment())
    path = ":".join(filter(None, [str(PROFILE), inherited.get("PYTHONPATH", "")]))
    options = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml", "--workflow-profile", "kubernetes"]
    volume = ["--kubernetes-volume-persistent-volumes", f"models:{build.directory.parent}"]
    quick = ["--seconds-between-status-checks", "1", "--set-resources", "source:gpu=2"]
    done = subprocess.run(
        [
            sys.executable,
            str(STAND_IN),
            str(folder),
            "--allowed-rules source ",
            *options,
            *volume,
            *quick,
            "--",
            RECORD,
        ],
        cwd=build.directory,
        env=inherited | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def container_of(body: dict) -> dict:
    (container,) = body["spec"]["template"]["spec"]["containers"]
    return container


def test_a_job_runs_in_the_builds_directory_on_the_volume(build, bodies):
    for body in bodies:
        pod, container = body["spec"]["template"]["spec"], container_of(body)
        mounted = {"name": "models", "mountPath": str(build.directory.parent)}
        assert mounted in container["volumeMounts"]
        assert {"name": "models", "persistentVolumeClaim": {"claimName": "models"}} in pod["volumes"]
        assert (container["image"], body["namespace"]) == ("requant:latest", "default")
        assert container["command"] == ["/bin/sh"]
        (_, command) = container["args"]
        assert command.startswith(f"cd {build.directory} && {sys.executable} -m snakemake --snakefile")
        assert "--default-storage" not in command and "--deploy-sources" not in command and "pip" not in command
    record = json.loads((build.directory / RECORD).read_text())
    assert len(record["files"]) > 3, "the commands, run as they stand, made what they are for"


def test_requests_are_limits_and_a_killed_job_gets_more_memory(bodies):
    files, killed, again = (container_of(body)["resources"] for body in bodies)
    for asked in (files, killed, again):
        requests, limits = asked["requests"], asked["limits"]
        assert requests["memory"] == limits["memory"]
    assert killed["limits"]["ephemeral-storage"] == "10000M"
    assert (killed["limits"]["cpu"], killed["requests"]["cpu"]) == ("1000m", "950m")
    megabytes = [int(asked["limits"]["memory"].removesuffix("M")) for asked in (killed, again)]
    assert megabytes[1] == pytest.approx(1.5 * megabytes[0], abs=1)
    assert int(files["limits"]["memory"].removesuffix("M")) > megabytes[0], "a group of files has the memory of several"


def test_gpus_have_the_name_of_their_maker(bodies):
    files, *gpu_jobs = bodies
    assert "nvidia.com/gpu" not in container_of(files)["resources"]["limits"]
    for body in gpu_jobs:
        assert container_of(body)["resources"]["limits"]["nvidia.com/gpu"] == "2"
        (toleration,) = body["spec"]["template"]["spec"]["tolerations"]
        assert (toleration["key"], toleration["effect"]) == ("nvidia.com/gpu", "NoSchedule")


def test_the_plugin_alone_shares_no_file_system(build):
    """Why the profile has an executor of its own."""
    options = ["--snakefile", str(ROOT / "Snakefile"), "--configfile", "mine.yaml", "--workflow-profile", "none"]
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", *options, "--executor", "kubernetes", "--jobs", "1", "--", RECORD],
        cwd=build.directory,
        env=with_plugins(environment()),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode != 0 and "default storage provider" in done.stdout + done.stderr


def test_the_profile_says_all_that_the_default_says():
    """It is read in the place of the default profile, whose keys it changes only where it has a reason to."""
    default, slurm, own = (
        yaml.safe_load((ROOT / f"profiles/{name}/profile.yaml").read_text())
        for name in ("default", "slurm", "kubernetes")
    )
    for profile in (slurm, own):
        assert {key: profile[key] for key in default if key != "resources"} == {
            key: value for key, value in default.items() if key != "resources"
        }
        assert "gpu" not in profile["resources"], "the scheduler has the limit"
    assert slurm["groups"] == own["groups"] and slurm["group-components"] == own["group-components"]
