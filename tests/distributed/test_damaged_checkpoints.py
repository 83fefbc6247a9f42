"""The short form of `tools/soak/damage.py`: every kind of file and of damage once."""

from __future__ import annotations

import pytest

from tests.support.spawn import run_distributed
from tools.soak.damage import KINDS, try_all
from tools.soak.trial import Trial, write_trial

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    trial = Trial(write_trial(folder, 2, 2), 2, ("parallel.tensor=2",))
    for rank in trial.start(folder / "run"):
        rank.join(300)
        assert rank.exitcode == 0
    return folder / "run" / "checkpoints"


def try_rank(rank, world_size, whole, out, count, blind):
    from litespark.checkpoint import choose
    from litespark.parallel.groups import start_process_group

    if blind:
        choose.share_faults = lambda *arguments: []
    start_process_group(60)
    return try_all(whole, out, count, seed=1, report=lambda text: None)


def test_each_is_named_and_none_loaded(whole, tmp_path):
    count = 38  # one round
    done, faults = run_distributed(try_rank, 1, whole, tmp_path, count, False)[0]
    assert faults == []
    assert sum(done.values()) == count
    assert {name for name, _ in done} == set(KINDS)
    assert len({how for _, how in done}) == 5


def test_a_choice_that_does_not_read_the_bytes_would_be_seen(whole, tmp_path):
    """Without the checksums a flipped bit is loaded, and the trial says so."""
    _, faults = run_distributed(try_rank, 1, whole, tmp_path, 4, True)[0]
    assert any(fault.startswith("flip a bit") for fault in faults)
