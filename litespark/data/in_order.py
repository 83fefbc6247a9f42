"""Work shared among processes, its results in the order of what went in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

# Enough that a process finds the next one while the parent writes; few, so that memory is bounded.
IN_FLIGHT_PER_WORKER = 3


def results_in_order(
    pool: Executor,
    work: Callable[[Item], Result],
    items: Iterable[Item],
    num_workers: int,
    in_flight: Iterable[tuple[Item, Future[Result]]] = (),
) -> Iterator[tuple[Item, Result]]:
    """Yield each item with its result, whichever is done first.

    Args:
        pool: of `num_workers`.
        work: what a worker does with an item.
        items: taken as their turn comes.
        num_workers: few times as many items are out at a time.
        in_flight: items that are out already, before `items`.
    """
    out = deque(in_flight)
    for item in items:
        out.append((item, pool.submit(work, item)))
        if len(out) >= num_workers * IN_FLIGHT_PER_WORKER:
            waiting, future = out.popleft()
            yield waiting, future.result()
    while out:
        waiting, future = out.popleft()
        yield waiting, future.result()
