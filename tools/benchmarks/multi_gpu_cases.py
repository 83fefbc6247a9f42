"""What `multi_gpu.py` measures: layouts, the cases made of them, and their order.

A case is one thing that one group of processes does; its words are those of `litespark bench`, or
of `peer_mcore.py`, so that any of them can be repeated alone, e.g. under torchrun.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

# Tokens of one GPU in one step, the same at every layout: weak scaling.
TOKENS_PER_GPU = 65536
LEARNING_SAMPLES = 16  # of one step of the comparison of losses
RECORDED = "training.cuda_graph=true"
RECORDING_WARMUP = 5  # steps: those before the recording, it, and one replay


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; the rest of the GPUs is data parallel."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1

    def data(self, gpus: int) -> int:
        """Model replicas on so many GPUs."""
        return gpus // (self.tensor * self.pipeline * self.context)

    def name(self, gpus: int) -> str:
        """Short, e.g. `TP2+SP PP2x2 DP2`."""
        parts = [f"TP{self.tensor}+SP"] if self.tensor > 1 else []
        if self.pipeline > 1:
            parts.append(f"PP{self.pipeline}" + (f"x{self.virtual}" if self.virtual > 1 else ""))
        parts += [f"CP{self.context}"] if self.context > 1 else []
        parts += [f"DP{self.data(gpus)}"] if self.data(gpus) > 1 else []
        return " ".join(parts) or "1 GPU"

    def overrides(self, gpus: int) -> list[str]:
        """Values of Litespark's configuration."""
        degrees = {
            "tensor": self.tensor,
            "pipeline": self.pipeline,
            "virtual_pipeline": self.virtual,
            "context": self.context,
        }
        words = [f"parallel.{key}={size}" for key, size in degrees.items() if size > 1]
        words += ["parallel.sequence=true"] if self.tensor > 1 else []
        if self.data(gpus) * self.context > 1:
            words += ["parallel.overlap_grad_reduce=true", "parallel.overlap_param_gather=true"]
        return words

    def peer_options(self) -> list[str]:
        """The same for `peer_mcore.py`."""
        words = ["--tensor", str(self.tensor), "--pipeline", str(self.pipeline)]
        return [*words, "--virtual", str(self.virtual), "--context", str(self.context)]


@dataclass(frozen=True)
class Case:
    """One thing to run: `processes` ranks of `kind` (see `multi_gpu_rank.py`) on `gpus` GPUs.

    `compared_with` is the case on one GPU whose losses or speed this one is held against; a case
    that takes longer than `timeout_seconds` from its own begin is ended.
    """

    name: str
    kind: str
    gpus: int
    words: tuple[str, ...]
    timeout_seconds: float = 90.0
    processes: int | None = None
    compared_with: str | None = None

    @property
    def ranks(self) -> int:
        """Processes to start: one for each GPU unless said."""
        return self.gpus if self.processes is None else self.processes


@dataclass(frozen=True)
class Shape:
    """A model and its batch: `micro` samples at once in fp8 and in bf16."""

    preset: str
    length: int
    micro: dict[str, int]
    tokens_per_gpu: int
    warmup: int
    steps: int
    overrides: tuple[str, ...] = ()
    prefix: str = ""

    def bench(self, precision: str, layout: Layout, gpus: int, *extra: str) -> Case:
        """Litespark's step."""
        words = [*self._words(precision, layout, gpus), "--no-profile"]
        words += [f"model.{word}" for word in self.overrides]
        words += [*layout.overrides(gpus), *extra]
        name = f"{self.prefix}{precision} {layout.name(gpus)}"
        if RECORDED in extra:
            name += " graph"
        return Case(
            name, "bench", gpus, tuple(words), compared_with=f"{self.prefix}{precision} 1 GPU"
        )

    def recorded(self, precision: str, layout: Layout, gpus: int) -> Case:
        """Litespark's step as a CUDA graph, which the timed steps replay."""
        shape = replace(self, warmup=max(self.warmup, RECORDING_WARMUP))
        return shape.bench(precision, layout, gpus, RECORDED)

    def peer(self, precision: str, layout: Layout, gpus: int) -> Case:
        """Megatron-Core's and Transformer Engine's step, in the peer's best configuration."""
        words = [*self._words(precision, layout, gpus), "--no-profile", *layout.peer_options()]
        words += ["--recipe", "delayed", "--fp8-param"] if precision == "fp8" else []
        words += self.overrides
        name = f"{self.prefix}peer {precision} {layout.name(gpus)}"
        return Case(name, "peer", gpus, tuple(words), compared_with=f"peer {precision} 1 GPU")

    def _words(self, precision: str, layout: Layout, gpus: int) -> list[str]:
        micro = self.micro[precision]
        samples = self.tokens_per_gpu * gpus // self.length
        return [
            *("--model", self.preset, "--precision", precision, "--seq-length", str(self.length)),
            *("--micro-batch", str(micro)),
            *("--accumulate", str(max(1, samples // (micro * layout.data(gpus))))),
            *("--warmup", str(self.warmup), "--steps", str(self.steps)),
        ]


PAPER_3B = Shape("paper-3b", 4096, {"fp8": 4, "bf16": 2}, TOKENS_PER_GPU, warmup=2, steps=3)
# Two key/value heads cannot be split over four ranks: TP4 is measured with four of them.
PAPER_3B_4_GROUPS = replace(PAPER_3B, overrides=("num_query_groups=4",), prefix="4 kv heads, ")
PAPER_3B_LONG = replace(
    PAPER_3B,
    length=32768,
    micro={"fp8": 1, "bf16": 1},
    overrides=("max_sequence_length=32768",),
    prefix="s 32768, ",
)
# What overlapping is worth: the same with gradients reduced and weights gathered by themselves.
PAPER_3B_IN_TURN = replace(PAPER_3B, prefix="no overlap, ")
IN_TURN = ("parallel.overlap_param_gather=false", "parallel.overlap_grad_reduce=false")
PAPER_30B = Shape(
    "paper-30b", 4096, {"fp8": 1, "bf16": 1}, 65536, warmup=2, steps=3, prefix="30b, "
)
SMOKE = Shape(
    "paper-3b", 2048, {"fp8": 2, "bf16": 2}, 8192, warmup=1, steps=2, overrides=("num_layers=4",)
)
SMOKE_4_GROUPS = replace(
    SMOKE, overrides=("num_layers=4", "num_query_groups=4"), prefix="4 kv heads, "
)
SMOKE_CPU = Shape("tiny", 64, {"fp32": 1}, 256, warmup=1, steps=1)


def layouts_to_check(gpus: int, *, interleaved: int = 2) -> Iterator[Layout]:
    """Every kind of layout that so many GPUs allow; those that are likely to break first."""
    if gpus >= 4:
        yield Layout(tensor=2, pipeline=2, virtual=interleaved)
        yield Layout(pipeline=4)
        yield Layout(tensor=4)
        yield Layout(tensor=2, context=2)
        yield Layout(context=4)
        yield Layout(tensor=2)
        yield Layout(pipeline=2, virtual=interleaved)
        yield Layout()
        yield Layout(pipeline=4, virtual=interleaved)
    elif gpus >= 2:
        yield Layout(tensor=2)
        yield Layout(pipeline=2, virtual=interleaved)
        yield Layout(context=2)
        yield Layout()


def learning(
    precision: str,
    layout: Layout,
    gpus: int,
    *extra: str,
    preset: str,
    steps: int,
) -> Case:
    """The losses of so many steps on the same samples."""
    length = 512 if preset != "tiny" else 64
    accumulate = LEARNING_SAMPLES // (2 * layout.data(gpus))
    words = [
        *("--model", preset, "--precision", precision, "--seq-length", str(length)),
        *("--micro-batch", "2", "--accumulate", str(accumulate)),
        *("--warmup", "1", "--steps", str(steps - 2)),  # and one under a profiler: `steps` in all
        # So small a rate, reached so late, that differences of rounding do not grow: with 3e-4 from
        # the second step on gradients of norm 33 come in between, and BF16 is off by 9e-3.
        *("optimizer.lr=1e-4", f"schedule.warmup_steps={steps}", "model.num_layers=8"),
        *(["model.num_query_groups=4"] if preset == "tiny" else []),
        *layout.overrides(gpus),
        *extra,
    ]
    name = f"losses {preset} {precision} "
    own = layout.name(gpus) + (" graph" if RECORDED in extra else "")
    return Case(name + own, "losses", gpus, tuple(words), 60.0, compared_with=name + "1 GPU")


def checkpoint(gpus: int, *shape: str) -> Case:
    """Two saves in the background of a data-parallel run, and the steps beside them."""
    words = [
        *("--warmup", "2", "--steps", "20", *shape),
        *Layout().overrides(gpus),
    ]
    return Case(f"checkpoint DP{gpus}", "checkpoint", gpus, tuple(words), 120.0)


def kill(gpus: int, *overrides: str) -> Case:
    """`kill -9` of one rank of `litespark train`, whose launcher restarts it."""
    return Case(f"kill -9 DP{gpus}", "kill", gpus, overrides, 150.0, processes=1)


@dataclass(frozen=True)
class Lane:
    """Cases that run one after the other on the GPUs from `first` on, beside other lanes."""

    first: int
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Phase:
    """Lanes that run at the same time, for at most so large a share of the whole time."""

    lanes: tuple[Lane, ...]
    share: float = 1.0


def _alone(cases: Sequence[Case], share: float = 1.0) -> Phase:
    """Cases one after the other: groups of equal size share their processes."""
    return Phase((Lane(0, tuple(cases)),), share)


def _beside(cases: Sequence[Case], gpus: int, share: float = 1.0) -> Phase:
    """Cases on one GPU each, spread over the GPUs."""
    lanes = (Lane(first, tuple(cases[first::gpus])) for first in range(min(gpus, len(cases))))
    return Phase(tuple(lanes), share)


def smoke(gpus: int, *, has_peer: bool) -> list[Phase]:
    """Every path once, small: do layouts agree, do the measurements run?"""
    model, steps = "llama-160m", 5
    one = Layout()
    kinds = [("fp32", "tiny"), ("bf16", model), ("fp8", model)]
    references = [learning(p, one, 1, preset=preset, steps=steps) for p, preset in kinds]
    phases = [_beside(references, gpus)]
    checks = list(layouts_to_check(gpus))
    several = [
        *(learning("fp32", layout, gpus, preset="tiny", steps=steps) for layout in checks),
        *(learning("bf16", layout, gpus, preset=model, steps=steps) for layout in checks),
        *(learning("fp8", layout, gpus, preset=model, steps=steps) for layout in checks[:4]),
    ]
    wide = Layout(tensor=2, pipeline=2, virtual=2) if gpus >= 4 else Layout(tensor=2)
    several += [SMOKE.bench("fp8", one, gpus), SMOKE.bench("fp8", wide, gpus)]
    several += [SMOKE_4_GROUPS.bench("bf16", Layout(tensor=4), gpus)] if gpus >= 4 else []
    several += [checkpoint(gpus, *SMALL_CHECKPOINT)]
    phases.append(_alone(several, 0.6))
    if has_peer:
        phases.append(_alone([SMOKE.peer("fp8", one, gpus), SMOKE.peer("bf16", wide, gpus)], 0.9))
    phases.append(_alone([kill(gpus)]))
    return phases


SMALL_CHECKPOINT = (
    *("--model", "llama-160m", "--precision", "bf16", "--seq-length", "512"),
    *("--micro-batch", "2", "--accumulate", "2"),
)
BIG_CHECKPOINT = (
    *("--model", "paper-3b", "--precision", "fp8", "--seq-length", "4096", "--micro-batch", "4"),
    *("--accumulate", "2", "model.num_layers=8"),
)


def on_cpu(gpus: int) -> list[Phase]:
    """The same paths with gloo and the smallest model; for tests of this script."""
    one, wide = Layout(), Layout(tensor=2)
    cases = [
        *(learning("fp32", x, n, preset="tiny", steps=3) for x, n in ((one, 1), (wide, gpus))),
        *(SMOKE_CPU.bench("fp32", x, n) for x, n in ((one, 1), (wide, gpus))),
        checkpoint(gpus, "--model", "tiny", "--seq-length", "64", "--accumulate", "1"),
        kill(gpus),
    ]
    return [_alone([replace(case, timeout_seconds=300.0) for case in cases])]


def full(gpus: int, memory_gib: float, *, has_peer: bool) -> list[Phase]:
    """The matrix, the most telling first."""
    one = Layout()
    main, peers, pairs = _on_two() if gpus < 4 else _on_four_or_more(gpus)
    alone = [PAPER_3B.bench(precision, one, 1) for precision in ("fp8", "bf16")]
    # The peer on one GPU takes its own processes: where GPUs would have to be waited for, not.
    alone += [PAPER_3B.peer(p, one, 1) for p in ("fp8", "bf16")] if has_peer and gpus > 2 else []
    alone += [learning(p, one, 1, preset="llama-160m", steps=20) for p in ("bf16", "fp8")]
    losses = [
        learning(precision, layout, gpus, *extra, preset="llama-160m", steps=20)
        for layout in layouts_to_check(gpus)
        for precision, *extra in (("bf16",), ("fp8", RECORDED))
    ]
    phases = [_beside(alone, gpus, 0.28)]
    if gpus == 8 and memory_gib > 100:
        phases.append(_alone(list(_paper_30b()), 0.5))
    phases += [
        _alone(main, 0.66),
        _alone(peers if has_peer else [], 0.82),
        # Nothing is timed here but a restart, in whole seconds.
        Phase((Lane(0, tuple(losses)), Lane(0, (kill(gpus),)))),
    ]
    return [*phases, pairs] if pairs is not None else phases


def _on_two() -> tuple[list[Case], list[Case], Phase | None]:
    """Our cases, the peer's, and what runs on pairs of GPUs side by side."""
    one, split, deep = Layout(), Layout(tensor=2), Layout(pipeline=2, virtual=7)
    main = [
        *(PAPER_3B.bench("fp8", layout, 2) for layout in (one, split, deep)),
        PAPER_3B.recorded("fp8", split, 2),
        PAPER_3B_LONG.bench("fp8", Layout(context=2), 2),
        PAPER_3B_LONG.recorded("fp8", Layout(context=2), 2),
        *(PAPER_3B.bench("bf16", layout, 2) for layout in (one, split)),
        checkpoint(2, *BIG_CHECKPOINT),
        PAPER_3B_IN_TURN.bench("fp8", one, 2, *IN_TURN),
        PAPER_3B.bench("bf16", deep, 2),
    ]
    peers = [PAPER_3B.peer("fp8", layout, 2) for layout in (one, split)]
    return main, [*peers, PAPER_3B.peer("bf16", one, 2)], None


def _on_four_or_more(gpus: int) -> tuple[list[Case], list[Case], Phase | None]:
    one, split, wide = Layout(), Layout(tensor=4), Layout(tensor=2, pipeline=2, virtual=2)
    deep, long = Layout(pipeline=4, virtual=7), Layout(context=4 if gpus == 4 else 2)
    main = [
        *(PAPER_3B.bench("fp8", layout, gpus) for layout in (one, wide)),
        PAPER_3B.recorded("fp8", wide, gpus),
        PAPER_3B_4_GROUPS.bench("fp8", split, gpus),
        PAPER_3B_4_GROUPS.recorded("fp8", split, gpus),
        PAPER_3B.bench("fp8", deep, gpus),
        *(PAPER_3B.bench("bf16", layout, gpus) for layout in (one, wide)),
        PAPER_3B_LONG.bench("fp8", long, gpus),
        PAPER_3B_LONG.recorded("fp8", long, gpus),
        checkpoint(gpus, *BIG_CHECKPOINT),
        PAPER_3B_4_GROUPS.bench("bf16", split, gpus),
        PAPER_3B.bench("bf16", deep, gpus),
        PAPER_3B_IN_TURN.bench("fp8", one, gpus, *IN_TURN),
    ]
    peers = [
        *(PAPER_3B.peer("fp8", layout, gpus) for layout in (one, wide)),
        PAPER_3B_4_GROUPS.peer("fp8", split, gpus),
        *(PAPER_3B.peer("bf16", layout, gpus) for layout in (one, wide)),
    ]
    pairs = [one, Layout(tensor=2), Layout(pipeline=2, virtual=7)]
    fp8, bf16 = ([PAPER_3B.bench(p, layout, 2) for layout in pairs] for p in ("fp8", "bf16"))
    fp8.append(PAPER_3B_LONG.bench("fp8", Layout(context=2), 2))
    return main, peers, Phase((Lane(0, tuple(fp8)), Lane(2, tuple(bf16))))


def _paper_30b() -> Iterator[Case]:
    """Eight GPUs of 139 GiB, no recomputation."""
    for layout in (Layout(tensor=4), Layout(tensor=2, pipeline=4, virtual=5), Layout(tensor=8)):
        for precision in ("fp8", "bf16"):
            yield PAPER_30B.bench(precision, layout, 8)
