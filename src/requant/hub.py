"""The Hugging Face hub over HTTP: transient failures are retried with a limit, others become one line.

Neither a token nor the signed address of a CDN gets into a message: errors are told by status and file name, and
what huggingface_hub raised is not chained to them.
"""

import re
from collections.abc import Callable
from http import HTTPStatus
from typing import BinaryIO, TypeVar

from requant.errors import RequantError
from requant.patience import WAITS, Server, tried

COMPUTES = False  # files are what their hashes say, whoever fetched them
COMMIT = re.compile(r"[0-9a-f]{40}")
TRANSIENT = (408, 429, 500, 502, 503, 504)

Result = TypeVar("Result")


def nothing_comes() -> int:
    """For an action that keeps nothing of an attempt that failed."""
    return 0


def patiently(action: Callable[[], Result], what: str, kept: Callable[[], int] = nothing_comes) -> Result:
    """The result of `action`, which is tried again after a failure that may pass (`patience.tried`)."""
    return tried(Server("the hub", describe, may_pass), action, what, kept, WAITS)


def may_pass(error: Exception) -> bool:
    """Whether the same request may succeed later: the server or the line was at fault."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    error = _cause(error)
    if isinstance(error, HfHubHTTPError):
        return error.response.status_code in TRANSIENT
    return isinstance(error, httpx2.TransportError) or _came_short(error)


def describe(error: Exception) -> str | None:
    """What went wrong with a request and what to do about it; None if `error` is none of the hub's."""
    import httpx2
    from huggingface_hub import constants, errors

    error = _cause(error)
    login = "set HF_TOKEN or run `hf auth login`"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "not here, and HF_HUB_OFFLINE forbids to ask the hub; expected it unset"
    if isinstance(error, errors.GatedRepoError):
        return f"gated: its terms have to be accepted on its page at {constants.ENDPOINT}; then {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"no such repository at {constants.ENDPOINT}, or a private one; for that, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"no such revision at {constants.ENDPOINT}; expected a commit, branch or tag of the repository"
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return f"no such file at {constants.ENDPOINT}"
    if isinstance(error, errors.HfHubHTTPError):
        status = _status(error.response.status_code)
        return f"{status}: {login}" if error.response.status_code in (401, 403) else f"{status} from the hub"
    if isinstance(error, httpx2.TransportError):
        return f"no answer from {constants.ENDPOINT} ({type(error).__name__}: {error})"
    return "the file came short or long" if _came_short(error) else None


def _status(code: int) -> str:
    """A status with its standard phrase: what a server writes in its place is not shown."""
    phrases = {status.value: status.phrase for status in HTTPStatus}
    return f"{code} {phrases.get(code, '')}".strip()


def _cause(error: Exception) -> Exception:
    """The failed request behind huggingface_hub's `not in the cache, and not to be had`."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    return error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error


def _came_short(error: Exception) -> bool:
    return type(error) is OSError and str(error).startswith("Consistency check failed")


def file_url(hub: str, commit: str, name: str) -> str:
    """Where the hub serves a file of a repository."""
    from huggingface_hub import hf_hub_url

    return hf_hub_url(hub, name, revision=commit)


def get(url: str, file: BinaryIO, size: int | None) -> None:
    """Appends what `file` lacks of the `size` bytes at `url`: a cut answer is taken up where it ended.

    huggingface_hub resumes and retries within the call. `url` is the hub's own, never the CDN's: redirects to other
    hosts lose the token. Raises what huggingface_hub and httpx2 raise.
    """
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers, disable_progress_bars

    disable_progress_bars()
    headers = build_hf_headers(headers={"Accept-Encoding": "identity"})
    http_get(url, file, resume_size=file.tell(), headers=headers, expected_size=size)


def first_bytes(url: str, count: int) -> bytes:
    """The first `count` bytes at `url`, or all if it has fewer.

    Raises RequantError if the server would send the whole file; besides what huggingface_hub and httpx2 raise.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

    headers = build_hf_headers(headers={"Accept-Encoding": "identity", "Range": f"bytes=0-{count - 1}"})
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    # An exception of the body would be taken for one of the request, and the block entered twice.
    with http_stream_backoff("GET", url, headers=headers, timeout=timeout, retry_on_exceptions=()) as response:
        hf_raise_for_status(response)
        if response.status_code != 206:
            raise RequantError(f"{url}: status {response.status_code} found; expected 206, a part of the file")
        return response.read()
