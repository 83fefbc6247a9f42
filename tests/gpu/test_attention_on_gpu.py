"""Every attention library that is installed, against fp32 matrix products on the same GPU.

The bounds: a kernel multiplies bf16 exactly, sums in fp32, and rounds to bf16 (2^-9 of the value at
most, 0.6 of that in the mean) the probabilities, the output, the scores' gradients and the results;
keys' gradients of a group once more where they are summed over its heads.  Errors of different
elements are independent: done step by step in torch, a whole tensor was off by 2e-3 to 5e-3 of its
norm, and a token, whose norm may be small beside what was summed, by 1e-2.  2^-6 and 2^-5 allow
three times that.  A row that sees one key too many is off by more than 1e-1 among the first tokens.

Queries' gradients cancel where a token sees few keys: dq = scale sum_j p_j (dO.v_j - dO.O) k_j,
which is 0 for the first.  Kernels take dO.O of the rounded output, off by some 2^-9 |dO * O|, which
moves dq by scale |sum_j p_j k_j| times that, however small dq is: step by step in torch, the second
to sixth tokens of 4096 were off by 1.4 to 4.7 % of the mean token (12 draws of 16 heads), on a GPU
one by 7 %.  Four times that term is allowed beside the rest; of the sum the draws took 20 to 36 %.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from litespark.modules.attention_backends import (
    BACKENDS,
    AttentionBackend,
    AttentionCase,
    MathAttention,
)
from litespark.modules.attention_choice import (
    AttentionChooser,
    machine_name,
    measure_on_gpu,
    random_inputs,
)
from litespark.modules.documents import Documents, chunk_documents
from litespark.modules.fused_core_attention import FusedCoreAttention

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

WHOLE, TOKEN = 2**-6, 2**-5
GROUPED = AttentionCase(2, 1000, 1000, 16, 2, 128, torch.bfloat16, "cuda")
CASES = {
    "grouped 1000": GROUPED,
    "grouped 4096": replace(GROUPED, batch=1, q_length=4096, kv_length=4096),
    "grouped d64": replace(GROUPED, head_dim=64),
    "grouped d64 4096": replace(GROUPED, batch=1, q_length=4096, kv_length=4096, head_dim=64),
    "a head each": replace(GROUPED, groups=16),
    "short": replace(GROUPED, q_length=3, kv_length=3),
    "fewer queries": replace(GROUPED, q_length=500),
    "a head each, fewer queries": replace(GROUPED, q_length=500, groups=16),
    "decoding": replace(GROUPED, q_length=1),
    "documents": replace(GROUPED, variable_length=True),
    "documents d64 4096": replace(
        GROUPED, batch=1, q_length=4096, kv_length=4096, head_dim=64, variable_length=True
    ),
}


@pytest.fixture(params=[backend.name for backend in BACKENDS])
def backend(request) -> AttentionBackend:
    found = next(backend for backend in BACKENDS if backend.name == request.param)
    if found.missing():
        pytest.skip(found.missing() or "")
    return found


def on_this_gpu(case: AttentionCase) -> AttentionCase:
    return replace(case, capability=torch.cuda.get_device_capability())


def skip_unless_supported(backend: AttentionBackend, case: AttentionCase) -> None:
    reason = backend.supports(on_this_gpu(case))
    if reason:
        pytest.skip(reason)


def ragged(case: AttentionCase) -> Documents | None:
    """Documents of one token, of odd lengths and a long one."""
    if not case.variable_length:
        return None
    total = case.batch * case.q_length
    marks = [0, 1, 130, 257, 264, 900, total]
    cu_seqlens = torch.tensor(marks, dtype=torch.int32, device="cuda")
    return Documents(cu_seqlens, int(cu_seqlens.diff().max()))


def results(
    backend: AttentionBackend,
    leaves: list[Tensor],
    gradient_sbnd: Tensor,
    documents: Documents | None,
) -> list[Tensor]:
    """The output and the gradients of q, k and v, all [s, b, heads, d]."""
    output_bsnd = backend.attend(*(t.transpose(0, 1) for t in leaves), documents=documents)
    assert output_bsnd.stride(-1) == 1
    output_sbnd = output_bsnd.transpose(0, 1)
    return [output_sbnd.detach(), *torch.autograd.grad(output_sbnd, leaves, gradient_sbnd)]


def reference(
    leaves: list[Tensor], gradient_sbnd: Tensor, documents: Documents | None
) -> list[Tensor]:
    wide = [leaf.detach().float().requires_grad_() for leaf in leaves]
    return results(MathAttention(), wide, gradient_sbnd.float(), documents)


def cancelled(
    leaves: list[Tensor], gradient_sbnd: Tensor, output_sbnd: Tensor, documents: Documents | None
) -> Tensor:
    """How far rounding the output moves each token's dq; fp32 [s, b, n]."""
    q, k, _ = (leaf.detach().float().transpose(0, 1) for leaf in leaves)
    mean_key_bsnd = MathAttention().attend(q, k, k, documents=documents)
    size = (gradient_sbnd.float() * output_sbnd).norm(dim=-1) * q.size(-1) ** -0.5
    return 2**-9 * size * mean_key_bsnd.transpose(0, 1).norm(dim=-1)


def assert_close(
    found: list[Tensor], leaves: list[Tensor], gradient_sbnd: Tensor, documents: Documents | None
) -> None:
    expected = reference(leaves, gradient_sbnd, documents)
    moved = {"dq": cancelled(leaves, gradient_sbnd, expected[0], documents)}
    for name, one, other in zip(("output", "dq", "dk", "dv"), found, expected, strict=True):
        error = one.float() - other
        whole = error.norm() / other.norm().clamp_min(1e-6)
        # One token's norm in a head, beside its own and the mean one.
        norms = other.norm(dim=-1)
        allowed = TOKEN * (norms + norms.mean()).clamp_min(1e-6) + 4 * moved.get(name, 0.0)
        token = (error.norm(dim=-1) / allowed).max()
        print(f"{name}: {float(whole):.1e} of the norm, a token {float(token):.0%} of its bound")
        assert whole < WHOLE, name
        assert token < 1, name


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(backend, name):
    case = CASES[name]
    skip_unless_supported(backend, case)
    *leaves, gradient_sbnd = random_inputs(case, torch.device("cuda"))
    documents = ragged(case)
    found = results(backend, leaves, gradient_sbnd, documents)
    assert_close(found, leaves, gradient_sbnd, documents)


@pytest.mark.parametrize("number", range(4))
def test_documents_of_a_chunk(backend, number):
    """Queries of one chunk of four: documents begin before it, within it, and run on after it."""
    case = replace(CASES["documents"], batch=1, q_length=256, kv_length=256)
    skip_unless_supported(backend, case)
    cu_seqlens = torch.tensor([0, 1, 130, 257, 700, 701, 1024], dtype=torch.int32)
    chunk = chunk_documents(cu_seqlens, number, 4, torch.device("cuda"))
    keys = replace(case, kv_length=256 * (number + 1) - chunk.first_key, variable_length=False)
    *leaves, gradient_sbnd = random_inputs(keys, torch.device("cuda"))
    found = results(backend, leaves, gradient_sbnd, chunk.documents)
    assert_close(found, leaves, gradient_sbnd, chunk.documents)


@pytest.mark.parametrize("name", ["grouped 1000", "a head each"])
def test_views_of_one_projection(backend, name):
    """q, k and v cut out of [s, b, g, (n/g + 2) * d], and a gradient with the batch outermost."""
    case = CASES[name]
    skip_unless_supported(backend, case)
    *dense, gradient_sbnd = random_inputs(case, torch.device("cuda"))
    mixed = torch.cat([tensor.detach() for tensor in dense], dim=2)
    views = [
        part.detach().requires_grad_()
        for part in mixed.split([case.heads, case.groups, case.groups], dim=2)
    ]
    assert not any(view.is_contiguous() for view in views)
    outermost = gradient_sbnd.transpose(0, 1).contiguous().transpose(0, 1)
    assert_close(results(backend, views, outermost, None), dense, gradient_sbnd, None)


def test_no_score_matrix_is_stored(backend):
    """That would be 512 MiB here: torch did not fall back to its math kernel."""
    if backend.last_resort:
        pytest.skip("stores score matrices")
    case = replace(CASES["grouped 4096"], groups=16 if backend.name == "sdpa-efficient" else 2)
    skip_unless_supported(backend, case)
    *leaves, gradient_sbnd = random_inputs(case, torch.device("cuda"))
    results(backend, leaves, gradient_sbnd, None)  # what is allocated once, is
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results(backend, leaves, gradient_sbnd, None)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 256 * 2**20


@pytest.mark.parametrize("name", ["grouped 4096", "documents d64 4096"])
def test_the_choice_is_measured_and_kept(name, tmp_path, caplog):
    case = on_this_gpu(CASES[name])
    path = tmp_path / "attention.json"
    with caplog.at_level("INFO", logger="litespark"):
        chooser = AttentionChooser(BACKENDS, measure_on_gpu, machine_name, lambda: path)
        chosen = chooser.choose(case)
    print(*caplog.messages, sep="\n")
    able = {b.name for b in BACKENDS if b.supports(case) is None and b.is_available()}
    assert chosen.name in able
    if path.exists():
        (stored,) = json.loads(path.read_text()).values()
        assert min(stored["milliseconds"], key=stored["milliseconds"].get) == chosen.name
        assert stored["failures"] == {}
        assert all(time > 0 for time in stored["milliseconds"].values())


class Alone:
    def size(self):
        return 1

    def rank(self):
        return 0


@pytest.mark.parametrize("name", ["grouped 1000", "fewer queries", "decoding", "documents"])
@pytest.mark.parametrize("training", [True, False])
def test_the_module(name, training, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    case = CASES[name]
    config = TransformerConfig(
        num_layers=1, hidden_size=2048, num_attention_heads=16, attention_dropout=0.0
    )
    module = FusedCoreAttention(
        config, 1, AttnMaskType.causal, "self", pg_collection=ProcessGroupCollection(cp=Alone())
    ).train(training)
    *leaves, gradient_sbnd = random_inputs(case, torch.device("cuda"))
    documents = ragged(case)
    packed = None
    if documents is not None:
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=documents.cu_seqlens,
            cu_seqlens_kv=documents.cu_seqlens,
            max_seqlen_q=documents.max_length,
        )
    output = module(*leaves, None, packed_seq_params=packed)
    assert output.shape == (case.q_length, case.batch, case.heads * case.head_dim)
    gradients = torch.autograd.grad(output, leaves, gradient_sbnd.flatten(2))
    found = [output.detach().unflatten(2, (case.heads, case.head_dim)), *gradients]
    assert_close(found, leaves, gradient_sbnd, documents)


@pytest.mark.parametrize("head_dim", [8, 64, 128])
@pytest.mark.parametrize("length", [32, 100, 128, 512])
def test_a_recorded_attention_is_right_too(backend, length, head_dim):
    """Replayed with other values, as in a recorded step: cuDNN's was wrong for short sequences."""
    case = replace(GROUPED, q_length=length, kv_length=length, head_dim=head_dim)
    skip_unless_supported(backend, case)
    *leaves, gradient_sbnd = random_inputs(case, torch.device("cuda"))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            results(backend, leaves, gradient_sbnd, None)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = results(backend, leaves, gradient_sbnd, None)
    for _ in range(3):
        with torch.no_grad():
            for tensor in (*leaves, gradient_sbnd):
                tensor.normal_()
        graph.replay()
        assert_close(recorded, leaves, gradient_sbnd, None)
