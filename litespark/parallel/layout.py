"""The grid of processes, as pure arithmetic.

A rank is a number in mixed base: tensor-parallel rank varies fastest (its traffic is the heaviest,
so neighbours on one machine share it), then context, then data, then pipeline.  This is
megatron-core's order `tp-cp-ep-dp-pp`; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from litespark.config.schema import ParallelConfig


@dataclass(frozen=True)
class Coordinates:
    """Place of one process in the grid; each value counts from 0."""

    tensor: int
    context: int
    data: int
    pipeline: int


@dataclass(frozen=True)
class RankLayout:
    """Sizes of the four axes of the process grid."""

    tensor: int
    context: int
    data: int
    pipeline: int

    @classmethod
    def of(cls, parallel: ParallelConfig, world_size: int) -> RankLayout:
        """The layout of `world_size` processes; the degrees must divide it (see `validate`)."""
        model_ranks = parallel.tensor * parallel.context * parallel.pipeline
        return cls(
            tensor=parallel.tensor,
            context=parallel.context,
            data=world_size // model_ranks,
            pipeline=parallel.pipeline,
        )

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tensor * self.context * self.data * self.pipeline

    def coordinates(self, rank: int) -> Coordinates:
        """Place of a global rank."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor=tensor, context=context, data=data, pipeline=pipeline)

    def rank(self, place: Coordinates) -> int:
        """Global rank of a place; the inverse of `coordinates`."""
        rank = place.pipeline * self.data + place.data
        rank = rank * self.context + place.context
        return rank * self.tensor + place.tensor

    def table(self) -> Iterator[tuple[int, Coordinates]]:
        """Every global rank with its place."""
        for rank in range(self.world_size):
            yield rank, self.coordinates(rank)

    def describe(self) -> str:
        """Short name such as `TP2 x CP1 x DP2 x PP2`."""
        return f"TP{self.tensor} x CP{self.context} x DP{self.data} x PP{self.pipeline}"
