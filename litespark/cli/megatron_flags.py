"""Flags of Megatron-LM's converters that have no effect here, accepted so that scripts go on."""

from __future__ import annotations

import argparse
import sys

_OF_LAYOUT = "the checkpoint holds whole tensors, and loads at any layout"
# Flag, why it has no effect.
_IGNORED = (
    ("--loader", "what is read follows from --load"),
    ("--saver", "what is written follows from the tool"),
    ("--model-type", "the model's shape says what it is"),
    ("--model-size", "the model's shape says what it is"),
    ("--checkpoint-type", "the folder says what it is"),
    ("--tokenizer-type", "the tokenizer's file says what it is"),
    ("--target-tensor-parallel-size", _OF_LAYOUT),
    ("--target-pipeline-parallel-size", _OF_LAYOUT),
    ("--tensor-model-parallel-size", _OF_LAYOUT),
    ("--pipeline-model-parallel-size", _OF_LAYOUT),
    ("--make-vocab-size-divisible-by", "the vocabulary is padded by the run that loads it"),
    ("--megatron-path-to-code", "Megatron-LM itself is not needed"),
)
_SWITCHES = (
    ("--use-mcore-models", "all models are megatron-core's"),
    ("--use-checkpoint-args", "the checkpoint says its shape"),
)


def add_ignored_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags, in a group of their own in the help."""
    group = parser.add_argument_group("accepted and without effect")
    for flag, why in _IGNORED:
        group.add_argument(flag, metavar="X", help=why)
    for flag, why in _SWITCHES:
        group.add_argument(flag, action="store_true", help=why)


def tell_ignored(args: argparse.Namespace) -> None:
    """Name those that were given, on stderr."""
    for flag, why in (*_IGNORED, *_SWITCHES):
        if getattr(args, flag[2:].replace("-", "_")):
            sys.stderr.write(f"litespark: note: {flag} has no effect: {why}\n")
