"""How long messages between GPUs take, and how much of it computation hides.

Rates are what NCCL's collectives reach ("bus bandwidth": what every GPU sends and receives at
once), not what a data sheet says.  A ring over n ranks moves (n - 1)/n of a buffer through every
link for a gather or a reduce-scatter, twice that for an all-reduce, in n - 1 hops, each with its
latency; for small messages between many ranks NCCL takes a tree, of 2 log2 n hops for an
all-reduce.  Source: NCCL tests, doc/PERFORMANCE.md; Thakur et al. 2005, sections 3 and 4.

Ranks are numbered with tensor fastest, then context, data, pipeline (`parallel/layout.py`), so the
groups whose strides fit into one node use NVLink and the others the network.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from litespark.config.schema import RunConfig
from litespark.errors import UserError
from litespark.metering.plan.activations import RankShape
from litespark.metering.plan.parameters import model_elements

_GRADIENT, _WEIGHT = 4, 2  # bytes that travel: fp32 sums, bf16 weights
_OVERLAP_SHARE = 0.9  # of the passes beside which data-parallel messages travel
# Products that run beside a message lose some of the GPU's processors to it.
_CONTENTION = 0.15


@dataclass(frozen=True)
class Network:
    """Links of a cluster; rates in bytes a second and GPU, latencies in seconds a hop.

    `link_bytes_per_second` is NVLink's within a node, `nic_bytes_per_second` the network's for each
    GPU of a node.
    """

    name: str
    gpus_per_node: int = 8
    link_bytes_per_second: float = 360e9
    nic_bytes_per_second: float = 46e9
    link_latency_seconds: float = 3e-6
    nic_latency_seconds: float = 15e-6
    launch_seconds: float = 8e-6


# 400 Gbit/s for each GPU in both; what NCCL's all-reduce reaches of 50 GB/s over many nodes.
NETWORKS = {
    "infiniband": Network("infiniband", nic_bytes_per_second=46e9, nic_latency_seconds=10e-6),
    "efa": Network("efa", nic_bytes_per_second=38e9, nic_latency_seconds=25e-6),
}


@dataclass(frozen=True)
class Exchange:
    """Seconds that a layer's forward and backward wait for messages."""

    forward: float
    backward: float


def network_of(name: str, gpus_per_node: int) -> Network:
    """A known network with nodes of so many GPUs.

    Raises:
        UserError: the name is not known.
    """
    if name not in NETWORKS:
        raise UserError(f"--network {name}", "is not known", f"Give one of {', '.join(NETWORKS)}.")
    known = NETWORKS[name]
    return Network(
        known.name,
        gpus_per_node,
        nic_bytes_per_second=known.nic_bytes_per_second,
        nic_latency_seconds=known.nic_latency_seconds,
    )


def gather_seconds(num_bytes: float, ranks: int, stride: int, network: Network) -> float:
    """An all-gather to, or a reduce-scatter of, `num_bytes` in all over `ranks` at a stride."""
    if ranks == 1:
        return 0.0
    rate, hop = _link(ranks, stride, network)
    return network.launch_seconds + (ranks - 1) / ranks * num_bytes / rate + (ranks - 1) * hop


def reduce_seconds(num_bytes: float, ranks: int, stride: int, network: Network) -> float:
    """An all-reduce of `num_bytes`: as a ring or as a tree, whichever is faster."""
    if ranks == 1:
        return 0.0
    rate, hop = _link(ranks, stride, network)
    ring = 2 * (ranks - 1) / ranks * num_bytes / rate + 2 * (ranks - 1) * hop
    tree = 2 * num_bytes / rate + 2 * math.ceil(math.log2(ranks)) * hop
    return network.launch_seconds + min(ring, tree)


def _link(ranks: int, stride: int, network: Network) -> tuple[float, float]:
    """Bytes a second and the latency of a hop in a group.

    A group that spans nodes goes through the adapters of the GPUs that it has in each; all the
    groups beside it do the same at the same time.
    """
    if ranks * stride <= network.gpus_per_node:
        return network.link_bytes_per_second, network.link_latency_seconds
    in_node = max(1, network.gpus_per_node // stride)
    rate = min(network.link_bytes_per_second, network.nic_bytes_per_second * in_node)
    # Of the hops only those from node to node go through the network.
    share = 1 / min(in_node, ranks)
    hop = share * network.nic_latency_seconds + (1 - share) * network.link_latency_seconds
    return rate, hop


def tensor_seconds(config: RunConfig, network: Network, *, fp8: bool) -> Exchange:
    """Messages of one layer between tensor-parallel ranks.

    With sequence parallelism both blocks gather their input and scatter their output; backward
    gathers the gradient, and the input again, and scatters the input's gradient, which hides behind
    the weight's (`modules/exchange.py`).  Otherwise both passes sum over ranks twice.
    """
    parallel, shape = config.parallel, RankShape.of(config)
    if parallel.tensor == 1:
        return Exchange(0.0, 0.0)
    half = 2.0 * shape.tokens * shape.hidden
    if not shape.splits_tokens:
        both = 2 * reduce_seconds(half, parallel.tensor, 1, network)
        return Exchange(both, both * _CONTENTION)
    operand = half / 2 if fp8 and config.precision.recipe == "delayed" else half
    gather = gather_seconds(operand, parallel.tensor, 1, network)
    scatter = gather_seconds(half, parallel.tensor, 1, network)
    # The projection's input gradient and the two norms' linears' inputs are gathered in backward.
    return Exchange(2 * (gather + scatter), 4 * gather + 2 * _CONTENTION * scatter)


def context_seconds(config: RunConfig, network: Network) -> Exchange:
    """Keys and values of one layer gathered over the context-parallel ranks, and their gradients
    scattered."""
    parallel, shape = config.parallel, RankShape.of(config)
    if parallel.context == 1:
        return Exchange(0.0, 0.0)
    everything = 2.0 * shape.tokens * parallel.context * shape.groups
    one = gather_seconds(everything, parallel.context, parallel.tensor, network)
    return Exchange(2 * one, 2 * one)


def pipeline_seconds(config: RunConfig, network: Network) -> float:
    """What a micro-batch waits for between stages: both passes, both neighbours.

    The interleaved schedule sends while it computes; a part of what it sends more often remains.
    """
    parallel, shape = config.parallel, RankShape.of(config)
    if parallel.pipeline == 1:
        return 0.0
    num_bytes = 2.0 * shape.split_tokens * shape.hidden
    one = network.launch_seconds + network.nic_latency_seconds
    one += num_bytes / network.nic_bytes_per_second
    if parallel.virtual_pipeline == 1:
        return 2 * one
    return 2 * one * parallel.virtual_pipeline * _CONTENTION


def data_seconds(
    config: RunConfig, world_size: int, network: Network, window_seconds: float
) -> float:
    """Gradients summed and weights gathered over the data-parallel ranks, as far as it is seen.

    With the overlaps switched on, the sums travel while the last micro-batch goes backward, and the
    weights while the first goes forward; without, after the passes.

    Args:
        config: the run.
        world_size: processes in all.
        network: the links.
        window_seconds: of the passes of one micro-batch.
    """
    parallel = config.parallel
    ranks = config.data_parallel_size(world_size) * parallel.context
    if ranks == 1:
        return 0.0
    held = model_elements(config, world_size, 0)
    elements, weight_bytes = held.buffer, _WEIGHT * held.buffer - held.fp8_buffer
    if not parallel.distributed_optimizer:
        whole = reduce_seconds(_GRADIENT * elements, ranks, parallel.tensor, network)
        return _seen(whole, window_seconds * 2 / 3, hidden=parallel.overlap_grad_reduce)
    scatter = gather_seconds(_GRADIENT * elements, ranks, parallel.tensor, network)
    gather = gather_seconds(weight_bytes, ranks, parallel.tensor, network)
    return _seen(scatter, window_seconds * 2 / 3, hidden=parallel.overlap_grad_reduce) + _seen(
        gather, window_seconds / 3, hidden=parallel.overlap_param_gather
    )


def _seen(seconds: float, window: float, *, hidden: bool) -> float:
    """What remains of a message beside a pass of `window` seconds, which it slows down a little."""
    if not hidden:
        return seconds
    beside = min(seconds, _OVERLAP_SHARE * window)
    return seconds - beside + _CONTENTION * beside
