"""Work side by side: in order, never far ahead, with the cores shared, and with errors that come out."""

import threading

import pytest
import torch

from quantkit.workers import MOST, Workers

CPU = torch.device("cpu")


@pytest.fixture(params=[1, 2, 3, 8])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_come_in_order_and_items_are_taken_as_they_are_needed(threads):
    workers, taken, done = Workers(CPU), [], []
    assert workers.count == min(threads, MOST)

    def items():
        for number in range(20):
            taken.append(number)
            yield number

    def work(number):
        if number % 3 == 0:
            torch.ones(300, 300) @ torch.ones(300, 300)  # some take longer
        return number * number

    for result in workers.map(work, items()):
        done.append(result)
        assert len(taken) - len(done) < workers.count
    assert done == [number * number for number in range(20)]


def test_each_has_its_share_of_the_cores_and_all_are_there_afterwards(threads):
    workers = Workers(CPU)
    found = list(workers.map(lambda _: (torch.get_num_threads(), threading.current_thread()), range(2 * workers.count)))
    share = threads if workers.count == 1 else max(1, threads // workers.count)
    assert {each for each, _ in found} == {share}
    assert (threading.current_thread() in {thread for _, thread in found}) == (workers.count == 1)
    assert torch.get_num_threads() == threads
    later = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [threads]


def test_they_work_side_by_side(threads):
    """Each waits for the others: in turn they would wait forever."""
    workers = Workers(CPU)
    meeting = threading.Barrier(workers.count)
    assert list(workers.map(lambda item: meeting.wait(30) >= 0 and item, range(workers.count))) == [
        *range(workers.count)
    ]


@pytest.mark.parametrize("where", ["work", "items"])
def test_an_error_comes_out_as_it_is_and_leaves_no_thread(threads, where):
    before, taken = threading.active_count(), []

    def items():
        for number in range(20):
            if where == "items" and number == 5:
                raise ValueError("number 5")
            taken.append(number)
            yield number

    def work(number):
        if number == 5:
            raise ValueError("number 5")
        return number

    done = []
    with pytest.raises(ValueError, match="number 5"):
        done.extend(Workers(CPU).map(work, items()))
    assert done == [*range(len(done))]
    assert len(taken) <= 5 + MOST
    assert threading.active_count() == before
    assert torch.get_num_threads() == threads


def test_on_a_gpu_all_is_done_in_turn(threads):
    assert Workers(torch.device("cuda", 0)).count == 1
