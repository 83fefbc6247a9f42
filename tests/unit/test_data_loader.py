"""The loader gives every layout the same global batches and resumes from a count alone."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from litespark.data.blend import open_blend
from litespark.data.loader import BatchLoader, OutOfSamples
from litespark.data.sample import Sample
from litespark.errors import UserError
from tests.support.data import write_shard

GLOBAL = 24


class Numbers:
    """Sample k is [10 k, 10 k + 1, 10 k + 2]."""

    def read(self, index):
        return Sample(np.arange(10 * index, 10 * index + 3), np.array([], np.int64), 2)


def samples_of(batches):
    return [int(row[0]) // 10 for batch in batches for row in batch.tokens_bs]


def run_steps(micro, size, consumed, steps, source=None):
    """Return each step's batches in the order (micro-batch, rank), and the final count."""
    loaders = [
        BatchLoader(source or Numbers(), micro, GLOBAL, rank, size, consumed)
        for rank in range(size)
    ]
    result = []
    for _ in range(steps):
        per_rank = [loader.next_step() for loader in loaders]
        ordered = [batches[m] for m in range(GLOBAL // (micro * size)) for batches in per_rank]
        result.append(ordered)
    counts = {loader.consumed_samples for loader in loaders}
    for loader in loaders:
        loader.close()
    assert len(counts) == 1
    return result, counts.pop()


LAYOUTS = [(1, 1), (24, 1), (1, 24), (2, 3), (3, 2), (4, 6), (6, 4)]


@pytest.mark.parametrize(("micro", "size"), LAYOUTS)
def test_each_layout_sees_the_same_samples_in_the_same_order(micro, size):
    steps, consumed = run_steps(micro, size, 0, 3)
    assert [samples_of(step) for step in steps] == [
        list(range(i * GLOBAL, (i + 1) * GLOBAL)) for i in range(3)
    ]
    assert consumed == 3 * GLOBAL


@pytest.mark.parametrize(("micro", "size"), LAYOUTS)
def test_resuming_at_another_layout_goes_on_with_the_same_data(tmp_path, micro, size):
    write_shard(tmp_path / "a", [5, 9, 0, 30, 7] * 4)
    write_shard(tmp_path / "b", [11] * 9)
    entries = [(str(tmp_path / "a"), 2.0), (str(tmp_path / "b"), 1.0)]

    def rows(consumed, steps, micro, size):
        blend = open_blend(entries, (1.0, 0.0, 0.0), "train", 8, 3)
        taken, _ = run_steps(micro, size, consumed, steps, blend)
        return [torch.cat([batch.tokens_bs for batch in step]).tolist() for step in taken]

    whole = rows(0, 6, 2, 3)
    assert rows(0, 2, 2, 3) + rows(2 * GLOBAL, 4, micro, size) == whole
    assert len({str(step) for step in whole}) == 6


def test_tensors_of_a_batch():
    loader = BatchLoader(Numbers(), 2, 4, 1, 2)
    (batch,) = loader.next_step()
    loader.close()
    assert batch.tokens_bs.tolist() == [[20, 21], [30, 31]]
    assert batch.labels_bs.tolist() == [[21, 22], [31, 32]]
    assert batch.position_ids_bs.tolist() == [[0, 1], [0, 1]]
    assert batch.loss_mask_bs.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    integers = (batch.tokens_bs, batch.labels_bs, batch.position_ids_bs)
    assert [t.dtype for t in integers] == [torch.int64] * 3
    assert batch.loss_mask_bs.dtype == torch.float32
    assert all(t.is_contiguous() for t in (*integers, batch.loss_mask_bs))


def test_prefetched_steps_do_not_count_as_consumed():
    prepared = threading.Event()

    class Watched(Numbers):
        def read(self, index):
            if index >= 3 * GLOBAL:
                prepared.set()
            return super().read(index)

    loader = BatchLoader(Watched(), GLOBAL, GLOBAL, 0, 1)
    loader.next_step()
    assert prepared.wait(10)  # the thread is at the fourth step by itself
    assert loader.consumed_samples == GLOBAL
    assert loader.wait_seconds > 0
    loader.close()


def test_max_samples_ends_before_it_is_exceeded():
    loader = BatchLoader(Numbers(), 2, 10, 0, 1, consumed_samples=10, max_samples=39)
    assert samples_of(loader.next_step()) == list(range(10, 20))
    assert samples_of(loader.next_step()) == list(range(20, 30))
    with pytest.raises(OutOfSamples):
        loader.next_step()
    assert loader.consumed_samples == 30
    loader.close()


def test_error_while_reading_reaches_the_caller_after_the_good_steps():
    class Breaks(Numbers):
        def read(self, index):
            if index >= 10:
                raise OSError("disk gone")
            return super().read(index)

    loader = BatchLoader(Breaks(), 5, 5, 0, 1)
    assert samples_of(loader.next_step() + loader.next_step()) == list(range(10))
    with pytest.raises(OSError, match="disk gone"):
        loader.next_step()
    assert loader.consumed_samples == 10
    with pytest.raises(RuntimeError, match="closed"):
        loader.next_step()


def test_close_joins_the_thread_and_may_be_repeated():
    def reading() -> int:
        return sum(thread.name == "batch-loader" for thread in threading.enumerate())

    before = reading()
    loader = BatchLoader(Numbers(), 1, 4, 0, 1)
    loader.next_step()
    assert reading() == before + 1
    loader.close()
    loader.close()
    assert reading() == before


def test_no_global_generator_is_drawn_from():
    torch.manual_seed(5)
    np.random.seed(5)
    before = torch.get_rng_state(), str(np.random.get_state())
    loader = BatchLoader(Numbers(), 2, 4, 0, 2)
    for _ in range(3):
        loader.next_step()
    loader.close()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert str(np.random.get_state()) == before[1]


def test_global_batch_that_does_not_divide_is_the_users_error():
    with pytest.raises(UserError, match=r"batch.global = 10: is not a multiple") as caught:
        BatchLoader(Numbers(), 2, 10, 0, 3)
    assert "multiple of 6" in caught.value.fix
