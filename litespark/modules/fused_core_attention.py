"""Core attention of the fused backend: the fastest library there is, whole or split over ranks.

Shapes: s sequence, b micro-batch, n query heads of this rank, g key/value heads of this rank,
d head size, c one chunk of the sequence, t tokens of packed documents.

The library is chosen by measurement (`attention_choice.py`) and works on views: queries, keys and
values stay where the projections wrote them.

Context parallelism, over cp ranks: a rank holds the chunks r and 2*cp-1-r of 2*cp, so that all have
the same share of the causal triangle.  Keys and values are gathered (autograd reduce-scatters their
gradients) and put into the sequence's order.  Then each of the two chunks of queries is a causal
attention aligned at the bottom right, the shape that decoding has too:

    chunk r of the queries          to keys of chunks 0 .. r
    chunk 2*cp-1-r of the queries   to keys of chunks 0 .. 2*cp-1-r

so that no mask is stored and next to nothing above the diagonal is computed: 2*cp * c^2 scores on
every rank, half of what its queries against all keys under a mask would be.  With documents each
chunk's keys begin at the first document that it touches (`documents.py`).
"""

from __future__ import annotations

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.modules.attention_backends import AttentionCase
from litespark.modules.attention_choice import choose_attention
from litespark.modules.documents import ChunkDocuments, DocumentBounds, Documents


class FusedCoreAttention(MegatronModule):
    """Causal softmax attention through the fastest backend for the shapes at hand.

    `forced_backend` names a backend to take instead (`model.attention`); None chooses.

    Raises:
        LitesparkError: a mask type, dropout, bias or packing that no backend computes.
        UserError: the forced backend cannot be used.
    """

    def __init__(  # noqa: PLR0913 - the slot has eight
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        forced_backend: str | None = None,
    ) -> None:
        super().__init__(config=config)
        del attention_type, cp_comm_type  # the slot's arguments; keys and values are all-gathered
        if attn_mask_type != AttnMaskType.causal or (attention_dropout or config.attention_dropout):
            raise LitesparkError(
                "the fused core attention is causal and has no dropout; "
                f"asked for {attn_mask_type} in layer {layer_number}"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.context_group = groups.cp
        self.softmax_scale = softmax_scale
        self.forced_backend = forced_backend

    def forward(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend causally; returns [s, b, n*d] in the query's dtype.

        Packed documents come without a batch from megatron-core, [t, n, d], and go as [t, n*d].
        """
        del attention_mask, attn_mask_type  # causal by construction
        if attention_bias is not None:
            raise LitesparkError("the fused core attention takes no bias")
        inputs = (query_sbnd, key_sbgd, value_sbgd)
        if query_sbnd.dim() == 4:
            return self.attend(*inputs, packed_seq_params).flatten(start_dim=2)
        query_t1nd, key_t1gd, value_t1gd = (tensor.unsqueeze(1) for tensor in inputs)
        output_t1nd = self.attend(query_t1nd, key_t1gd, value_t1gd, packed_seq_params)
        return output_t1nd.squeeze(1).flatten(start_dim=1)

    def attend(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Causal attention, differentiable; [s, b, n, d] in the query's dtype.

        The inputs may have any strides with a contiguous last dimension; so may the output.
        Fewer queries than keys are the newest positions.  With `packed_seq_params` tokens see their
        own document only; its boundaries count the tokens of all rows, row by row, and under
        context parallelism those of one row.

        Raises:
            LitesparkError: a key/value cache under context parallelism or with documents, a part
                of the sequence that is no two chunks, or documents that nobody cut into chunks.
        """
        if self.context_group.size() > 1:
            chunks = _chunks(packed_seq_params, query_sbnd.size(1))
            return self._attend_over_ranks(query_sbnd, key_sbgd, value_sbgd, chunks)
        documents = None
        if packed_seq_params is not None:
            documents = _documents(packed_seq_params, query_sbnd, key_sbgd)
        return self._attend_here(query_sbnd, key_sbgd, value_sbgd, documents)

    def _attend_here(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        documents: Documents | None = None,
    ) -> Tensor:
        query_bsnd, key_bsgd = query_sbnd.transpose(0, 1), key_sbgd.transpose(0, 1)
        case = AttentionCase.of(query_bsnd, key_bsgd, variable_length=documents is not None)
        # Not by `torch.is_grad_enabled()`: recomputation runs the forward without gradients first.
        backend = choose_attention(case, force=self.forced_backend, measure=self.training)
        output_bsnd = backend.attend(
            query_bsnd,
            key_bsgd,
            value_sbgd.transpose(0, 1),
            scale=self.softmax_scale,
            documents=documents,
        )
        return output_bsnd.transpose(0, 1)

    def _attend_over_ranks(
        self,
        query_sbnd: Tensor,
        key_sbgd: Tensor,
        value_sbgd: Tensor,
        of_chunks: tuple[ChunkDocuments | None, ...],
    ) -> Tensor:
        size, rank = self.context_group.size(), self.context_group.rank()
        length = query_sbnd.size(0)
        if length % 2 or key_sbgd.size(0) != length:
            raise LitesparkError(
                f"context parallelism over {size} ranks takes two chunks of the sequence on each, "
                f"for queries and keys alike; this rank has {length} and {key_sbgd.size(0)} tokens"
            )
        keys_cbgd = self._chunks_in_order(key_sbgd)
        values_cbgd = self._chunks_in_order(value_sbgd)
        outputs_cbnd = []
        for query_cbnd, chunk, own in zip(
            query_sbnd.split(length // 2), (rank, 2 * size - 1 - rank), of_chunks, strict=True
        ):
            first_chunk, offset = divmod(0 if own is None else own.first_key, length // 2)
            # Joined from the chunks for each of the two: a slice of one joined tensor would have a
            # gradient as long as the whole sequence, zeros mostly.
            seen_sbgd, seen_values_sbgd = (
                torch.cat([chunks[first_chunk][offset:], *chunks[first_chunk + 1 : chunk + 1]])
                for chunks in (keys_cbgd, values_cbgd)
            )
            documents = None if own is None else own.documents
            outputs_cbnd.append(
                self._attend_here(query_cbnd, seen_sbgd, seen_values_sbgd, documents)
            )
        return torch.cat(outputs_cbnd)

    def _chunks_in_order(self, local_sbgd: Tensor) -> list[Tensor]:
        """All ranks' chunks, gathered, in the order of the sequence: 2*size times [c, b, g, d]."""
        gathered = gather_from_sequence_parallel_region(local_sbgd, group=self.context_group)
        chunks = gathered.unflatten(0, (-1, local_sbgd.size(0) // 2)).unbind(0)
        return [*chunks[0::2], *reversed(chunks[1::2])]  # ranks have r and 2*size-1-r


def _chunks(
    packed: PackedSeqParams | None, num_rows: int
) -> tuple[ChunkDocuments | None, ChunkDocuments | None]:
    """The documents of a context-parallel rank's two chunks."""
    if packed is None:
        return None, None
    if not isinstance(packed, DocumentBounds) or len(packed.chunks) != 2 or num_rows != 1:
        raise LitesparkError(
            "documents under context parallelism are the `DocumentBounds` of one row, cut for the "
            "context-parallel group"
        )
    return packed.chunks[0], packed.chunks[1]


def _documents(packed: PackedSeqParams, query_sbnd: Tensor, key_sbgd: Tensor) -> Documents:
    """Where documents begin; padding after one belongs to it, and causality hides it."""
    num_tokens = query_sbnd.size(0) * query_sbnd.size(1)
    if key_sbgd.size(0) != query_sbnd.size(0):
        raise LitesparkError(
            f"documents of {query_sbnd.size(0)} queries and {key_sbgd.size(0)} keys a row: they "
            "have as many keys as queries"
        )
    padded = packed.cu_seqlens_q_padded is not None
    marks = packed.cu_seqlens_q_padded if padded else packed.cu_seqlens_q
    if marks is None:
        raise LitesparkError("packed documents need cu_seqlens_q, where each document begins")
    longest = packed.max_seqlen_q
    # megatron-core's maximum leaves the padding out, and as a tensor it would have to be read.
    bound = num_tokens if padded or not isinstance(longest, int) else longest
    return Documents(marks.to(torch.int32), bound)
