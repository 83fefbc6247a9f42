"""What is asked of the library and when: plans are made once a kind, workspaces once a stream."""

from __future__ import annotations

import torch

from litespark.ops.cublaslt import Scales
from litespark.ops.formats import E4M3
from tests.unit.cublaslt.fake import integers, multiply, number, poisoned


def test_what_is_called_and_when(engine, library):
    a, b = integers(16, 16, dtype=E4M3), integers(32, 16, dtype=E4M3)
    scales = Scales(number(1.0), number(1.0))
    multiply(engine, a, b, torch.empty(16, 32), scales=scales)
    assert library.names() == [
        "MatmulDescCreate",
        *["MatmulDescSetAttribute"] * 3,  # transa, transb, fast accumulation
        "Create",
        *["MatrixLayoutCreate"] * 4,
        *["MatmulDescSetAttribute"] * 2,  # two scales
        "MatmulPreferenceCreate",
        *["MatmulPreferenceSetAttribute"] * 6,
        "MatmulAlgoGetHeuristic",
        "MatmulPreferenceDestroy",
        "Matmul",
    ]
    multiply(engine, a.clone(), b.clone(), torch.empty(16, 32), scales=scales)
    assert library.names() == ["Matmul"], "other matrices of the same kind"
    other = Scales(number(2.0), scales.b_scale_inv)
    out = multiply(engine, a, b, torch.empty(16, 32), scales=other)
    assert library.names() == ["MatmulDescSetAttribute", "Matmul"], "one scale moved"
    torch.testing.assert_close(out, 2 * (a.float() @ b.float().t()))


def test_kinds_of_products_are_kept_apart(engine, library):
    """Each of these needs descriptors or an algorithm of its own."""
    a, b = integers(16, 16, dtype=E4M3), integers(16, 16, dtype=E4M3)
    out, add = torch.zeros(16, 16), torch.zeros(16, 16)
    fp8, scale = poisoned(16, 16, dtype=E4M3), number(1.0)
    wide = torch.zeros(16, 32)
    kinds = [
        (a, b, out),
        (a, b, out, out),
        (a, b, out, add),
        (a, b, out, None, None, True),
        (a, b, out, None, Scales(scale, scale)),
        (a, b, wide[:, :16]),
        (a, b, fp8, None, Scales(scale, scale)),
        (a, b, fp8, None, Scales(scale, scale, scale)),
        (a, b, fp8, None, Scales(scale, scale, scale, number(0.0))),
        (a[:8], b, out[:8]),
        (a, b.view(torch.float8_e5m2), out),
    ]
    for kind in kinds:
        multiply(engine, *kind)
    assert library.names().count("MatmulAlgoGetHeuristic") == len(kinds)
    for kind in kinds:
        multiply(engine, *kind)
    assert "MatmulAlgoGetHeuristic" not in library.names()


def test_a_misaligned_matrix_has_an_algorithm_of_its_own(engine, library):
    memory = integers(1, 200)[0]
    b, out = integers(4, 8), torch.empty(4, 4)
    multiply(engine, memory[:32].view(4, 8), b, out)
    multiply(engine, memory[1:33].view(4, 8), b, out)
    set_values = [a for name, a in library.calls if name.endswith("PreferenceSetAttribute")]
    alignments = [a[2]._obj.value for a in set_values if a[1] in (5, 6, 7, 8)]
    assert alignments == [16] * 4 + [2] * 4


def test_each_stream_has_its_own_workspace(engine, library, cuda):
    a, b = integers(4, 4), integers(4, 4)
    used = []
    for cuda.address in (1, 2, 1):
        multiply(engine, a, b, torch.empty(4, 4))
        _, arguments = library.calls[-1]
        used.append((arguments[-1], arguments[-3]))
    assert [stream for stream, _ in used] == [1, 2, 1]
    assert used[0] == used[2]
    assert used[0][1] != used[1][1]
