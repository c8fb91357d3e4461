"""What all tests share: the order of the run, GPU tests, and the option that forbids other skips."""

from pathlib import Path

import pytest

WORKFLOW = Path(__file__).parent / "workflow"
SKIPS = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --only-gpu-skips."""
    parser.addoption("--only-gpu-skips", action="store_true", help="fail if any test but one marked `gpu` is skipped")


def pytest_configure(config: pytest.Config) -> None:
    """Start the list of the skips that --only-gpu-skips forbids."""
    config.stash[SKIPS] = []


def _gpu_is_missing() -> bool:
    import torch  # seconds to import, and most runs collect no GPU test

    return not torch.cuda.is_available()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole builds last and marked `workflow`; GPU tests skipped where there is no GPU."""
    for item in items:
        if WORKFLOW in item.path.parents:
            item.add_marker("workflow")
    items.sort(key=lambda item: item.get_closest_marker("workflow") is not None)
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items and _gpu_is_missing():
        for item in gpu_items:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    """Note each skip of a test that is not marked `gpu`."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail") and not item.get_closest_marker("gpu"):
        item.config.stash[SKIPS].append(report.nodeid)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector):
    """Note each file that skips itself while it is read."""
    report = yield
    if report.skipped:
        collector.config.stash[SKIPS].append(report.nodeid)
    return report


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """With --only-gpu-skips, fail a run that skipped anything else."""
    if session.config.getoption("--only-gpu-skips") and session.config.stash[SKIPS] and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    """Name the skips that failed the run."""
    if config.getoption("--only-gpu-skips"):
        for nodeid in config.stash[SKIPS]:
            terminalreporter.write_line(f"skipped, and only GPU tests may be: {nodeid}", red=True)
