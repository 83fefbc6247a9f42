"""`litespark import`: a Hugging Face folder, or Megatron-LM's checkpoint, as a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_command, add_verify_arguments
from litespark.errors import ExitCode, UserError

if TYPE_CHECKING:
    from litespark.checkpoint.hf.import_ import ImportedModel, Importing

_DESCRIPTION = """\
Write the model of a Hugging Face folder (Llama 2 and 3, Mistral, Qwen2, Qwen2.5, dense Qwen3) as a
Litespark checkpoint, from which training starts at any parallel layout:

  litespark train CONFIG.yaml run.init_from=OUT_CHECKPOINT

Training may as well start from the folder itself (run.init_from=HF_DIR), without this step.

The folder is checked before anything is written: missing, unexpected and mis-shaped tensors are
named.  No code from it is run, and pickled weights are refused.  The model is not built: memory
holds one block of 256 MiB.  OUT_CHECKPOINT appears when all of it is on disk; until then it is
OUT_CHECKPOINT.partial, with which --resume goes on.

--from megatron reads a torch_dist checkpoint of a GPT that Megatron-LM wrote, weights only.
"""

_EPILOG = """\
examples:
  litespark import models/Qwen3-0.6B imported/qwen3 --verify
  litespark generate imported/qwen3 --prompt "Once upon a time"
  litespark import --from megatron checkpoints/llama imported/llama

exit codes: 0 done, 2 the source, OUT_CHECKPOINT or an option is wrong, 1 anything else (disk full,
--verify found another model).
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
        "source", metavar="SOURCE", help="folder with config.json and safetensors; a local one"
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
        "--from",
        dest="kind",
        choices=("hf", "megatron"),
        default="hf",
        help="what SOURCE is: a Hugging Face folder (default), or the folder of Megatron-LM's "
        "torch_dist checkpoints or of one iteration",
    )
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="with --from megatron: a Litespark configuration whose `model` is the shape (default: "
        "the arguments in the checkpoint, where they are plain data)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="format of the weights (default: the source's; float32 for float16 and mixtures, "
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
    add_verify_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.device import prepare_megatron

    _check_options(args)
    prepare_megatron()  # before anything imports megatron-core
    from litespark.checkpoint.hf.import_ import Importing
    from litespark.cli.progress import byte_bar

    with byte_bar("importing") as bar:
        options = Importing(
            dtype=args.dtype, resume=args.resume, on_begin=bar.begin, on_bytes=bar.advance
        )
        imported = _import(args, options)
    print(  # noqa: T201
        f"wrote {imported.checkpoint}: {imported.num_parameters:,} parameters, "
        f"{imported.dtype_name}, {imported.num_bytes / 1e6:,.1f} MB, "
        f"{'with' if imported.has_tokenizer else 'without'} tokenizer; weights alone: training "
        f"starts from it with run.init_from={args.out_checkpoint}, a new optimizer and schedule"
    )
    if args.verify:
        from litespark.checkpoint.hf.verify import verify
        from litespark.training.single import single_process

        with single_process():
            result = verify(
                imported.checkpoint,
                Path(args.source),
                Path(args.out_checkpoint),
                text_file=Path(args.verify_text) if args.verify_text else None,
                allow_pickle=args.allow_pickle_weights_only,
            )
        print(result.describe())  # noqa: T201
    return ExitCode.DONE


def _check_options(args: argparse.Namespace) -> None:
    if args.kind == "megatron" and args.verify:
        raise UserError(
            "--verify", "compares with a Hugging Face folder", "Export with --verify instead."
        )
    if args.kind == "hf" and args.config is not None:
        raise UserError(
            f"--config {args.config}", "is for --from megatron", "Leave it out: config.json counts."
        )


def _import(args: argparse.Namespace, options: Importing) -> ImportedModel:
    from litespark.checkpoint.hf.import_ import import_hf, write_checkpoint

    source, out_dir = Path(args.source), Path(args.out_checkpoint)
    if args.kind == "hf":
        return import_hf(source, out_dir, options, allow_pickle=args.allow_pickle_weights_only)
    from litespark.checkpoint.megatron import open_megatron
    from litespark.config.load import load_config
    from litespark.training.single import single_process

    model = None if args.config is None else load_config(args.config).model
    with single_process():
        return write_checkpoint(open_megatron(source, model), out_dir, options)
