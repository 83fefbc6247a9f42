"""`litespark generate`: continue a text with a trained model."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from litespark.cli.arguments import add_checkpoint_argument, add_command, open_checkpoint
from litespark.errors import ExitCode, UserError

if TYPE_CHECKING:  # the help must not wait for it
    from litespark.data.tokenizers import Tokenizer

_DESCRIPTION = """\
Load a checkpoint into this process, on the GPU if there is one, and continue a text.  Prints the
prompt and what follows it; stops at the end-of-text token or after --max-new-tokens.
"""

_EPILOG = """\
examples:
  litespark generate runs/tiny --prompt "Once upon a time"
  litespark generate runs/tiny --prompt "1 2 3" --temperature 0 --max-new-tokens 16
  litespark generate runs/tiny --prompt="- begins with a dash"
  litespark generate runs/chat --chat --prompt "What colour is snow?"
  litespark generate runs/tiny --prompt "The" --temperature 1 --top-k 50 --top-p 0.95 --seed 7

exit codes: 0 done, 2 the checkpoint, the prompt or an option is wrong, 1 anything else.
"""


def add_parser(subparsers: Any) -> None:
    """Add the command's parser to what `ArgumentParser.add_subparsers` returned."""
    parser = add_command(
        subparsers,
        "generate",
        summary="continue a text with a trained model",
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add_checkpoint_argument(parser)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=64,
        metavar="N",
        help="how many tokens to add at most (default: 64)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="T",
        help="divides the logits: below 1 likely tokens become likelier; 0 always takes the "
        "likeliest (default: 0.8)",
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help="draw from the K likeliest tokens only (default: all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw only from the likeliest tokens that together have probability P (default: all)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1234,
        help="seed of the draws; same seed, same text (default: 1234)",
    )
    parser.add_argument(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer folder or file (default: the run's data.tokenizer)",
    )
    parser.add_argument(
        "--chat",
        action="store_true",
        help="TEXT is a user's message: write it with the tokenizer's chat template, and print the "
        "answer alone",
    )
    parser.set_defaults(run=run)


def _chat_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    from litespark.data.chat_encoding import open_encoder
    from litespark.data.conversations import BadRow

    try:
        return open_encoder(tokenizer).encode_prompt([{"role": "user", "content": text}])
    except BadRow as bad:
        raise UserError("--prompt", bad.problem, "Give another text.") from None


def run(args: argparse.Namespace) -> int:
    """Run the subcommand; returns the exit code."""
    from litespark.parallel.device import prepare_megatron

    prepare_megatron()  # before anything imports megatron-core
    from litespark.checkpoint.run_state import RunState
    from litespark.checkpoint.tokenizer import find_tokenizer
    from litespark.data.tokenizers import load_tokenizer
    from litespark.models.generate import Sampling, generate
    from litespark.training.single import load_model, single_process

    checkpoint = open_checkpoint(args)
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    named = RunState.read(checkpoint).data.get("tokenizer")
    path = args.tokenizer or find_tokenizer(checkpoint, named)
    if path is None:
        raise UserError(
            str(checkpoint), "names no data.tokenizer", "Give one with --tokenizer PATH."
        )
    if args.tokenizer is None and not Path(path).exists():
        raise UserError(
            f"data.tokenizer = {path}",
            f"the run's tokenizer is not there (seen from {Path.cwd()})",
            "Start in the folder in which training was started, or give --tokenizer PATH.",
        )
    tokenizer = load_tokenizer(path)
    try:
        args.prompt.encode("utf-8")
    except UnicodeEncodeError:
        raise UserError("--prompt", "is not valid UTF-8", "Give the text in UTF-8.") from None
    prompt = _chat_prompt(tokenizer, args.prompt) if args.chat else tokenizer.encode(args.prompt)
    with single_process():
        model, _ = load_model(checkpoint)
        new_ids = generate(
            model,
            prompt,
            max_new_tokens=args.max_new_tokens,
            sampling=sampling,
            eos_id=tokenizer.eos_id,
        )
    text = tokenizer.decode(new_ids if args.chat else [*prompt, *new_ids])
    encoding = sys.stdout.encoding or "utf-8"  # a terminal that is not UTF-8 gets question marks
    print(text.encode(encoding, errors="replace").decode(encoding))  # noqa: T201
    return ExitCode.DONE
