"""Core attention of the reference backend, with context parallelism.

Shapes: s sequence, b micro-batch, n query heads of this rank, g key/value heads of this rank,
d head size.

Under context parallelism a rank holds two chunks of the sequence, r and 2*cp-1-r of 2*cp, so that
every rank has the same share of the causal triangle.  Keys and values are gathered from all ranks
(the gradient is reduce-scattered back), and the mask compares global positions.  This costs memory
proportional to the whole sequence for keys and values; it is the specification that ring-style
implementations are tested against.  So it is of document masks: two tokens see each other where
they are of one document, wherever its parts lie.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.errors import LitesparkError
from litespark.modules.documents import document_numbers


def zigzag_positions(local_length: int, rank: int, size: int, device: torch.device) -> Tensor:
    """Global positions of the tokens that context-parallel rank `rank` of `size` holds; int64 [s].

    The order is megatron-core's (`get_batch_on_this_cp_rank`): chunk r, then chunk 2*size-1-r.
    """
    chunk = local_length // 2
    offsets = torch.arange(chunk, device=device)
    return torch.cat([offsets + rank * chunk, offsets + (2 * size - 1 - rank) * chunk])


class ReferenceCoreAttention(MegatronModule):
    """Causal softmax attention through torch's `scaled_dot_product_attention`.

    Raises:
        LitesparkError: a mask type, dropout, bias or packing that this backend does not compute.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config)
        del attention_type, cp_comm_type  # the slot's arguments; keys and values are all-gathered
        if attn_mask_type != AttnMaskType.causal or (attention_dropout or config.attention_dropout):
            raise LitesparkError(
                "the reference core attention is causal and has no dropout; "
                f"asked for {attn_mask_type} in layer {layer_number}"
            )
        groups = pg_collection or ProcessGroupCollection.use_mpu_process_groups(["cp"])
        self.context_group = groups.cp
        self.softmax_scale = softmax_scale

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

        With `packed_seq_params` tokens see their own document only.  Its boundaries count the
        tokens of the one row, b = 1, of all ranks.
        """
        del attention_mask, attn_mask_type  # causal by construction
        if attention_bias is not None:
            raise LitesparkError("the reference core attention takes no bias")
        mask_qk = None
        if packed_seq_params is not None:
            mask_qk = self._document_mask(query_sbnd, key_sbgd, packed_seq_params)
        elif self.context_group.size() > 1 or query_sbnd.size(0) != key_sbgd.size(0):
            query_q, key_k = self._positions(query_sbnd, key_sbgd)
            mask_qk = key_k <= query_q[:, None]
        if self.context_group.size() > 1:
            key_sbgd = gather_from_sequence_parallel_region(key_sbgd, group=self.context_group)
            value_sbgd = gather_from_sequence_parallel_region(value_sbgd, group=self.context_group)
        output_bnsd = F.scaled_dot_product_attention(
            query_sbnd.permute(1, 2, 0, 3),
            key_sbgd.permute(1, 2, 0, 3),
            value_sbgd.permute(1, 2, 0, 3),
            attn_mask=mask_qk,
            is_causal=mask_qk is None,
            scale=self.softmax_scale,
            enable_gqa=query_sbnd.size(2) != key_sbgd.size(2),
        )
        return output_bnsd.permute(2, 0, 1, 3).flatten(start_dim=2)

    def _document_mask(
        self, query_sbnd: Tensor, key_sbgd: Tensor, packed: PackedSeqParams
    ) -> Tensor:
        """True where a query may look: back, in its own document; bool [q, k]."""
        length, batch = query_sbnd.shape[:2]
        square = batch == 1 and key_sbgd.size(0) == length
        if packed.cu_seqlens_q is None or not square:
            raise LitesparkError(
                "the reference core attention takes documents as cu_seqlens_q, in one row, with as "
                "many keys as queries"
            )
        query_q, key_k = self._positions(query_sbnd, key_sbgd)
        document_q, document_k = (
            document_numbers(packed.cu_seqlens_q, positions) for positions in (query_q, key_k)
        )
        return (document_k == document_q[:, None]) & (key_k <= query_q[:, None])

    def _positions(self, query_sbnd: Tensor, key_sbgd: Tensor) -> tuple[Tensor, Tensor]:
        """The places in the sequence of this rank's queries and of all ranks' keys; int64."""
        size, rank = self.context_group.size(), self.context_group.rank()
        device, key_length = query_sbnd.device, key_sbgd.size(0)
        if size > 1:
            of_ranks = [zigzag_positions(key_length, r, size, device) for r in range(size)]
            return of_ranks[rank], torch.cat(of_ranks)
        key_k = torch.arange(key_length, device=device)
        # With fewer queries (decoding with a key/value cache) they are the newest positions.
        return key_k[key_length - query_sbnd.size(0) :], key_k
