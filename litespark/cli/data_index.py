"""`litespark data index`: builds the sample indices of a run before it needs them."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command, add_config_arguments
from litespark.config.load import load_config
from litespark.config.schema import RunConfig
from litespark.errors import ExitCode, UserError
from litespark.utils.processes import available_cores

if TYPE_CHECKING:
    from litespark.data.blend import Blend
    from litespark.data.sample_index import FoundOrder, OrderRequest

_MOST_WORKERS = 8  # each holds some 40 bytes a document while it builds

_DESCRIPTION = """\
Build the sample index of every corpus and epoch that a run will read, so that no GPU waits for it.
What is there already is checked, with its checksum, and kept.  A run works without this command:
its first process to need an index builds it, and the others wait.
"""

_EPILOG = """\
examples:
  litespark data index run.yaml
  litespark data index run.yaml --epochs 2 data.index_cache=/shared/index

exit codes: 0 all are there, 2 the configuration or the data is wrong or no folder can be written.
"""


def add_index_parser(actions: Any) -> None:
    """Add the parser of `index` to those of `litespark data`."""
    parser = add_command(
        actions,
        "index",
        summary="build a run's sample indices ahead of time",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_config_arguments(parser)
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help="build N epochs of each corpus (default: those that the run's steps reach)",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(available_cores(), _MOST_WORKERS),
        metavar="N",
        help="indices built at the same time (default: %(default)s)",
    )
    parser.set_defaults(run=run_index)


def run_index(args: argparse.Namespace) -> int:
    """Build what is missing, a line for each index; return the exit code.

    Raises:
        UserError: the configuration or the data is wrong, or an index cannot be written.
    """
    from concurrent.futures import ThreadPoolExecutor, as_completed

    from litespark.data.blend import packing_lines
    from litespark.data.sample_index import IndexCache
    from litespark.training.preflight import open_data

    for option, value in (("--epochs", args.epochs), ("--workers", args.workers)):
        if value is not None and value < 1:
            raise UserError(f"{option} {value}", "is not a positive number", "Give 1 or more.")
    config = load_config(args.config, args.overrides)
    if config.task != "pretrain":
        raise UserError(
            f"task = {config.task}",
            "packs whole conversations, in memory, and has no sample index",
            "Start the run without one.",
        )
    blends = open_data(config)
    for line in packing_lines(blends):
        sys.stdout.write(f"{line}\n")
    requests = _requests(config, blends, args.epochs)
    cache = IndexCache(config.data.index_cache)

    def find(request: OrderRequest) -> tuple[FoundOrder, float]:
        started = time.perf_counter()
        return cache.find(request), time.perf_counter() - started

    # Threads are enough: NumPy's sorting, the checksums and the writing let others run meanwhile.
    pool = ThreadPoolExecutor(args.workers)
    try:
        futures = [pool.submit(find, request) for request in requests]
        for done, future in enumerate(as_completed(futures), start=1):
            found, seconds = future.result()
            if found.path is None:
                raise UserError(
                    "data.index_cache",
                    f"cannot keep the sample index ({found.problem})",
                    "Give a folder that can be written to, with room for it.",
                )
            size_mb = found.path.stat().st_size / 1e6
            sys.stdout.write(
                f"[{done}/{len(futures)}] {found.path}: {found.how}, {size_mb:.1f} MB, "
                f"{seconds:.1f} s\n"
            )
            sys.stdout.flush()
    finally:
        pool.shutdown(cancel_futures=True)
    return ExitCode.DONE


def _requests(
    config: RunConfig, blends: tuple[Blend, Blend | None], epochs: int | None
) -> list[OrderRequest]:
    """One request for each epoch of each corpus that the run reads."""
    steps = (config.total_steps, config.training.eval_steps)
    requests = []
    for blend, blend_steps in zip(blends, steps, strict=True):
        if blend is None:
            continue
        used = blend.samples_used(blend_steps * config.batch.global_)
        for corpus, samples in zip(blend.corpora, used, strict=True):
            reached = -(-samples // corpus.samples_per_epoch)
            requests += [corpus.order_request(e) for e in range(epochs or reached)]
    return requests
