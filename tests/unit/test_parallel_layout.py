"""The grid of processes, against itself and against megatron-core's groups."""

from __future__ import annotations

from megatron.core.parallel_state import RankGenerator

from litespark.parallel.layout import Coordinates, RankLayout


def test_ranks_and_places_are_inverse():
    layout = RankLayout(tensor=2, context=3, data=5, pipeline=4)
    places = [place for _, place in layout.table()]
    assert len(set(places)) == layout.world_size == 120
    assert [layout.rank(place) for place in places] == list(range(120))
    assert layout.coordinates(1) == Coordinates(tensor=1, context=0, data=0, pipeline=0)


def test_order_is_that_of_megatron_core():
    layout = RankLayout(tensor=2, context=2, data=3, pipeline=2)
    generator = RankGenerator(tp=2, ep=1, dp=3, pp=2, cp=2, order="tp-cp-ep-dp-pp")
    for axis, letters in (("tensor", "tp"), ("context", "cp"), ("data", "dp"), ("pipeline", "pp")):
        for group in generator.get_ranks(letters):
            places = [layout.coordinates(rank) for rank in group]
            # Within a group only this axis varies, and in order.
            assert [getattr(place, axis) for place in places] == list(range(len(group)))
            others = {"tensor", "context", "data", "pipeline"} - {axis}
            assert len({tuple(getattr(place, other) for other in others) for place in places}) == 1
