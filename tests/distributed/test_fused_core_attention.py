"""The fused core attention against the reference one: values, all gradients, masks and layouts.

In fp64, where both sum numbers of size one over at most 100 keys in another order: 100 * 2^-53 is
1e-14, and 1e-12 leaves room for the exponentials.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from litespark.errors import LitesparkError
from litespark.modules import fused_core_attention
from litespark.modules.attention_backends import MathAttention
from litespark.modules.core_attention import ReferenceCoreAttention, zigzag_positions
from litespark.modules.documents import chunk_documents, document_bounds
from litespark.modules.fused_core_attention import FusedCoreAttention
from tests.support.spawn import run_distributed

BOUND = 1e-12


class Alone:
    """A process group of one."""

    def size(self):
        return 1

    def rank(self):
        return 0


def build(kind, group=None, *, mask=AttnMaskType.causal, dropout=0.0, scale=None, forced=None):
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=4, attention_dropout=dropout
    )
    named = {} if forced is None else {"forced_backend": forced}
    return kind(
        config,
        1,
        mask,
        "self",
        softmax_scale=scale,
        pg_collection=ProcessGroupCollection(cp=group or Alone()),
        **named,
    )


def qkv(q_length, kv_length, batch, heads, groups, head_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((q_length, heads), (kv_length, groups), (kv_length, groups))
    return [
        torch.randn(s, batch, n, head_dim, generator=generator, dtype=torch.float64)
        for s, n in shapes
    ]


def run(module, inputs, **options):
    """The output and, for an output gradient drawn anew, those of the inputs."""
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    output = module(*leaves, None, **options)
    generator = torch.Generator().manual_seed(1)
    gradient = torch.randn(output.shape, generator=generator, dtype=output.dtype)
    return [output, *torch.autograd.grad(output, leaves, gradient)]


def assert_same(found, expected, bound=BOUND):
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        assert one.shape == other.shape, name
        assert torch.allclose(one, other, rtol=bound, atol=bound), name


SHAPES = {
    "grouped": (32, 32, 2, 8, 2, 16),
    "one group": (17, 17, 3, 4, 1, 8),
    "a head each": (33, 33, 1, 4, 4, 8),
    "one token": (1, 1, 2, 4, 2, 8),
    "odd head": (7, 7, 2, 4, 2, 5),
    "decoding": (1, 29, 2, 8, 2, 16),
    "decoding five": (5, 29, 2, 4, 4, 8),
}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_equals_the_reference(name, scale):
    inputs = qkv(*SHAPES[name])
    found = run(build(FusedCoreAttention, scale=scale), inputs)
    assert_same(found, run(build(ReferenceCoreAttention, scale=scale), inputs))


def test_fewer_queries_are_the_newest_positions():
    """Against the last rows of the whole, not only against the reference."""
    query, key, value = qkv(13, 13, 2, 4, 2, 8)
    attention = build(FusedCoreAttention)
    whole = attention(query, key, value, None)
    with torch.no_grad():
        assert torch.allclose(attention(query[-4:], key, value, None), whole[-4:], atol=BOUND)
    with pytest.raises(LitesparkError, match="at most as many queries as keys"):
        attention(query, key[:5], value[:5], None)


def test_takes_and_gives_views():
    """Keys and values as they lie in one projection's output, queries with the batch outermost."""
    query = torch.randn(2, 9, 4, 8, dtype=torch.float64).transpose(0, 1)
    key, value = torch.randn(9, 2, 2, 16, dtype=torch.float64).split(8, dim=-1)
    views = (query, key, value)
    assert not any(view.is_contiguous() for view in views)
    found = build(FusedCoreAttention).attend(*views)
    assert found.shape == (9, 2, 4, 8)
    assert found.stride(-1) == 1
    expected = build(ReferenceCoreAttention)(*(view.contiguous() for view in views), None)
    assert torch.allclose(found.flatten(2), expected, atol=BOUND)


def packed(marks, **options):
    cu_seqlens = torch.tensor(marks, dtype=torch.int32)
    return PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, **options
    )


MARKS = [0, 1, 6, 17, 20]


@pytest.mark.parametrize("longest", [None, 11])
def test_documents_are_attentions_of_their_own(longest):
    """megatron-core's packed layout, [t, n, d]: each document on its own is the reference."""
    inputs = qkv(20, 20, 1, 4, 2, 8)
    packing = packed(MARKS, max_seqlen_q=longest)
    found = run(
        build(FusedCoreAttention), [t.squeeze(1) for t in inputs], packed_seq_params=packing
    )
    leaves = [tensor.detach().requires_grad_() for tensor in inputs]
    reference = build(ReferenceCoreAttention)
    parts = [
        reference(*(leaf[start:end] for leaf in leaves), None) for start, end in pairwise(MARKS)
    ]
    output = torch.cat(parts)
    gradient = torch.randn(
        20, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    ).unsqueeze(1)
    expected = [output, *torch.autograd.grad(output, leaves, gradient)]
    assert_same(found, [tensor.squeeze(1) for tensor in expected])


def test_documents_run_on_over_the_rows_of_a_batch():
    query, key, value = qkv(10, 10, 2, 4, 2, 8)
    attention = build(FusedCoreAttention)
    found = attention(query, key, value, None, packed_seq_params=packed(MARKS))
    rows = [tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value)]
    expected_td = attention(*rows, None, packed_seq_params=packed(MARKS))
    assert found.shape == (10, 2, 32)
    assert torch.allclose(found.transpose(0, 1).flatten(0, 1), expected_td, atol=BOUND)


def test_padding_after_documents_changes_nothing_before_it():
    attention = build(FusedCoreAttention)
    inputs = [tensor.squeeze(1) for tensor in qkv(8, 8, 1, 4, 2, 8)]
    padded = torch.tensor([0, 5, 8], dtype=torch.int32)
    packing = packed([0, 3, 6], max_seqlen_q=3, cu_seqlens_q_padded=padded)
    found = attention(*inputs, None, packed_seq_params=packing)
    for start, length in ((0, 3), (5, 3)):
        part = [tensor[start : start + length].unsqueeze(1) for tensor in inputs]
        expected = build(ReferenceCoreAttention)(*part, None).squeeze(1)
        assert torch.allclose(found[start : start + length], expected, atol=BOUND)
    assert found.isfinite().all()


class Recorder(MathAttention):
    """Computes, and remembers which documents it was given."""

    def attend(self, *qkv, documents=None, **options):
        self.documents = documents
        return super().attend(*qkv, documents=documents, **options)


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        ({"max_seqlen_q": 11}, 11),
        ({}, 20),
        ({"max_seqlen_q": torch.tensor(11)}, 20),  # reading it would wait for the device
        # megatron-core's maximum is of the documents without their padding.
        ({"max_seqlen_q": 11, "cu_seqlens_q_padded": torch.tensor([0, 1, 6, 19, 20])}, 20),
    ],
)
def test_a_bound_on_the_longest_document(options, bound, monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(fused_core_attention, "choose_attention", lambda *_, **__: recorder)
    inputs = qkv(20, 20, 1, 4, 2, 8)
    build(FusedCoreAttention)(*inputs, None, packed_seq_params=packed(MARKS, **options))
    assert recorder.documents.max_length == bound
    assert recorder.documents.cu_seqlens.dtype == torch.int32


def test_only_training_measures(monkeypatch):
    asked = []
    monkeypatch.setattr(
        fused_core_attention,
        "choose_attention",
        lambda case, *, force, measure: asked.append(measure) or MathAttention(),
    )
    attention = build(FusedCoreAttention)
    inputs = qkv(4, 4, 1, 4, 2, 8)
    attention.train()(*inputs, None)
    with torch.no_grad():  # the first forward of a recomputed layer
        attention(*inputs, None)
    attention.eval()(*inputs, None)
    assert asked == [True, True, False]


def test_what_it_does_not_compute_is_refused():
    inputs = qkv(4, 4, 1, 4, 2, 8)
    with pytest.raises(LitesparkError, match="asked for"):
        build(FusedCoreAttention, mask=AttnMaskType.no_mask)
    with pytest.raises(LitesparkError, match="dropout"):
        build(FusedCoreAttention, dropout=0.1)
    with pytest.raises(LitesparkError, match="bias"):
        build(FusedCoreAttention)(*inputs, None, attention_bias=torch.zeros(4, 4))
    short = [inputs[0][:2], *inputs[1:]]
    with pytest.raises(LitesparkError, match="as many keys as queries"):
        build(FusedCoreAttention)(*short, None, packed_seq_params=packed([0, 2]))
    with pytest.raises(LitesparkError, match="cu_seqlens_q"):
        build(FusedCoreAttention)(*inputs, None, packed_seq_params=PackedSeqParams())
    forced = build(FusedCoreAttention, forced="flash-cute")
    with pytest.raises(LitesparkError, match="needs a CUDA device"):
        forced(*inputs, None)


@pytest.mark.parametrize("marks", [[0, 24], [0, 6, 12, 18, 24], [0, 1, 2, 9, 13, 14, 24]])
def test_documents_of_a_chunk(marks):
    """Against every query's document looked up by itself; its keys are those up to it."""
    cu_seqlens = torch.tensor(marks, dtype=torch.int32)
    document_of = np.repeat(np.arange(len(marks) - 1), np.diff(marks))
    for number in range(4):
        chunk = chunk_documents(cu_seqlens, number, 4)
        queries = range(6 * number, 6 * number + 6)
        touched = sorted({int(document_of[query]) for query in queries})
        assert chunk.first_key == marks[touched[0]]
        lengths = [int((document_of[list(queries)] == document).sum()) for document in touched]
        keys = [min(marks[document + 1], queries[-1] + 1) - marks[document] for document in touched]
        documents = chunk.documents
        for found, expected in ((documents, lengths), (documents.of_keys, keys)):
            assert found.cu_seqlens.dtype == torch.int32
            assert found.cu_seqlens.diff().tolist() == expected
            assert found.max_length == max(expected)


def _context_parallel(rank, world_size, shape, marks=None):
    """This rank's chunks through both modules, and the same chunks of the whole sequence's."""
    from megatron_patches import apply_patches

    torch.distributed.init_process_group("gloo")
    apply_patches("cpu")
    group = torch.distributed.group.WORLD
    whole = qkv(*shape)
    length = shape[0] // world_size
    own = zigzag_positions(length, rank, world_size, torch.device("cpu"))
    everywhere, here = {}, {}
    if marks is not None:
        cu_seqlens = torch.tensor(marks, dtype=torch.int32)
        longest = max(end - start for start, end in pairwise(marks))
        everywhere = {"packed_seq_params": document_bounds(cu_seqlens, longest)}
        here = {
            "packed_seq_params": document_bounds(cu_seqlens, longest, context=(rank, world_size))
        }

    def local_run(module):
        leaves = [tensor[own].requires_grad_() for tensor in whole]
        output = module(*leaves, None, **here)
        output.backward(gradient[own])
        return [output.detach(), *(leaf.grad for leaf in leaves)]

    leaves = [tensor.detach().requires_grad_() for tensor in whole]
    expected = build(ReferenceCoreAttention)(*leaves, None, **everywhere)
    gradient = torch.randn(
        expected.shape, generator=torch.Generator().manual_seed(1), dtype=expected.dtype
    )
    expected.backward(gradient)
    assert_same(
        local_run(build(FusedCoreAttention, group)),
        [expected.detach()[own], *(leaf.grad[own] for leaf in leaves)],
    )
    assert_same(
        local_run(build(FusedCoreAttention, group)), local_run(build(ReferenceCoreAttention, group))
    )
    attention = build(FusedCoreAttention, group)
    refusals = []
    for inputs, options in (
        ([tensor[own][:-1] for tensor in whole], {}),
        ([whole[0][own][:2], *(tensor[own] for tensor in whole[1:])], {}),
        ([tensor[own] for tensor in whole], {"packed_seq_params": packed([0, length])}),
    ):
        with pytest.raises(LitesparkError) as caught:
            attention(*inputs, None, **options)
        refusals.append(str(caught.value))
    return refusals


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "shape"),
    [(2, (20, 20, 2, 8, 2, 8)), (2, (12, 12, 1, 4, 4, 16)), (4, (40, 40, 2, 4, 2, 8))],
)
def test_context_parallel_chunks_are_those_of_the_whole(world_size, shape):
    for odd, cached, documents in run_distributed(_context_parallel, world_size, shape):
        assert "two chunks" in odd
        assert "two chunks" in cached
        assert "cut for the context-parallel group" in documents


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("world_size", "length", "marks"),
    [
        (2, 20, [0, 1, 6, 17, 20]),
        (2, 20, [0, 5, 10, 15, 20]),
        (2, 20, [0, 20]),
        (4, 40, [0, 3, 4, 31, 37, 39, 40]),
        (3, 24, [0, 2, 9, 10, 20, 24]),
    ],
)
def test_documents_across_context_parallel_chunks(world_size, length, marks):
    run_distributed(_context_parallel, world_size, (length, length, 1, 8, 2, 8), marks)
