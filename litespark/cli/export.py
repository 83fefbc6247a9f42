"""`litespark export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from litespark.cli.arguments import add_checkpoint_argument, add_command, open_checkpoint
from litespark.errors import ExitCode

_DESCRIPTION = """\
Write a checkpoint as a folder that Hugging Face's transformers, and what reads its format (vLLM,
llama.cpp's converter, ...), load as LlamaForCausalLM: safetensors of at most 4 GiB each with their
index, config.json, generation_config.json, the tokenizer's files, and a README.md to complete.

The model is not built and no GPU is needed: memory holds one layer and one weight file.  The
tensors are the same, bit for bit, whatever parallel layout trained them; rows that only pad the
vocabulary are left away.  OUT_DIR appears when all of it is on disk.
"""

_EPILOG = """\
examples:
  litespark export runs/tiny exported/tiny
  litespark export runs/tiny/checkpoints/step_000000100 exported/tiny --dtype float32

exit codes: 0 done, 2 the checkpoint, OUT_DIR or an option is wrong, 1 anything else (disk full).
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "export",
        summary="write a checkpoint as a Hugging Face folder",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_checkpoint_argument(parser)
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", help="folder to make; it must not exist, or be empty"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="format of the weights (default: the checkpoint's: bfloat16 for bf16 runs, float32 "
        "for fp32 runs)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer folder or file to ship (default: the run's data.tokenizer; when that is "
        "gone, a warning and no tokenizer files)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.device import hide_gpu_packages

    hide_gpu_packages()  # before anything imports megatron-core
    from litespark.checkpoint.hf.export import export_checkpoint
    from litespark.training.single import single_process

    checkpoint = open_checkpoint(args)
    with single_process():
        exported = export_checkpoint(
            checkpoint, Path(args.out_dir), dtype=args.dtype, tokenizer=args.tokenizer
        )
    print(  # noqa: T201
        f"wrote {exported.folder}: {exported.num_parameters:,} parameters in "
        f"{exported.num_tensors} tensors, {exported.dtype_name}, "
        f"{exported.num_bytes / 1e6:,.1f} MB in {len(exported.weight_files)} file(s), "
        f"{'with' if exported.has_tokenizer else 'without'} tokenizer, from {checkpoint}"
    )
    return ExitCode.DONE
