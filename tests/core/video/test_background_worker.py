"""Prefetching: in order, one item at a time, with errors passed on."""

import threading

import pytest
import torch

from turbotalk_core.video.background_worker import BackgroundWorker


def test_it_is_done_in_order_in_another_thread():
    done, threads = [], set()

    def work(number):
        threads.add(threading.current_thread())
        done.append(number)

    with BackgroundWorker() as background:
        for number in range(9):
            background.do(work, number)
    assert done == list(range(9))
    assert len(threads) == 1
    assert threading.current_thread() not in threads


def test_torch_computes_alone_there_and_as_before_elsewhere():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        told = []
        with BackgroundWorker() as background:
            background.do(lambda: told.append(torch.get_num_threads()))
        later = threading.Thread(target=lambda: told.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [*told, torch.get_num_threads()] == [1, 3, 3]
    finally:
        torch.set_num_threads(before)


def test_at_most_one_waits():
    gate, begun = threading.Event(), []

    def work(number):
        begun.append(number)
        gate.wait()

    asked = []

    def ask():
        with BackgroundWorker() as background:
            for number in range(3):
                background.do(work, number)
                asked.append(number)

    asking = threading.Thread(target=ask)
    asking.start()
    while not (begun and asked):
        asking.join(0.01)
    asking.join(0.05)  # time for what must not happen
    assert begun == [0]
    assert asked == [0]  # the second is asked for only when the first is done
    gate.set()
    asking.join()
    assert begun == asked == [0, 1, 2]


def fail():
    raise ValueError("of the thread")


def test_a_failure_is_told_by_the_next_call_and_ends_it():
    done = []

    def run():
        with BackgroundWorker() as background:
            background.do(fail)
            background.do(done.append, 1)

    with pytest.raises(ValueError, match="of the thread"):
        run()
    assert done == []


def test_a_failure_of_the_last_is_told_at_the_end():
    with pytest.raises(ValueError, match="of the thread"), BackgroundWorker() as background:
        background.do(fail)


def test_an_error_of_the_block_is_the_one_told_and_what_was_begun_ends():
    done = []

    def run():
        with BackgroundWorker() as background:
            background.do(done.append, 1)
            raise KeyError

    with pytest.raises(KeyError):
        run()
    assert done == [1]
