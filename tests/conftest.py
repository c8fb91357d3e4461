"""What all tests share: which run in one process, the order, GPU tests, and the option that forbids other skips."""

import re
from functools import cache
from pathlib import Path

import pytest

pytest_plugins = ["docker_engine"]  # fixtures: docker_engine, docker_host, host_image

WORKFLOW = Path(__file__).parent / "workflow"
USES_BUILT = re.compile(r"^def \w+\((.*, )?built[,)]", re.MULTILINE)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --only-gpu-skips."""
    parser.addoption("--only-gpu-skips", action="store_true", help="fail if any test but one marked `gpu` is skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Watch for skips where --only-gpu-skips forbids them; with pytest-xdist only the process that reports does."""
    if config.getoption("--only-gpu-skips") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(ForbiddenSkips())


class ForbiddenSkips:
    """Fails a run that skipped anything but tests marked `gpu`."""

    def __init__(self) -> None:
        self.found: dict[str, None] = {}  # node ids in order, each once: every process collects all files

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note each skip of a test that is not marked `gpu`."""
        if report.skipped and not hasattr(report, "wasxfail") and "gpu" not in report.keywords:
            self.found[report.nodeid] = None

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note each file that skips itself while it is read."""
        if report.skipped:
            self.found[report.nodeid] = None

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail the run."""
        if self.found and session.exitstatus == 0:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Name the skips that failed the run."""
        for nodeid in self.found:
            terminalreporter.write_line(f"skipped, and only GPU tests may be: {nodeid}", red=True)


def _gpu_is_missing() -> bool:
    import torch  # seconds to import, and most runs collect no GPU test

    return not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole builds are marked `workflow` and begin first, since they take longest; GPU tests need a GPU."""
    for item in items:
        if WORKFLOW in item.path.parents:
            item.add_marker("workflow")
    items.sort(key=lambda item: (item.get_closest_marker("workflow") is None, _group(item.path) != "built"))
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and _gpu_is_missing():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """With pytest-xdist, one process runs all tests of a file, or of the files that share the build `built`."""
    from xdist.scheduler import LoadFileScheduling

    class TogetherScheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _group(config.rootpath / nodeid.partition("::")[0])

    return TogetherScheduling(config, log)


@cache
def _group(path: Path) -> str:
    """`built` for a file with a test that takes this fixture; else the path."""
    return "built" if USES_BUILT.search(path.read_text(encoding="utf-8")) else str(path)
