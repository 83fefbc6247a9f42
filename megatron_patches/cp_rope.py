"""The part of the rotary table that belongs to a context-parallel rank.

Without: context parallelism fails in `models/common/embeddings/rope_utils.py`, which builds the
indices in pinned memory and copies them to CUDA.  A rank holds two of `2 * cp` equal chunks,
number `rank` and number `2 * cp - 1 - rank`, so that each rank has the same causal attention work.

Goes when: `get_pos_emb_on_this_cp_rank` builds its indices on the table's device.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_patches.attributes import Undo, replace_attributes
from megatron_patches.registry import Condition, Patch

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup


def _rotary_table_of_rank(pos_emb: Tensor, seq_dim: int, cp_group: ProcessGroup) -> Tensor:
    import torch

    chunks = pos_emb.chunk(2 * cp_group.size(), dim=seq_dim)
    rank = cp_group.rank()
    return torch.cat((chunks[rank], chunks[-1 - rank]), dim=seq_dim)


def _apply() -> Undo:
    from megatron.core.models.common.embeddings import (
        rope_utils,
        rotary_pos_embedding,
        yarn_rotary_pos_embedding,
    )

    importers = (rope_utils, rotary_pos_embedding, yarn_rotary_pos_embedding)
    name = "get_pos_emb_on_this_cp_rank"
    return replace_attributes(*((module, name, _rotary_table_of_rank) for module in importers))


_EMBEDDINGS = "megatron.core.models.common.embeddings"
PATCH = Patch(
    name="cp_rope",
    symbols=(
        f"{_EMBEDDINGS}.rope_utils.get_pos_emb_on_this_cp_rank",
        f"{_EMBEDDINGS}.rotary_pos_embedding.get_pos_emb_on_this_cp_rank",
        f"{_EMBEDDINGS}.yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank",
    ),
    versions=">=0.16.1,<0.17",
    condition=Condition.CPU,
    why="the rotary table is cut with indices in pinned and CUDA memory",
    remove_when="the indices are built on the table's device",
    apply=_apply,
)
