"""`litespark import`: a Hugging Face folder as a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_command
from litespark.errors import ExitCode

_DESCRIPTION = """\
Write the model of a Hugging Face folder (Llama 2 and 3, Mistral, Qwen2, Qwen2.5, dense Qwen3) as a
Litespark checkpoint, from which training starts at any parallel layout:

  litespark train CONFIG.yaml run.init_from=OUT_CHECKPOINT

Training may as well start from the folder itself (run.init_from=HF_DIR), without this step.

The folder is checked before anything is written: missing, unexpected and mis-shaped tensors are
named.  No code from it is run, and pickled weights are refused.  The model is not built: memory
holds one block of 256 MiB.  OUT_CHECKPOINT appears when all of it is on disk; until then it is
OUT_CHECKPOINT.partial, with which --resume goes on.
"""

_EPILOG = """\
examples:
  litespark import models/Qwen3-0.6B imported/qwen3
  litespark generate imported/qwen3 --prompt "Once upon a time"

exit codes: 0 done, 2 the folder, OUT_CHECKPOINT or an option is wrong, 1 anything else (disk full).
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "import",
        summary="write a Hugging Face folder as a checkpoint",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    parser.add_argument(
        "source", metavar="HF_DIR", help="folder with config.json and safetensors; a local one"
    )
    parser.add_argument(
        "out_checkpoint",
        metavar="OUT_CHECKPOINT",
        help="folder to make, which gets `latest` and `step_000000000`; it must not exist, or be "
        "empty",
    )
    add_import_options(parser)
    parser.set_defaults(run=run)


def add_import_options(parser: argparse.ArgumentParser) -> None:
    """Add how to import; `tools/convert_from_hf.py` has the same."""
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="format of the weights (default: the folder's; float32 for float16 and mixtures, "
        "which holds them exactly)",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what an import that was cut short has left in OUT_CHECKPOINT.partial; "
        "the result has the same bytes",
    )
    parser.add_argument(
        "--allow-pickle-weights-only",
        action="store_true",
        help="where there are no safetensors, read pytorch_model*.bin with torch's loader that "
        "builds tensors and nothing else",
    )


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.device import hide_gpu_packages

    hide_gpu_packages()  # before anything imports megatron-core
    from litespark.checkpoint.hf.import_ import Importing, import_hf
    from litespark.cli.progress import byte_bar

    with byte_bar("importing") as bar:
        options = Importing(
            dtype=args.dtype, resume=args.resume, on_begin=bar.begin, on_bytes=bar.advance
        )
        imported = import_hf(
            Path(args.source),
            Path(args.out_checkpoint),
            options,
            allow_pickle=args.allow_pickle_weights_only,
        )
    print(  # noqa: T201
        f"wrote {imported.checkpoint}: {imported.num_parameters:,} parameters, "
        f"{imported.dtype_name}, {imported.num_bytes / 1e6:,.1f} MB, "
        f"{'with' if imported.has_tokenizer else 'without'} tokenizer; weights alone: training "
        f"starts from it with run.init_from={args.out_checkpoint}, a new optimizer and schedule"
    )
    return ExitCode.DONE
