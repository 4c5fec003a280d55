"""Which rows a step sees, how they are shared out, and batches made ahead in threads."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest

from ldmcli.core.errors import InputError
from ldmcli.core.train_settings import TrainSettings
from ldmcli.data import batches as batches_module
from ldmcli.data.batches import Prefetcher, epoch_positions, micro_batches, rank_slice


@pytest.mark.parametrize("n, batch", [(7, 2), (7, 3), (3, 4), (1, 4), (10, 5)])
def test_every_row_comes_once_an_epoch(n, batch):
    steps = n  # batch epochs exactly
    ids = np.concatenate([epoch_positions(step * batch, batch, n, seed=3)[0] for step in range(steps)])
    epochs = ids.reshape(batch, n)
    assert (np.sort(epochs, axis=1) == np.arange(n)).all()


def test_positions_count_on_without_gaps_and_epochs_differ_in_order():
    ids, where = zip(*(epoch_positions(4 * step, 4, 20, seed=0) for step in range(10)))
    assert np.concatenate(where).tolist() == list(range(40))
    first, second = np.concatenate(ids).reshape(2, 20)
    assert first.tolist() != second.tolist() and first.tolist() != list(range(20))


def test_a_step_is_a_function_of_seed_and_step():
    assert (epoch_positions(55, 5, 7, seed=2)[0] == epoch_positions(55, 5, 7, seed=2)[0]).all()
    assert (epoch_positions(55, 5, 70, seed=2)[0] != epoch_positions(55, 5, 70, seed=3)[0]).any()


def test_the_order_of_rows_does_not_depend_on_the_batch_size():
    by_two = np.concatenate([epoch_positions(2 * step, 2, 9, seed=1)[0] for step in range(15)])
    by_six = np.concatenate([epoch_positions(6 * step, 6, 9, seed=1)[0] for step in range(5)])
    assert (by_two == by_six).all()


@pytest.mark.parametrize("batch, steps", [(8, 3), (5, 2), (2, 1), (8, 0), (8, 100)])
def test_half_batches_at_the_start_leave_no_gap_and_take_nothing_twice(batch, steps):
    train = TrainSettings(batch_size=batch, half_batch_steps=steps)
    starts, counts = zip(*(train.batch_at(step) for step in range(12)))
    assert list(starts) == [sum(counts[:step]) for step in range(12)]
    assert list(counts) == [batch // 2 if step < steps else batch for step in range(12)]


def test_no_rows_is_an_input_error():
    with pytest.raises(InputError, match="0 rows"):
        epoch_positions(0, 4, 0, seed=0)


@pytest.mark.parametrize("batch, world", [(8, 2), (7, 3), (2, 4), (1, 1)])
def test_shares_cover_the_batch_in_order_and_differ_by_at_most_one(batch, world):
    parts = [np.arange(batch)[rank_slice(batch, rank, world)] for rank in range(world)]
    assert np.concatenate(parts).tolist() == list(range(batch))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


SPLITS = [(7, 3, [3, 2, 2]), (8, 0, [8]), (4, 8, [4]), (0, 3, []), (6, 3, [3, 3])]


@pytest.mark.parametrize("count, micro, sizes", SPLITS)
def test_micro_batches_are_as_even_as_possible(count, micro, sizes):
    parts = micro_batches(count, micro)
    assert [part.stop - part.start for part in parts] == sizes
    assert [k for part in parts for k in range(part.start, part.stop)] == list(range(count))


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_batches_come_in_order_of_steps(workers):
    with Prefetcher(lambda step: step * step, 5, depth=3, workers=workers) as batches:
        assert [batches.get(step) for step in range(5, 30)] == [step * step for step in range(5, 30)]


def test_no_more_than_depth_batches_are_made_ahead():
    made, reached = [], threading.Event()

    def make(step):
        made.append(step)
        if len(made) == 2:
            reached.set()
        return step

    with Prefetcher(make, 0, depth=2, workers=2) as batches:
        assert reached.wait(10)
        assert sorted(made) == [0, 1]
        batches.get(0)
        batches.get(1)
    assert max(made) <= 3


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_is_raised_by_the_get_of_its_step(workers):
    def make(step):
        if step == 2:
            raise InputError("row 2 is gone")
        return step

    with Prefetcher(make, 0, workers=workers) as batches:
        assert [batches.get(0), batches.get(1)] == [0, 1]
        with pytest.raises(InputError, match="row 2 is gone"):
            batches.get(2)


def test_batches_are_made_in_other_threads_while_the_loop_works():
    with Prefetcher(lambda step: threading.current_thread().name, 0, workers=1) as batches:
        assert batches.get(0) != threading.current_thread().name


def test_waiting_is_measured(monkeypatch):
    clock = SimpleNamespace(perf_counter=iter([10.0, 12.5, 20.0, 20.25]).__next__)
    monkeypatch.setattr(batches_module, "time", clock)
    with Prefetcher(lambda step: step, 0, workers=1) as batches:
        assert batches.waited_s == 0.0
        batches.get(0)
        batches.get(1)
        assert batches.waited_s == 2.75


def test_closing_ends_the_threads_and_may_be_repeated():
    before = threading.active_count()
    batches = Prefetcher(lambda step: step, 0, workers=3)
    batches.get(0)
    batches.close()
    batches.close()
    assert threading.active_count() == before
    with pytest.raises(RuntimeError, match="closed"):
        batches.get(1)


def test_steps_out_of_order_and_past_the_limit_are_faults():
    with Prefetcher(lambda step: step, 3, workers=1, limit=4) as batches:
        with pytest.raises(RuntimeError, match="step 3 is next"):
            batches.get(4)
        assert batches.get(3) == 3
        with pytest.raises(RuntimeError, match="end before step 4"):
            batches.get(4)
