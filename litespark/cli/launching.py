"""The options by which a command starts its processes, here and on other machines."""

from __future__ import annotations

import argparse
import logging
import os
from dataclasses import dataclass
from pathlib import Path

from litespark.config.schema import RunConfig
from litespark.config.validate import check_config, validate
from litespark.errors import UserError
from litespark.parallel.environment import world_size_from_environment
from litespark.parallel.nodes import NodeOptions, parse_endpoint, parse_node_range

logger = logging.getLogger("litespark.launch")

# What a launcher of nodes (the Kubeflow operator, say) sets in every container; of a rank's
# environment only LOCAL_RANK is missing there.
_NODE_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchOptions:
    """Who starts the processes: a launcher has (`is_rank`), this command does, or there is one."""

    is_rank: bool
    num_processes: int
    world_size: int
    max_restarts: int
    nodes: NodeOptions | None

    @property
    def starts_processes(self) -> bool:
        """Whether this command is not the one process of the run."""
        return not self.is_rank and (
            self.world_size > 1 or self.max_restarts > 0 or self.nodes is not None
        )


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --nproc and the options for several machines, with torchrun's names."""
    parser.add_argument(
        "--nproc",
        type=int,
        metavar="N",
        help="start N processes on this machine (default: one, in this process); under torchrun "
        "the processes are there already and --nproc is not given",
    )
    several = parser.add_argument_group(
        "several machines", "The same command is typed on every node; see docs/multi_node.md."
    )
    several.add_argument(
        "--nnodes",
        metavar="N|MIN:MAX",
        help="how many nodes run together; with MIN:MAX and --max-restarts the run goes on with "
        "fewer when one is lost, and takes it in again, the global batch unchanged",
    )
    several.add_argument(
        "--rdzv-endpoint",
        metavar="HOST[:PORT]",
        help="the node where all meet, the same on every node (default port: 29500)",
    )
    several.add_argument(
        "--node-rank",
        type=int,
        metavar="R",
        help="this node's number, 0 to N-1 (default: the nodes are numbered in the order of their "
        "names)",
    )
    several.add_argument(
        "--local-addr",
        metavar="ADDRESS",
        help="this node's address for the others (default: that of the route to the endpoint)",
    )
    several.add_argument(
        "--rdzv-id",
        default="litespark",
        metavar="ID",
        help="name of the job, where several meet on one port (default: litespark)",
    )
    several.add_argument(
        "--join-timeout",
        type=float,
        default=600.0,
        metavar="SECONDS",
        help="how long to wait for the other nodes (default: 600)",
    )
    several.add_argument(
        "--lost-after",
        type=float,
        default=60.0,
        metavar="SECONDS",
        help="give a node up when nothing has been heard of it for so long (default: 60)",
    )


def add_restarts_argument(parser: argparse.ArgumentParser) -> None:
    """Add --max-restarts, for what can go on where it was."""
    parser.add_argument(
        "--max-restarts",
        type=int,
        default=0,
        metavar="N",
        help="with --nproc: after a fault (a lost rank or node, a hang) start again up to N times, "
        "from the newest checkpoint (default: 0); under torchrun give it torchrun's",
    )


def launch_options(args: argparse.Namespace) -> LaunchOptions:
    """What the arguments and the environment say together.

    Raises:
        UserError: they contradict each other.
    """
    nodes = _node_options(args)
    if nodes is not None and "LOCAL_RANK" not in os.environ:
        for name in _NODE_VARIABLES:
            os.environ.pop(name, None)
        # Read when torch is imported.  At WARNING its sockets tell with a page of frames that the
        # node where all meet has ended, and at every connection that DNS has no name for it.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    launched = world_size_from_environment()
    if args.nproc is not None and args.nproc < 1:
        raise UserError(f"--nproc {args.nproc}", "is no number of processes", "Give 1 or more.")
    for option, given in (("--nproc", args.nproc), ("--nnodes", args.nnodes)):
        if given is not None and launched is not None:
            raise UserError(
                f"{option} {given}",
                f"a launcher has started {launched} processes already (WORLD_SIZE is set)",
                f"Leave out {option} under torchrun.",
            )
    max_restarts = getattr(args, "max_restarts", 0)
    if max_restarts < 0 or (max_restarts and launched is not None):
        raise UserError(
            f"--max-restarts {max_restarts}",
            "is a number of restarts by this command, which starts the processes itself"
            if launched is None
            else "is for the launcher that has started this process",
            "Give 0 or more." if launched is None else "Give it to torchrun.",
        )
    num_processes = args.nproc or 1
    return LaunchOptions(
        is_rank=launched is not None,
        num_processes=num_processes,
        world_size=launched or num_processes * (1 if nodes is None else nodes.minimum),
        max_restarts=max_restarts,
        nodes=nodes,
    )


def _node_options(args: argparse.Namespace) -> NodeOptions | None:
    if args.nnodes is None:
        for option, value in (
            ("--rdzv-endpoint", args.rdzv_endpoint),
            ("--node-rank", args.node_rank),
            ("--local-addr", args.local_addr),
        ):
            if value is not None:
                raise UserError(
                    f"{option} {value}", "is for several nodes", "Give --nnodes as well."
                )
        return None
    minimum, maximum = parse_node_range(args.nnodes)
    if args.rdzv_endpoint is None:
        raise UserError(
            f"--nnodes {args.nnodes}",
            "says how many nodes, not where they meet",
            "Give --rdzv-endpoint HOST[:PORT] as well, the same on every node.",
        )
    host, port = parse_endpoint(args.rdzv_endpoint)
    if args.node_rank is not None and (minimum < maximum or not 0 <= args.node_rank < maximum):
        raise UserError(
            f"--node-rank {args.node_rank}",
            "has no meaning where the number of nodes changes"
            if minimum < maximum
            else f"is no number of one of {maximum} nodes",
            "Leave it out." if minimum < maximum else f"Number them from 0 to {maximum - 1}.",
        )
    if not args.join_timeout > 0:
        raise UserError(
            f"--join-timeout {args.join_timeout:g}", "is no time to wait", "Give seconds above 0."
        )
    if not args.lost_after >= 12:
        raise UserError(
            f"--lost-after {args.lost_after:g}",
            "is too short for 12 heartbeats",
            "Give 12 or more.",
        )
    return NodeOptions(
        minimum=minimum,
        maximum=maximum,
        host=host,
        port=port,
        run_id=args.rdzv_id,
        node_rank=args.node_rank,
        address=args.local_addr,
        join_seconds=args.join_timeout,
        lost_seconds=args.lost_after,
    )


def start(how: LaunchOptions, arguments: list[str], folder: Path) -> int:
    """Start the processes of this machine and wait for their end; returns the exit code.

    `folder` is the run's, whose events.jsonl says how the ranks ended.

    Raises:
        UserError: the nodes cannot meet as they were told to.
        LitesparkError: the others cannot be reached, or did not come.
    """
    if how.nodes is None:
        from litespark.training.launch import launch

        return launch(how.world_size, arguments, folder, max_restarts=how.max_restarts)
    from litespark.training.agent import run_node

    return run_node(how.nodes, how.num_processes, arguments, folder, max_restarts=how.max_restarts)


def check_restarts(config: RunConfig, how: LaunchOptions) -> None:
    """Whether the run can be started again, at all numbers of nodes that may be left.

    The fewest have been checked by then; numbers between them and the most get a warning.

    Raises:
        UserError: all that is wrong with the most, or `run.resume` forbids it.
    """
    if how.nodes is None:
        return
    if how.max_restarts and config.run.resume == "never":
        raise UserError(
            "run.resume = never",
            f"lets no restart go on, and --max-restarts is {how.max_restarts}",
            "Leave it out, or --max-restarts.",
        )
    nodes, num_processes = how.nodes, how.num_processes
    check_config(config, nodes.maximum * num_processes)
    impossible = [
        count
        for count in range(nodes.minimum + 1, nodes.maximum)
        if validate(config, count * num_processes)
    ]
    if impossible:
        logger.warning(
            "with %s nodes this run cannot go on (batch.global = %d samples must divide by "
            "batch.micro = %d x the data-parallel size): a restart at such a number ends it",
            ", ".join(map(str, impossible)),
            config.batch.global_,
            config.batch.micro,
        )
