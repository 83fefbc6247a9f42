"""Train the quick start's tokenizer: a byte-level BPE of 2048 pieces, in a few seconds.

Byte-level BPE starts from the 256 byte values, so no text is ever unknown, and joins the most
frequent neighbouring pair again and again until the vocabulary is full.  2048 pieces suit a model
of a few million parameters: with 32 000 the embedding would be larger than all its layers.

The script also counts how often each piece occurs.  The entropy of these counts, in nats, is the
loss of a model that knows the frequencies of the pieces and nothing of their order.  A training run
begins near ln(vocabulary size), falls to this value first, and learns language below it.

    python examples/quickstart/train_tokenizer.py \\
        --input examples/quickstart/data/corpus.jsonl.zst --output runs/quickstart/tokenizer

The folder it writes is what `transformers.AutoTokenizer.from_pretrained` and `litespark preprocess
--tokenizer` read.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import zstandard
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from litespark.errors import LitesparkError, UserError
from litespark.utils.files import write_text_atomically

BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
MIN_VOCABULARY = 256 + 2  # the byte values and the two special tokens
BATCH_DOCUMENTS = 256  # enough for both cores, little enough to stay in memory


def read_texts(path: Path) -> Iterator[str]:
    """The documents of a `.jsonl.zst` file, in its order.

    Raises:
        UserError: when there is no such file, or a line is no JSON object with a string `text`.
    """
    if not path.is_file():
        raise UserError(str(path), "there is no such file", "Give a .jsonl.zst file as --input.")
    with path.open("rb") as compressed:
        stream = zstandard.ZstdDecompressor().stream_reader(compressed, read_across_frames=True)
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), start=1):
                try:
                    text = json.loads(line)["text"]
                except (ValueError, TypeError, KeyError):
                    text = None
                if not isinstance(text, str):
                    raise UserError(
                        f"{path}:{number}",
                        'the line is no JSON object with a string under "text"',
                        "Mend or remove the line.",
                    )
                yield text
        except (zstandard.ZstdError, UnicodeDecodeError) as error:
            raise UserError(
                str(path), f"the file cannot be read ({error})", "Fetch or build the file again."
            ) from error


def train_byte_level_bpe(texts: Iterable[str], vocabulary_size: int) -> Tokenizer:
    """A byte-level BPE trained on `texts`; the special tokens have the ids 0 and 1."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=[BEGIN_OF_TEXT, END_OF_TEXT],
        # sorted: the ids of the bytes must not depend on the order of a set.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def count_tokens(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """How often each piece of the vocabulary occurs in `texts`, int64, without special tokens."""
    counts = np.zeros(tokenizer.get_vocab_size(), dtype=np.int64)
    for start in range(0, len(texts), BATCH_DOCUMENTS):
        for encoding in tokenizer.encode_batch_fast(texts[start : start + BATCH_DOCUMENTS]):
            counts += np.bincount(encoding.ids, minlength=len(counts))
    return counts


def unigram_entropy_nats(counts: np.ndarray) -> float:
    """The entropy of a distribution given by counts, in nats per token; 0 for no counts.

    With p = counts / sum, the entropy is -sum(p · ln p), where 0 · ln 0 is 0.
    """
    present = counts[counts > 0].astype(np.float64)
    if present.size == 0:
        return 0.0
    share = present / present.sum()
    return float(-(share * np.log(share)).sum())


def write_tokenizer(
    tokenizer: Tokenizer, folder: Path, model_max_length: int, report: dict[str, object]
) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `tokenizer_report.json`, each at once."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "model_max_length": model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomically(folder / "tokenizer.json", tokenizer.to_str(pretty=True) + "\n")
    write_text_atomically(folder / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_text_atomically(folder / "tokenizer_report.json", json.dumps(report, indent=2) + "\n")


def train(corpus: Path, folder: Path, vocabulary_size: int, model_max_length: int) -> None:
    """Train on `corpus`, write to `folder`, and print what was done.

    Raises:
        UserError: when the vocabulary is too small, or the corpus cannot be read or is empty.
    """
    if vocabulary_size < MIN_VOCABULARY:
        raise UserError(
            f"--vocab-size {vocabulary_size}",
            f"a byte-level vocabulary has at least {MIN_VOCABULARY} pieces",
            f"Give {MIN_VOCABULARY} or more.",
        )
    started = time.perf_counter()
    texts = list(read_texts(corpus))
    num_bytes = sum(len(text.encode("utf-8")) for text in texts)
    if num_bytes == 0:
        raise UserError(str(corpus), "the file holds no text", "Give another file as --input.")
    tokenizer = train_byte_level_bpe(texts, vocabulary_size)
    counts = count_tokens(tokenizer, texts)
    num_tokens = int(counts.sum())
    entropy_nats = unigram_entropy_nats(counts)
    report: dict[str, object] = {
        "corpus": corpus.name,
        "documents": len(texts),
        "bytes": num_bytes,
        "tokens": num_tokens,
        "bytes_per_token": round(num_bytes / num_tokens, 4),
        "vocabulary_size": tokenizer.get_vocab_size(),
        "unigram_entropy_nats_per_token": round(entropy_nats, 4),
        "uniform_loss_nats_per_token": round(math.log(tokenizer.get_vocab_size()), 4),
    }
    write_tokenizer(tokenizer, folder, model_max_length, report)
    print(f"read {len(texts)} documents, {num_bytes / 1e6:.2f} MB, from {corpus}")
    print(
        f"trained a byte-level BPE of {tokenizer.get_vocab_size()} pieces: {num_tokens} tokens, "
        f"{num_bytes / num_tokens:.2f} bytes per token"
    )
    print(
        f"loss to expect: {math.log(tokenizer.get_vocab_size()):.3f} nats per token at the start, "
        f"{entropy_nats:.3f} (unigram entropy) for a model that ignores context"
    )
    print(f"wrote {folder} in {time.perf_counter() - started:.1f} s")


def main() -> int:
    """Parse the command line; a mistake in it is one message and exit code 2."""
    parser = argparse.ArgumentParser(description="Train a byte-level BPE on a .jsonl.zst corpus.")
    parser.add_argument(
        "--input", type=Path, default=Path(__file__).parent / "data" / "corpus.jsonl.zst"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=2048, help="pieces (default: 2048)")
    parser.add_argument("--model-max-length", type=int, default=4096, help="tokens (default: 4096)")
    args = parser.parse_args()
    try:
        train(args.input, args.output, args.vocab_size, args.model_max_length)
    except LitesparkError as error:
        print(f"error: {error}", file=sys.stderr)
        return int(error.exit_code)
    return 0


if __name__ == "__main__":
    sys.exit(main())
