"""Side by side equals one after the other: order of turns, errors, interruption, no thread left."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from sparsekit.lanes import side_by_side


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("sparsekit-lane")]
    torch.set_num_threads(before)


def test_turns_are_taken_in_the_order_of_the_samples(threads):
    seen: dict[str, list[int]] = {"a": [], "b": [], "rare": []}

    def work(sample, turns):
        time.sleep((sample * 7 % 5) / 1000)  # later samples often arrive first
        for name in ("a", "b"):
            with turns.turn(name, sample):
                seen[name].append(sample)
        if sample % 3 == 0:
            with turns.turn("rare", sample):
                seen["rare"].append(sample)

    side_by_side(20, work)
    assert seen == {"a": list(range(20)), "b": list(range(20)), "rare": list(range(0, 20, 3))}


def test_samples_do_run_side_by_side(threads):
    barrier = threading.Barrier(threads)
    side_by_side(threads * 3, lambda sample, turns: barrier.wait(timeout=20) and None)


def test_one_lane_is_one_after_the_other(threads):
    running = []

    def work(sample, turns):
        assert threading.current_thread() is threading.main_thread()
        running.append(sample)

    side_by_side(6, work, most=1)
    assert running == list(range(6))


def test_the_error_of_the_earliest_sample_is_raised_and_later_ones_stop(threads):
    done = []

    def work(sample, turns):
        if sample == 3:
            time.sleep(0.02)
            raise ValueError("sample 3")
        with turns.turn("sum", sample):
            if sample == 4:
                raise ValueError("sample 4")
            done.append(sample)

    with pytest.raises(ValueError, match="sample 3"):
        side_by_side(1000, work)
    assert done == [0, 1, 2]


@pytest.mark.parametrize("threads", [2, 5], indirect=True)
def test_an_interrupt_stops_the_lanes(threads):
    calls = []

    def work(sample, turns):
        calls.append(sample)
        time.sleep(0.005)
        with turns.turn("sum", sample):
            pass
        if sample == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        side_by_side(10_000, work)
    assert len(calls) < 100


def test_nothing_to_do(threads):
    side_by_side(0, lambda sample, turns: pytest.fail("called"))


def test_the_threads_of_torch_are_shared_between_lanes():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    inside = set()
    side_by_side(2, lambda sample, turns: inside.add(torch.get_num_threads()))
    assert inside == {2}
    torch.set_num_threads(before)
