"""The helper that runs a function in several processes."""

from __future__ import annotations

import os
import time

import pytest

from tests.support.spawn import RankFailed, run_distributed


def _environment(rank, world_size, word):
    import torch

    torch.distributed.init_process_group("gloo")
    total = torch.tensor(rank)
    torch.distributed.all_reduce(total)
    return word, os.environ["RANK"], os.environ["LOCAL_WORLD_SIZE"], torch.get_num_threads(), total


def _fail_on_rank_one(rank, world_size):
    if rank == 1:
        raise ValueError("no good")
    time.sleep(600)


def _hang_on_rank_one(rank, world_size):
    time.sleep(600 * rank)


def _die(rank, world_size):
    os._exit(7)


def test_returns_the_result_of_each_rank():
    first, second = run_distributed(_environment, 2, "word")
    assert first == ("word", "0", "2", 1, 1)
    assert second == ("word", "1", "2", 1, 1)


def test_a_failing_rank_ends_the_others_with_its_traceback():
    start = time.monotonic()
    with pytest.raises(RankFailed, match=r"rank 1 raised[\s\S]*ValueError: no good"):
        run_distributed(_fail_on_rank_one, 2)
    assert time.monotonic() - start < 60


def test_a_timeout_names_the_ranks_that_had_not_finished():
    run_distributed(_hang_on_rank_one, 1)  # the first call starts the server, for seconds
    with pytest.raises(RankFailed, match=r"not finished after 20 s: ranks 1$"):
        run_distributed(_hang_on_rank_one, 2, timeout_seconds=20)


def test_a_rank_that_dies_is_reported():
    with pytest.raises(RankFailed, match="died"):
        run_distributed(_die, 1)
