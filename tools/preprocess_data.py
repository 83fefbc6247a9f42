"""`litespark preprocess` under Megatron-LM's flag names, for scripts that know them.

    python tools/preprocess_data.py --input a.jsonl --output-prefix data/a --workers 8 \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model --append-eod

Differences from Megatron-LM's tool: documents are ended with the end-of-text token unless
--no-append-eod is given; no BOS is added, whatever the tokenizer type, unless --prepend-bos is
given; --partitions is accepted
and has no effect, because workers already share each file.

The litespark package must be installed, as `make install` does into .venv: activate that, or start
the tool with .venv/bin/python.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from litespark.cli.exits import run_command
from litespark.cli.preprocess import add_common_arguments, options_from, run_options
from litespark.errors import UserError

# Megatron-LM's names of the two kinds of tokenizer that litespark reads, and the file of each.
_FILE_OF_TYPE = {
    "HuggingFaceTokenizer": "tokenizer.json",
    "SentencePieceTokenizer": "tokenizer.model",
    "Llama2Tokenizer": "tokenizer.model",
}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this tool."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--tokenizer-model",
        "--tokenizer",
        dest="tokenizer",
        required=True,
        metavar="DIR_OR_MODEL",
        help="a tokenizer.json, a tokenizer.model, a tekken.json, or a folder with one of them; "
        "local files only",
    )
    parser.add_argument(
        "--tokenizer-type",
        metavar="TYPE",
        help=f"one of {', '.join(_FILE_OF_TYPE)}; default: what the file is",
    )
    parser.add_argument(
        "--json-keys",
        "--json-key",
        dest="json_keys",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="keys of the text in each object, one shard each (default: text)",
    )
    parser.add_argument(
        "--partitions",
        type=int,
        default=1,
        metavar="N",
        help="accepted for Megatron-LM's sake; has no effect",
    )
    add_common_arguments(parser)
    return parser


def tokenizer_path(path: str, tokenizer_type: str | None) -> str:
    """Return the tokenizer to load, having checked that it is of Megatron-LM's type.

    Raises:
        UserError: when the type is unknown or the path holds the other kind.
    """
    if tokenizer_type is None or not path:  # an empty path is refused where it is loaded
        return path
    if tokenizer_type not in _FILE_OF_TYPE:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}",
            "is not supported",
            f"Use one of {', '.join(_FILE_OF_TYPE)}.",
        )
    wanted = _FILE_OF_TYPE[tokenizer_type]
    if Path(path).is_dir():
        return str(Path(path) / wanted)
    if Path(path).suffix != Path(wanted).suffix:
        raise UserError(
            f"--tokenizer-type {tokenizer_type}",
            f"needs a file like {wanted}, and --tokenizer-model is {path}",
            "Leave --tokenizer-type out to have it taken from the file.",
        )
    return path


def run(args: argparse.Namespace) -> int:
    """Write one shard for each key; return 0.

    Raises:
        LitesparkError: see `litespark.data.preprocess.preprocess`.
    """
    if args.partitions < 1:
        raise UserError(f"--partitions {args.partitions}", "is below 1", "Leave it out.")
    if args.partitions > 1:
        sys.stderr.write(
            f"note: --partitions {args.partitions} has no effect; "
            f"{args.workers} workers share each file\n"
        )
    tokenizer = tokenizer_path(args.tokenizer, args.tokenizer_type)
    return run_options(options_from(args, tokenizer, args.json_keys))


def main() -> int:
    """Run the tool on the command line's arguments; return its exit code."""
    args = build_parser().parse_args()
    return run_command(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
