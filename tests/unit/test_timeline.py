"""Simulated timelines against arithmetic: what one device, enough devices and a slow disk come to."""

import math
from graphlib import TopologicalSorter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from requant.timeline import Job, Machine, Timeline, Work, jobs_of, segment_of, simulate

CHAIN, TUNING = [3.0, 1.0, 2.0, 4.0], [10.0, 7.0, 9.0, 11.0]
MIB = 2**20


def run(work: Work, segment: int, devices: int = 1, **machine) -> Timeline:
    return simulate(jobs_of(work, segment), Machine(devices, **machine))


def starts(timeline: Timeline) -> dict[str, float]:
    return {found.job: found.start for found in timeline.runs}


def ends(timeline: Timeline) -> dict[str, float]:
    return {found.job: found.end for found in timeline.runs}


# Analytic cases


@pytest.mark.parametrize("inputs", ["quantized", "reference"])
def test_one_device_takes_the_sum(inputs):
    timeline = run(Work(CHAIN, TUNING), segment_of(inputs, 4))
    assert timeline.seconds == sum(CHAIN) + sum(TUNING) == timeline.busy[0]


def test_enough_devices_take_the_chain_and_the_slowest_block_behind_it_with_reference_inputs():
    timeline = run(Work(CHAIN, TUNING), 1, devices=64)
    assert timeline.seconds == sum(CHAIN) + TUNING[-1] == 21
    assert sum(timeline.busy) == sum(CHAIN) + sum(TUNING)
    early = [3.0, 1.0, 2.0, 4.0], [10.0, 40.0, 9.0, 11.0]
    assert run(Work(*early), 1, devices=64).seconds == 3 + 1 + 40


def test_enough_devices_take_the_first_pass_and_all_tuners_with_quantized_inputs():
    assert run(Work(CHAIN, TUNING), 4, devices=64).seconds == CHAIN[0] + sum(TUNING)
    slow_chain = [30.0, 10.0, 20.0, 40.0]
    assert run(Work(slow_chain, TUNING), 4, devices=64).seconds == sum(slow_chain) + TUNING[-1]


def test_segments_are_chains_of_their_own_behind_the_reference_chain():
    timeline = run(Work(CHAIN, TUNING), 2, devices=64)
    assert ends(timeline)["quantize 1"] == 3 + 10 + 7
    assert starts(timeline)["quantize 2"] == 3 + 1 + 2
    assert timeline.seconds == 3 + 1 + 2 + 9 + 11


def test_tuners_come_before_the_chain_and_the_first_blocks_before_all():
    order = [found.job for found in run(Work([1.0] * 4, [1.0] * 4, stages={"load_test": 1.0}, first=2), 1).runs]
    assert order[:7] == [
        "reference -1",
        "reference 0",
        "quantize 0",
        "reference 1",
        "quantize 1",
        "load_test",
        "reference 2",
    ]


def test_what_comes_behind_the_blocks_waits_for_what_it_reads():
    stages = {"load_test": 5.0, "pack": 1.0, "verify": 8.0, "evaluate": 2.0, "deploy": 3.0}
    began = starts(run(Work(CHAIN, TUNING, first=1, stages=stages), 1, devices=8))
    assert began["load_test"] == 13, "behind the first block"
    assert (began["pack"], began["verify"], began["evaluate"], began["deploy"]) == (21, 22, 22, 24)


def test_a_pruned_model_is_observed_whole_before_its_own_chain():
    observe = [1.0, 1.0, 1.0, 2.0]
    began = starts(run(Work(CHAIN, TUNING, observe=observe), 1, devices=64))
    assert (began["reference 0"], began["quantize 0"]) == (5, 8)
    assert run(Work(CHAIN, TUNING, observe=observe), 1).seconds == 5 + sum(CHAIN) + sum(TUNING)
    began = starts(run(Work(CHAIN, TUNING, observe=observe, sequential=True), 1, devices=64))
    assert (began["decide 0"], began["reference 0"], began["decide 1"], began["reference 1"]) == (0, 1, 4, 5)


def test_a_release_on_other_tokens_than_its_experts_were_chosen_by_walks_the_source_again():
    found = jobs_of(Work(CHAIN, TUNING, observe=CHAIN, original=[5.0] * 4), 1)
    assert next(job for job in found if job.name == "evaluate").after == ("pack", "original 3")
    assert simulate(found, Machine(1)).seconds == 2 * sum(CHAIN) + 20 + sum(TUNING)


def test_a_tuner_of_two_threads_takes_two_devices():
    timeline = run(Work(CHAIN, [5.0] * 4, threads=2), 1, devices=2)
    assert timeline.seconds == sum(CHAIN) + 4 * 5
    assert {found.devices for found in timeline.runs if found.rule == "quantize"} == {(0, 1)}


def test_jobs_that_need_no_gpu_take_none():
    stages = {"pack": 1.0, "verify": 8.0, "evaluate": 2.0}
    timeline = run(Work(CHAIN, TUNING, gpu=True, walks=0), 1)
    assert {found.rule for found in timeline.runs if found.devices} == {"quantize"}, "a chain on the CPU"
    timeline = run(Work(CHAIN, TUNING, gpu=True, stages=stages), 1)
    assert starts(timeline)["evaluate"] == starts(timeline)["verify"]
    assert {found.rule for found in timeline.runs if not found.devices} == {"embed", "pack", "verify"}


# Hidden states


def test_the_peak_of_hidden_states_is_what_is_counted_by_hand():
    """On one device with reference inputs: those of the last tuner, and its own output."""
    work = Work([1.0] * 4, [1.0] * 4, calibration=10, heldout=1)
    # At the end of the last reference job but one tuner: held-out states of all five files, calibration states of two.
    # When its tuner has written: these and its own output.
    assert run(work, 1).peak == 5 * 1 + 2 * 10 + 10
    assert run(work, 4).peak == 5 * 1 + 10 + 10 + 10, "target, tuned output of the block before, its own"


def test_a_chain_with_nothing_else_to_run_goes_ahead_of_tuners_that_wait_for_each_other():
    work = Work([1.0] * 6, [10.0] * 6, calibration=10)
    assert run(work, 6, devices=2).peak == 10 * (6 + 2), "all outputs of the chain, two of the tuned blocks"
    assert run(work, 6, devices=1).peak == 10 * 3


def test_without_readers_nothing_stays():
    jobs = [Job("a", "a", 1.0, states={"x": 5}), Job("b", "b", 1.0, ("a",), states={"y": 3})]
    assert simulate(jobs, Machine(1)).peak == 5


# Disks, lines, the graph


def test_a_disk_is_shared_by_the_devices_of_a_node():
    jobs = [Job(str(number), "read", 1.0, reads=100.0, writes=50.0) for number in range(4)]
    assert simulate(jobs, Machine(4, per_node=4, disk=100.0)).seconds == pytest.approx(4 + 1 + 2)
    assert simulate(jobs, Machine(4, per_node=2, disk=100.0)).seconds == pytest.approx(2 + 1 + 1)
    assert simulate(jobs, Machine(4, per_node=2, disk=100.0, shared=100.0)).seconds == pytest.approx(4 + 1 + 2)
    assert simulate(jobs, Machine(1, disk=100.0)).seconds == pytest.approx(4 * 2.5)


def test_a_transfer_gets_faster_when_another_ends():
    jobs = [Job("short", "read", 0.0, reads=100.0), Job("long", "read", 0.0, reads=300.0)]
    found = ends(simulate(jobs, Machine(2, disk=100.0)))
    assert (found["short"], found["long"]) == (pytest.approx(2), pytest.approx(4))


def test_blocks_are_worked_on_as_they_arrive():
    work = Work([1.0] * 3, [1.0] * 3, source=[100, 100, 100], outside=100, comes=True, gpu=True)
    timeline = run(work, 1, devices=8, hub=10.0, lines=1)
    began = starts(timeline)
    assert [began[f"reference {block}"] for block in range(3)] == [20, 30, 40]
    assert timeline.seconds == 42
    assert run(work, 1, devices=8, hub=10.0, lines=2).seconds == pytest.approx(43), "the last two arrive together"
    assert run(work, 1, devices=8, hub=10.0, disk=5.0).seconds > 80, "the disk is slower than the line"


def test_a_source_that_is_here_is_read_to_be_checked():
    work = Work([1.0] * 2, [1.0] * 2, source=[100, 100], outside=100)
    rules = [found.rule for found in run(work, 1, disk=100.0).runs]
    assert rules.count("source_file") == 3 and "download" not in rules


def test_the_graph_starts_one_job_after_another():
    jobs = [Job(str(number), "a", 10.0) for number in range(4)]
    timeline = simulate(jobs, Machine(4, coordination=1.0, start=2.0))
    assert sorted(ends(timeline).values()) == [13, 14, 15, 16]
    assert simulate(jobs, Machine(1, coordination=1.0, start=2.0)).seconds == 4 * 13


def test_jobs_side_by_side_slow_each_other_as_much_as_was_measured():
    jobs = [Job(str(number), "a", 10.0) for number in range(3)]
    assert simulate(jobs, Machine(2, beside=1.5)).seconds == pytest.approx(15 + 10)
    assert simulate(jobs, Machine(1, beside=1.5)).seconds == 30
    four = Machine(4, beside=1.6)
    assert [four.slowed(count) for count in (0, 1, 2, 4)] == pytest.approx([1, 1, 1.2, 1.6])


@pytest.mark.parametrize("after", [("b",), ("gone",)])
def test_jobs_that_never_come_are_named(after):
    jobs = [Job("a", "a", 1.0, after), Job("b", "b", 1.0, ("a",))]
    with pytest.raises(ValueError, match="a, b: never come"):
        simulate(jobs, Machine(1))


# Any work


def critical_path(jobs: list[Job]) -> float:
    """Seconds of the longest row of jobs of which each waits for the one before it."""
    by_name = {job.name: job for job in jobs}
    done: dict[str, float] = {}
    for name in TopologicalSorter({job.name: job.after for job in jobs}).static_order():
        done[name] = by_name[name].seconds + max((done[other] for other in by_name[name].after), default=0.0)
    return max(done.values())


blocks = st.integers(1, 7).flatmap(
    lambda count: st.tuples(*(st.lists(st.floats(0, 100), min_size=count, max_size=count) for _ in range(3)))
)


@given(blocks, st.booleans(), st.booleans(), st.integers(1, 8), st.integers(1, 9), st.integers(1, 2))
def test_no_timeline_beats_the_critical_path_or_the_devices_or_loses_to_one_device(
    seconds, pruned, sequential, segment, devices, threads
):
    chain, tuning, observe = seconds
    work = Work(chain, tuning, observe if pruned else (), sequential, calibration=MIB, heldout=MIB, threads=threads)
    found = jobs_of(work, segment)
    timeline = simulate(found, Machine(devices))
    total = sum(job.seconds for job in found)
    taken = sum(job.seconds * min(job.takes, devices) for job in found)
    slack = 1e-9 * total
    assert max(critical_path(found), taken / devices) - slack <= timeline.seconds <= total + slack
    assert sum(timeline.busy) == pytest.approx(taken)
    assert sorted(starts(timeline)) == sorted(job.name for job in found)
    needs = {job.name: job.after for job in found}
    began, ended = starts(timeline), ends(timeline)
    assert all(ended[other] <= began[name] for name, others in needs.items() for other in others)
    for device in range(devices):
        turns = sorted((run.start, run.end) for run in timeline.runs if device in run.devices)
        assert all(end <= start for (_, end), (start, _) in zip(turns, turns[1:], strict=False))
    files = sum(size for job in found for size in job.states.values())
    assert MIB <= timeline.peak <= files


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=12), st.integers(1, 5), st.floats(1, 1e4))
def test_a_disk_is_never_idle_nor_faster_than_it_is(sizes, devices, rate):
    jobs = [Job(str(number), "read", 0.0, reads=size) for number, size in enumerate(sizes)]
    seconds = simulate(jobs, Machine(devices, disk=rate)).seconds
    assert math.isclose(seconds, sum(sizes) / rate, rel_tol=1e-6, abs_tol=1e-6)
