"""Which Docker engine is asked: this machine's alone."""

import os
from urllib.parse import urlsplit

from requant.errors import RequantError, brief

COMPUTES = False  # who is asked, not what is computed

SOCKET = "unix:///var/run/docker.sock"  # where Docker listens unless DOCKER_HOST says otherwise
LOOPBACKS = ("127.0.0.1", "::1", "localhost")


def docker_host() -> str:
    """The address of the Docker engine, DOCKER_HOST if that is set. RequantError if it may be of another machine."""
    url = os.environ.get("DOCKER_HOST") or SOCKET
    if not _is_local(url):
        raise RequantError(
            f"DOCKER_HOST: {brief(url)}: a Docker engine of another machine sees neither the files nor the loopback of "
            "this one; expected unix:///PATH"
        )
    return url


def _is_local(url: str) -> bool:
    try:
        parts = urlsplit(url)
        if parts.scheme == "tcp":
            return parts.hostname in LOOPBACKS and parts.username is None and parts.password is None
        return parts.scheme in ("unix", "npipe")
    except ValueError:
        return False
