"""Serving in a container of a real Docker engine: what is asked of it, what is served, and that nothing stays."""

from docker_engine import host_environment, host_mounts


def test_the_image_runs_this_environment(docker_host, host_image):
    said = docker_host.client.containers.run(
        host_image,
        ["python", "-c", "import os, torch; print(torch.__version__, os.getuid())"],
        volumes={mount["source"]: {"bind": mount["target"], "mode": "ro"} for mount in host_mounts()},
        environment=host_environment(),
        network_mode="none",
        user="65534",
        remove=True,
        mem_limit=10**9,
    )
    assert said.split()[1] == b"65534"
