"""`litespark export`: a checkpoint as a Hugging Face folder."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from litespark.cli.arguments import (
    add_checkpoint_argument,
    add_command,
    add_verify_arguments,
    open_checkpoint,
)
from litespark.errors import ExitCode, UserError

_DESCRIPTION = """\
Write a checkpoint as a folder that Hugging Face's transformers, and what reads its format (vLLM,
llama.cpp's converter, ...), load: Llama, Mistral, Qwen2 or Qwen3, as the model is. safetensors of
at most 4 GiB each with their index, config.json, generation_config.json, the tokenizer's files with
the chat template, a README.md to complete, and manifest.json with size and SHA-256 of each file.

The model is not built and no GPU is needed: memory holds one tensor of a layer, or one piece of
the embedding.  The tensors are the same, bit for bit, whatever parallel layout trained them; rows
that only pad the vocabulary are left away.  OUT_DIR appears when all of it is on disk; until then
it is OUT_DIR.partial, with which --resume goes on.
"""

_EPILOG = """\
examples:
  litespark export runs/tiny exported/tiny --verify
  litespark export runs/tiny/checkpoints/step_000000100 exported/tiny --dtype float32

exit codes: 0 done, 2 the checkpoint, OUT_DIR or an option is wrong, 1 anything else (disk full,
--verify found another model).
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
    add_export_options(parser)
    parser.set_defaults(run=run)


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """Add how to export; `tools/convert_to_hf.py` has the same."""
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
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on with what an export that was cut short has left in OUT_DIR.partial; the "
        "result has the same bytes",
    )
    parser.add_argument(
        "--adapter",
        action="store_true",
        help="of a run with lora: write the adapters alone, as a folder that peft loads (default: "
        "the whole model with the adapters merged)",
    )
    add_verify_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.device import prepare_megatron

    prepare_megatron()  # before anything imports megatron-core
    from litespark.checkpoint.hf.export import Exporting, export_checkpoint
    from litespark.cli.progress import byte_bar
    from litespark.training.single import single_process

    checkpoint = open_checkpoint(args)
    if args.adapter:
        return _export_adapter(args, checkpoint)
    with single_process(), byte_bar("exporting") as bar:
        options = Exporting(
            dtype=args.dtype,
            tokenizer=args.tokenizer,
            resume=args.resume,
            on_begin=bar.begin,
            on_bytes=bar.advance,
        )
        exported = export_checkpoint(checkpoint, Path(args.out_dir), options)
    print(  # noqa: T201
        f"wrote {exported.folder}: {exported.architecture}, {exported.num_parameters:,} parameters "
        f"in {exported.num_tensors} tensors, {exported.dtype_name}, "
        f"{exported.num_bytes / 1e6:,.1f} MB in {len(exported.weight_files)} file(s), "
        f"{'with' if exported.has_tokenizer else 'without'} tokenizer, from {checkpoint}"
    )
    if args.verify:
        from litespark.checkpoint.hf.verify import verify

        text_file = Path(args.verify_text) if args.verify_text else None
        with single_process():
            result = verify(checkpoint, exported.folder, exported.folder, text_file=text_file)
        print(result.describe())  # noqa: T201
    return ExitCode.DONE


def _export_adapter(args: argparse.Namespace, checkpoint: Path) -> int:
    from litespark.checkpoint.hf.adapters import export_adapter
    from litespark.training.single import single_process

    for option, given in (
        ("--dtype", args.dtype),
        ("--tokenizer", args.tokenizer),
        ("--resume", args.resume),
        ("--verify", args.verify),
    ):
        if given:
            raise UserError(option, "has no effect with --adapter", "Leave it out.")
    with single_process():
        count = export_adapter(checkpoint, Path(args.out_dir))
    print(f"wrote {args.out_dir}: adapters of {count:,} parameters, from {checkpoint}")  # noqa: T201
    return ExitCode.DONE
