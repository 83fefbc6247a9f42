"""The C interface of cuBLASLt: structures, prototypes, and where the library is found."""

from __future__ import annotations

import ctypes

from litespark.ops import cublaslt_library
from litespark.ops.cublaslt_library import PROTOTYPES, HeuristicResult


def test_structures_have_the_sizes_of_the_header():
    """Printed by a C program from cublasLt.h 13.1 and 12.8: sizeof and offsetof."""
    assert ctypes.sizeof(cublaslt_library.Algorithm) == 64
    assert ctypes.sizeof(HeuristicResult) == 96
    fields = ("algo", "workspace_size", "state", "waves_count", "reserved")
    assert [getattr(HeuristicResult, field).offset for field in fields] == [0, 64, 72, 76, 80]


def test_prototypes_have_the_arguments_of_the_header():
    counts = {name: len(arguments) for name, arguments in PROTOTYPES.items()}
    assert counts["cublasLtMatmul"] == 16
    assert counts["cublasLtMatmulAlgoGetHeuristic"] == 10
    assert counts["cublasLtMatrixLayoutCreate"] == 5
    assert PROTOTYPES["cublasLtMatmul"][14] is ctypes.c_size_t
    assert PROTOTYPES["cublasLtMatrixLayoutCreate"][2:] == (
        ctypes.c_uint64,
        ctypes.c_uint64,
        ctypes.c_int64,
    )


def test_the_loaded_library_is_found():
    maps = (
        "7f00-7f01 r--p 00000000 08:01 11 /site packages/nvidia/cu13/lib/libcublasLt.so.13\n"
        "7f01-7f02 r-xp 00000000 08:01 11 /site packages/nvidia/cu13/lib/libcublasLt.so.13\n"
        "7f02-7f03 r-xp 00000000 08:01 12 /site packages/nvidia/cu13/lib/libcublas.so.13\n"
        "7f03-7f04 rw-p 00000000 00:00 0 \n"
    )
    found = ["/site packages/nvidia/cu13/lib/libcublasLt.so.13"]
    assert cublaslt_library.paths_in(maps) == found
