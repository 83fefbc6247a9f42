"""The passes of a training step as one CUDA graph: recorded once, replayed at every step.

Launching a layer's kernels from Python takes the host some milliseconds, forward and backward.
Where the GPU has less to do in that time it waits: small models, and layers that tensor or context
parallelism divides.  A graph holds all kernels and collectives of a step's forward and backward
passes with their arguments, and the device takes them from it without the host.

Three things follow.  Every address is that of the recording: a step's samples are copied to where
the recorded ones were, and what the passes report stands at the same place each time.  Whatever
Python decides within the passes is decided once: that FP8 weights are quantised again, so that the
recorded step must be one that does it; and that layers compute in these formats, so that a change
of them needs a new recording.  And what cannot be recorded must have happened before: kernels are
loaded, algorithms chosen and communicators made in the first steps, which run as always.

The passes end with the gradients (`gradients.py`); FP8's next scales and the optimizer's update
follow outside.  Source: megatron-core's `full_cuda_graph.py` records a whole iteration likewise.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.data.loader import Batch
from litespark.errors import LitesparkError
from litespark.fp8.policy import PrecisionPolicy

# The first step has no scales of FP8 and sends between pipeline stages one after the other; the
# second sends beside computation, and may meet kernels and communicators for the first time.
EAGER_STEPS = 3

Reports = list[dict[str, Any]]
MicroBatches = Sequence[Batch | None]
Passes = Callable[[MicroBatches], Reports]


class Recording(Protocol):
    """What keeps the work of the device and repeats it."""

    def record(self, work: Callable[[], Reports]) -> Reports:
        """Keep what `work` would do, without doing it; what it returns is filled by `replay`."""
        ...

    def replay(self) -> None:
        """Do it."""
        ...


class CudaRecording:
    """A CUDA graph."""

    def __init__(self) -> None:
        self._graph = torch.cuda.CUDAGraph()

    def record(self, work: Callable[[], Reports]) -> Reports:
        """Capture on a stream of its own; other threads may use the device meanwhile."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # the graph's memory is another than that of the steps before
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            return work()

    def replay(self) -> None:
        """Launch the graph on the current stream."""
        self._graph.replay()


class StepGraph:
    """Runs the passes of training steps: the first ones as they are, all others from a recording.

    Args:
        policy: the formats of the layers.
        core_config: megatron-core's configuration, which decides how stages send.
        device: of the model.
        make_recording: a recorder; tests give one that needs no GPU.
    """

    def __init__(
        self,
        policy: PrecisionPolicy,
        core_config: TransformerConfig,
        device: torch.device,
        make_recording: Callable[[], Recording] = CudaRecording,
    ) -> None:
        self._policy = policy
        self._core_config = core_config
        self._device = device
        self._make_recording = make_recording
        self.is_recording = False  # while the passes run without doing anything
        self.forget()

    def forget(self) -> None:
        """Record anew: the model is not the one that was recorded."""
        self._recording: Recording | None = None
        self._reports: Reports = []
        self._inputs: list[Batch | None] = []
        self._moved_layers = frozenset(self._policy.moved_layers)
        self._eager_steps_left = EAGER_STEPS

    def run(self, micro_batches: MicroBatches, passes: Passes) -> Reports:
        """`passes(micro_batches)`; the tensors returned are overwritten by the next step's.

        Raises:
            LitesparkError: something in the passes cannot be recorded.
        """
        if self._moved_layers != self._policy.moved_layers:
            self.forget()
        if self._eager_steps_left:
            self._eager_steps_left -= 1
            return passes(micro_batches)
        if self._recording is None:
            self._inputs = [self._kept(batch) for batch in micro_batches]
            self._recording = self._record(passes)
        else:
            for kept, batch in zip(self._inputs, micro_batches, strict=True):
                _copy_into(kept, batch)
        self._recording.replay()
        return self._reports

    def _record(self, passes: Passes) -> Recording:
        recording = self._make_recording()
        self._policy.weights_changed()  # whatever came before: the recorded step takes them over
        self.is_recording = True
        try:
            with _recordable(self._core_config):
                self._reports = recording.record(lambda: passes(self._inputs))
        except RuntimeError as error:
            raise LitesparkError(
                f"the step cannot be recorded as a CUDA graph: {error}\n"
                "Set training.cuda_graph=false."
            ) from error
        finally:
            self.is_recording = False
        return recording

    def _kept(self, batch: Batch | None) -> Batch | None:
        """A copy on the device, whose place does not change."""
        if batch is None:
            return None
        copies = {name: value.to(self._device, copy=True) for name, value in _tensors(batch)}
        return replace(batch, **copies)


def _copy_into(kept: Batch | None, batch: Batch | None) -> None:
    if kept is None or batch is None:
        return
    for (_, target), (_, source) in zip(_tensors(kept), _tensors(batch), strict=True):
        target.copy_(source, non_blocking=True)


def _tensors(batch: Batch) -> Iterator[tuple[str, torch.Tensor]]:
    for field in fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, torch.Tensor):
            yield field.name, value


@contextmanager
def _recordable(core_config: TransformerConfig) -> Iterator[None]:
    """Within the block megatron-core does nothing that a recording forbids.

    It would wait for the device after sends, which order among the recorded does not need; and
    change the states of random generators, which nothing draws from: there is no dropout.
    """
    tracker: Any = get_cuda_rng_tracker()
    waits, core_config.batch_p2p_sync = core_config.batch_p2p_sync, False
    tracker.fork = lambda *_: nullcontext()  # hides the method
    collects = gc.isenabled()
    gc.disable()  # it may free what belongs to the device
    try:
        yield
    finally:
        core_config.batch_p2p_sync = waits
        del tracker.fork
        if collects:
            gc.enable()
