"""Which of cuBLASLt's algorithms computes a kind of product: timed once, kept on disk.

Algorithms sum in different orders, and two that are about as fast change places from one timing to
the next.  A run that is resumed must take those that it had, or it is not, to the last bit, the run
that was never interrupted.  So choices are kept in `~/.cache/litespark/cublaslt.json`:

    "<GPU>, cublasLt <version>, torch <version>, workspace <bytes> | <kind of product>":
        {"index": 2, "milliseconds": [0.31, 0.34, 0.29, null]}

`index` counts the library's proposals, which depend on nothing but what the key says;
`milliseconds` are all their times, null for one that did not run.  A row with another number of
times than the library now has proposals is timed again.

The processes of a node agree, also when they time a kind at the same moment: who writes second
takes the first's choice before its first real product.  Nodes without a common home have a file
each, and may differ.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from litespark.ops.cublaslt_product import Product, layout_of, name_of, operations
from litespark.utils.choice_cache import ChoiceCache


@dataclass(frozen=True)
class AlgorithmChoice:
    """One of the proposed algorithms, by its place, and the times of all in milliseconds.

    A time is infinite where an algorithm did not run.
    """

    index: int
    times_ms: tuple[float, ...]

    @classmethod
    def fastest(cls, times_ms: list[float]) -> AlgorithmChoice:
        """The choice that these times make: the first of the fastest."""
        return cls(min(range(len(times_ms)), key=times_ms.__getitem__), tuple(times_ms))

    @classmethod
    def parse(cls, value: Any, proposals: int) -> AlgorithmChoice | None:
        """The choice among so many proposals that JSON holds; None for anything else."""
        try:
            times = tuple(math.inf if t is None else float(t) for t in value["milliseconds"])
            index = value["index"]
        except (KeyError, OverflowError, TypeError, ValueError):
            return None
        known = type(index) is int and len(times) == proposals and 0 <= index < proposals
        return cls(index, times) if known and 0 <= times[index] < math.inf else None

    def as_json(self) -> dict[str, Any]:
        """What `parse` reads."""
        times = [ms if math.isfinite(ms) else None for ms in self.times_ms]
        return {"index": self.index, "milliseconds": times}

    def ranking(self) -> list[int]:
        """All places: the chosen one, then the others in the order to fall back to."""
        places = range(len(self.times_ms))
        return sorted(places, key=lambda place: (place != self.index, self.times_ms[place]))


class AlgorithmChoices:
    """The choices of this process, and those on disk.

    Args:
        path: finds the file of choices; None where there is no place for one.
        machine: the name of a device and of the versions installed; choices hold for it only.
    """

    def __init__(self, path: Callable[[], Path | None], machine: Callable[[int], str]) -> None:
        self._cache = ChoiceCache(path, "matrix products")
        self._machine = machine

    def choose(
        self, kind: str, device: int, proposals: int, measure: Callable[[], list[float] | None]
    ) -> AlgorithmChoice | None:
        """The choice for a kind of product: the one that is kept, else the fastest, which is kept.

        `measure` returns the proposals' times in order, or None where they cannot be timed: then
        there is no choice.  It is called only where none is kept.
        """
        key = f"{self._machine(device)} | {kind}"
        parse = functools.partial(AlgorithmChoice.parse, proposals=proposals)
        kept = self._cache.find(key, parse)
        if kept is not None:
            return kept
        times = measure()
        if times is None:
            return None
        own = AlgorithmChoice.fastest(times)
        if not math.isfinite(own.times_ms[own.index]):
            return own  # none ran: nothing to remember
        return self._cache.settle(key, own.as_json(), parse) or own


def types_of(product: Product) -> str:
    """The types of a product's operands and output."""
    added = "" if product.add is None else "+ add "
    a, b, out = (name_of(matrix.dtype) for matrix in (product.a, product.b, product.out))
    return f"{a} x {b} {added}-> {out}"


def blas_layout_of(product: Product) -> str:
    """A product's layout in BLAS's letters; "TN": both operands contiguous along k."""
    transa, transb = operations(product.a, product.b)
    return "NT"[transa] + "NT"[transb]


def kind_of(product: Product, alignment: int) -> str:
    """A name of the kind of product; it holds all that the library's proposals depend on."""
    a, b, out, add, scales, fast = product
    matrices: dict[str, Tensor] = {"a": a, "b": b, "out": out}
    if add is not None:
        matrices["add"] = add
    strides = " ".join(f"{name} {layout_of(matrix).ld}" for name, matrix in matrices.items())
    parts = [
        f"{blas_layout_of(product)} m {a.shape[0]} n {b.shape[0]} k {a.shape[1]}",
        types_of(product),
        f"strides {strides}",
        f"alignment {alignment}",
    ]
    if add is not None and add.data_ptr() == out.data_ptr():
        parts.append("in place")
    if scales is not None:
        parts.append("scales")
        parts.extend(["out scale"] if scales.out_scale is not None else [])
        parts.extend(["amax"] if scales.out_amax is not None else [])
    if fast:
        parts.append("fast")
    return ", ".join(parts)
