"""The peer of `litespark bench --compare peer`: a script of `tools/benchmarks/`, run on its own.

A process of its own, because the peer may need another version of megatron-core, and because its
memory must be free again before our own model is built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import litespark
from litespark.config.schema import RunConfig
from litespark.errors import LitesparkError, UserError

Record = dict[str, Any]

ROOT = Path(litespark.__file__).parents[1]
SCRIPT = ROOT / "tools" / "benchmarks" / "peer_mcore.py"
TIMEOUT_SECONDS = 420.0
_LINES_OF_ERROR = 15

# The best known configuration of Megatron-Core 0.19 with Transformer Engine on one H100, measured
# for `paper-3b` (tools/benchmarks/README.md): scaling recipe, and samples at once.
_BEST: dict[str, tuple[list[str], int]] = {
    "fp8": (["--recipe", "delayed", "--fp8-param"], 4),
    "bf16": ([], 2),
}
_PEERS_MODEL_KEYS = (
    *("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads"),
    *("num_query_groups", "head_dim", "vocab_size", "tie_embeddings"),
)


def check_peer(args: argparse.Namespace, config: RunConfig, world_size: int) -> None:
    """Refuse a comparison that cannot be made, before anything is measured.

    Raises:
        UserError: several processes, no GPU, no checkout, or a precision the peer is not run in.
    """
    if not SCRIPT.is_file():
        raise UserError(
            "--compare peer", f"needs {SCRIPT}, which is not there", "Run it in a checkout."
        )
    if world_size > 1:
        raise UserError(
            "--compare peer",
            f"measures the peer on one GPU, and there are {world_size} processes",
            "Start it without torchrun.",
        )
    if config.precision.mode not in _BEST:
        raise UserError(
            f"--compare peer with precision {config.precision.mode}",
            "has no configuration of the peer to compare with",
            f"Take --precision {' or '.join(_BEST)}.",
        )
    for folder in _peer_folders(args):
        if not folder.is_dir():
            raise UserError(
                f"--peer-pythonpath {args.peer_pythonpath}",
                f"{folder} is no folder",
                "Give existing folders, with ':' between them.",
            )
    from litespark.parallel.device import has_cuda

    if not has_cuda():
        raise UserError("--compare peer", "needs a GPU", "Leave it out on this machine.")


def _peer_folders(args: argparse.Namespace) -> list[Path]:
    return [Path(part) for part in (args.peer_pythonpath or "").split(os.pathsep) if part]


def peer_command(args: argparse.Namespace, config: RunConfig) -> list[str]:
    """The command line that measures the peer: the same work, its own best micro-batch."""
    options, micro_batch = _BEST[config.precision.mode]
    micro_batch = args.peer_micro_batch or micro_batch
    shape = [f"{key}={json.dumps(getattr(config.model, key))}" for key in _PEERS_MODEL_KEYS]
    return [
        *(sys.executable, str(SCRIPT), "--model", str(config.model.preset)),
        *("--precision", config.precision.mode, *options),
        *("--seq-length", str(config.data.sequence_length), "--micro-batch", str(micro_batch)),
        *("--accumulate", str(args.accumulate)),
        *("--warmup", str(args.warmup), "--steps", str(args.steps)),
        *([] if args.profile else ["--no-profile"]),
        *shape,
    ]


def run_peer(args: argparse.Namespace, config: RunConfig) -> Record:
    """Measure the peer in a process of its own; its result, which has the keys of ours.

    Raises:
        LitesparkError: it failed or took too long; the message ends with its last words.
    """
    environment = dict(os.environ)
    paths = [str(folder.resolve()) for folder in _peer_folders(args)]
    if paths:
        own = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([*paths, *([own] if own else [])])
    command = peer_command(args, config)
    sys.stderr.write(f"peer: {' '.join(command[1:])}\n")
    started = time.perf_counter()
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise LitesparkError(f"the peer took more than {TIMEOUT_SECONDS:g} s") from None
    if done.returncode:
        raise LitesparkError(f"the peer failed:\n{_last_lines(done.stderr)}")
    # Libraries print to the same stream; the result is the last line that is an object.
    objects = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not objects:
        raise LitesparkError(f"the peer gave no result:\n{_last_lines(done.stdout)}")
    result = json.loads(objects[-1])
    result["process_seconds"] = time.perf_counter() - started
    return result


def _last_lines(text: str) -> str:
    return "\n".join(text.splitlines()[-_LINES_OF_ERROR:])
