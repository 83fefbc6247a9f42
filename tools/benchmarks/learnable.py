"""Samples that a model learns from within a few steps, made from their number alone."""

from __future__ import annotations

import numpy as np

from litespark.data.sample import Sample


class LearnableSamples:
    """Tokens of log-uniform frequency, of which every second one follows from the one before.

    Sample k is the same on every rank and at every layout.  A source for `BatchLoader`.
    """

    def __init__(self, vocab_size: int, sequence_length: int, seed: int = 0) -> None:
        self.vocab_size = vocab_size
        self.sequence_length = sequence_length
        self.seed = seed

    def read(self, index: int, /) -> Sample:
        """Sample `index`, 0 or more: one document, without padding."""
        generator = np.random.default_rng((self.seed, index))
        uniform = generator.random(self.sequence_length + 1)
        tokens = (self.vocab_size**uniform).astype(np.int64) - 1
        tokens[1::2] = (tokens[: len(tokens) // 2 * 2 : 2] * 3 + 1) % self.vocab_size
        ends = np.array([self.sequence_length], dtype=np.int64)
        return Sample(tokens, ends, self.sequence_length)
