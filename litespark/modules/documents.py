"""Where documents lie among the tokens of a micro-batch, as the layers are told.

The rows of a micro-batch are joined into one of t = b * s tokens.  Under context parallelism over
cp ranks it is cut, as a sequence without documents is, into 2*cp chunks, of which a rank holds r
and 2*cp-1-r; a cut may fall within a document.  Of the documents that a chunk touches, its queries
are the last part of each one's keys that come up to the chunk's end:

    document      a0 a1 a2 a3 a4 a5 | b0 b1 b2 b3 b4
    chunk 1                 q  q  q    q  q                     queries 3 of a, 2 of b
    its keys      k  k  k   k  k  k    k  k                     keys    6 of a, 2 of b

which is causal attention aligned at the bottom right, document by document.  Keys before the first
of these documents are of no use to the chunk.  The numbers are worked out on the host, once for
all layers, so that no layer reads from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor


@dataclass(frozen=True)
class Documents:
    """Where the documents of a packed batch begin.

    `cu_seqlens` int32 [documents + 1], on the tokens' device, from 0 to b*s; `max_length` is the
    longest document's length or any bound above it (it sizes launches, so no device value is read).
    `keys` is where the same documents begin among the keys, None where those are the queries' own;
    the queries of a document are the last of its keys.
    """

    cu_seqlens: Tensor
    max_length: int
    keys: Documents | None = None

    @property
    def of_keys(self) -> Documents:
        """Where the documents begin among the keys."""
        return self if self.keys is None else self.keys


@dataclass(frozen=True)
class ChunkDocuments:
    """The documents of one chunk of queries.

    `first_key` is the place in the row of the first of their keys; the last is the chunk's end.
    """

    first_key: int
    documents: Documents


@dataclass
class DocumentBounds(PackedSeqParams):
    """megatron-core's record of packed documents, and those of this rank's two chunks.

    `chunks` is empty without context parallelism.
    """

    chunks: tuple[ChunkDocuments, ...] = ()


def document_numbers(cu_seqlens: Tensor, positions_t: Tensor) -> Tensor:
    """Which document each token is of; int64 [t]."""
    return torch.bucketize(positions_t.to(cu_seqlens.dtype), cu_seqlens[1:], right=True)


def document_places(cu_seqlens: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Which document each token is of, and how many tokens of it follow; int64 [t]."""
    positions_t = torch.arange(num_tokens, device=cu_seqlens.device)
    document_t = document_numbers(cu_seqlens, positions_t)
    return document_t, cu_seqlens[document_t + 1] - 1 - positions_t


def document_bounds(
    cu_seqlens: Tensor,
    longest_tokens: int,
    device: torch.device | None = None,
    context: tuple[int, int] = (0, 1),
) -> DocumentBounds:
    """What the layers are told of the documents of one row of tokens, [t, 1, h] in memory.

    Not in megatron-core's own format "thd", for which its attention would drop the batch's
    dimension and turn each document by a table of its own, read from the device one by one.

    Args:
        cu_seqlens: int32 [documents + 1], on the CPU: where the row's documents begin, and t.
        longest_tokens: of them.
        device: where the layers compute; None where `cu_seqlens` is.
        context: this rank among those that share the row, and their number.
    """
    chunks: tuple[ChunkDocuments, ...] = ()
    rank, size = context
    if size > 1:
        chunks = tuple(
            chunk_documents(cu_seqlens, number, 2 * size, device)
            for number in (rank, 2 * size - 1 - rank)
        )
    marks = cu_seqlens.to(device, non_blocking=True)
    return DocumentBounds(
        qkv_format="sbhd",
        cu_seqlens_q=marks,
        cu_seqlens_kv=marks,
        max_seqlen_q=longest_tokens,
        max_seqlen_kv=longest_tokens,
        chunks=chunks,
    )


def chunk_documents(
    cu_seqlens: Tensor, number: int, num_chunks: int, device: torch.device | None = None
) -> ChunkDocuments:
    """The documents that chunk `number` of `num_chunks` of a row touches; `cu_seqlens` as above."""
    marks = cu_seqlens.numpy()
    chunk = int(marks[-1]) // num_chunks
    start, end = number * chunk, (number + 1) * chunk
    first = int(np.searchsorted(marks, start, side="right")) - 1
    touched = marks[first : int(np.searchsorted(marks, end)) + 1]
    first_key = int(touched[0])

    def documents(marks: np.ndarray, keys: Documents | None = None) -> Documents:
        on_device = torch.from_numpy(marks).to(device, non_blocking=True)
        return Documents(on_device, int(np.diff(marks).max()), keys)

    of_keys = documents(np.minimum(touched, end) - first_key)
    return ChunkDocuments(first_key, documents(np.clip(touched, start, end) - start, of_keys))
