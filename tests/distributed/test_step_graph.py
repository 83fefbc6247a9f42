"""A recorded step is the step itself: losses to the last bit, new samples, new formats of layers.

Without a GPU the recording keeps Python's work and does it again at each replay, so that what is
tested is what stands around it: samples go to where the recorded ones were, the first steps run
as always, a changed model is recorded anew.  CUDA's own is in `tests/gpu/`.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.runs import train_rank, write_config, write_shard
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

STEPS = 10
FUSED = ["model.backend=triton"]
FP8 = [*FUSED, "precision.mode=fp8"]


class Again:
    """Does the work at each replay, and notes where its samples stood."""

    def __init__(self, seen: list[list[int]], graphs: list[object]) -> None:
        self.graphs, self.seen = graphs, seen

    def record(self, work):
        """Keep it; there is nothing to report yet."""
        assert self.graphs[-1].is_recording
        self.work, self.reports = work, []
        return self.reports

    def replay(self):
        """Do it."""
        batches = [batch for batch in self.graphs[-1]._inputs if batch is not None]
        self.seen.append([batch.tokens_bs.data_ptr() for batch in batches])
        self.reports[:] = self.work()


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("step_graph")
    return write_config(folder, write_shard(folder / "tokens"))


def recorded_rank(rank, world_size, config_path, overrides, moved_after=None):
    """Train on replays; losses and norms, and where the samples of each replay stood."""
    from litespark.config import load_config
    from litespark.training.setup import set_up
    from litespark.training.step import evaluate_samples, mean_loss, train_step
    from litespark.training.step_graph import StepGraph

    run = set_up(load_config(config_path, overrides))
    seen, graphs = [], []
    run.step_graph = StepGraph(
        run.policy, run.core_config, torch.device("cpu"), lambda: Again(seen, graphs)
    )
    graphs.append(run.step_graph)
    history, replayed = [], []
    while run.step < run.total_steps:
        before = len(seen)
        outcome = train_step(run)
        replayed.append(len(seen) - before)
        history.append((mean_loss(outcome.loss_and_tokens), outcome.grad_norm))
        if run.step == 6:
            evaluate_samples(run, getattr(run.train_batches, "samples", None), 1)
        if run.step == moved_after:
            run.policy.moved_layers.add(2)
    run.close()
    return {"history": history, "replayed": replayed, "seen": seen}


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        (1, FUSED),
        (1, FP8),
        (2, [*FP8, "parallel.tensor=2", "parallel.sequence=true"]),
        (2, [*FUSED, "parallel.pipeline=2", "parallel.virtual_pipeline=2"]),
        (2, [*FUSED, "parallel.pipeline=2"]),
        (
            2,
            [*FUSED, "parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"],
        ),
        (2, [*FUSED, "parallel.context=2"]),
    ],
)
def test_replays_are_the_steps(config_path, world_size, overrides):
    """Bit for bit, with an evaluation between two replays; samples always at the same place."""
    eager = run_distributed(train_rank, world_size, config_path, overrides)
    recorded = run_distributed(recorded_rank, world_size, config_path, overrides)
    for rank in range(world_size):
        assert recorded[rank]["history"] == eager[rank]
        assert recorded[rank]["replayed"] == [0, 0, 0] + [1] * (STEPS - 3)
        assert all(places == recorded[rank]["seen"][0] for places in recorded[rank]["seen"])


def test_layers_in_other_formats_are_recorded_anew(config_path):
    """The guard moves a layer after step 5: three steps as they are, then a new recording."""
    (recorded,) = run_distributed(recorded_rank, 1, config_path, FP8, 5)
    assert recorded["replayed"] == [0, 0, 0, 1, 1, 0, 0, 0, 1, 1]


def refused_rank(rank, world_size, config_path):
    """The message of a step that cannot be recorded, and whether megatron-core is as before."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from litespark.config import load_config
    from litespark.errors import LitesparkError
    from litespark.training.setup import set_up
    from litespark.training.step import train_step
    from litespark.training.step_graph import StepGraph

    class Refuses:
        def record(self, work):
            raise RuntimeError("operation not permitted when stream is capturing")

    run = set_up(load_config(config_path, FUSED))
    run.step_graph = StepGraph(run.policy, run.core_config, torch.device("cpu"), Refuses)
    message = ""
    try:
        while run.step < run.total_steps:
            train_step(run)
    except LitesparkError as error:
        message = str(error)
    run.close()
    untouched = "fork" not in vars(get_cuda_rng_tracker()) and run.core_config.batch_p2p_sync
    return message, run.step, untouched, run.step_graph.is_recording


def test_what_cannot_be_recorded_is_said(config_path):
    """And what was set aside for the recording is put back."""
    ((message, step, untouched, is_recording),) = run_distributed(refused_rank, 1, config_path)
    assert "operation not permitted" in message
    assert "Set training.cuda_graph=false" in message
    assert (step, untouched, is_recording) == (3, True, False)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["model.backend=reference"], "model.backend = reference"),
        (["data.document_mask=true"], "data.document_mask = true"),
        (["training.recompute=full"], "training.recompute = full"),
        (["model.qkv_bias=true"], "model.qkv_bias = true"),
        (["model.qk_norm=true"], "model.qk_norm = true"),
        (["model.num_query_groups=1", "parallel.tensor=2"], "model.num_query_groups = 1"),
    ],
)
def test_what_would_not_repeat_is_refused(config_path, overrides, names):
    """Before anything starts."""
    from litespark.config import load_config
    from litespark.config.validate import validate

    config = load_config(config_path, ["training.cuda_graph=true", *overrides])
    (mistake,) = validate(config, config.parallel.tensor)
    assert "training.cuda_graph = true" in str(mistake)
    assert names in str(mistake)
    assert not validate(load_config(config_path, ["training.cuda_graph=true"]), 1)
