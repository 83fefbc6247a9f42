"""libcublasLt through ctypes: the constants, structures and functions that `cublaslt` uses.

Each constant bears its name in NVIDIA's headers: cublasLt.h and cublas_api.h (cuBLAS 13.1 and 12.8,
which agree in all that stands here) and library_types.h (CUDA 13.0).  Attributes are set through a
pointer to the value and its size, which the library compares with the size it expects; it copies
the value.  Enums are C ints.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import c_char_p, c_float, c_int, c_int64, c_size_t, c_uint64, c_void_p
from pathlib import Path
from typing import Any

import torch

from litespark.errors import LitesparkError
from litespark.ops.formats import E4M3, E5M2

CUDA_TYPES = {  # cudaDataType
    torch.float32: 0,  # CUDA_R_32F
    torch.bfloat16: 14,  # CUDA_R_16BF
    E4M3: 28,  # CUDA_R_8F_E4M3
    E5M2: 29,  # CUDA_R_8F_E5M2
}
COMPUTE_32F = 68  # CUBLAS_COMPUTE_32F, a cublasComputeType_t
OP_N, OP_T = 0, 1  # CUBLAS_OP_N, CUBLAS_OP_T
SUCCESS = 0  # CUBLAS_STATUS_SUCCESS
NOT_SUPPORTED = 15  # CUBLAS_STATUS_NOT_SUPPORTED

# cublasLtMatmulDescAttributes_t.  The pointer mode stays at its default, host: alpha and beta are
# read before cublasLtMatmul returns.
DESC_TRANSA = 3  # CUBLASLT_MATMUL_DESC_TRANSA, int32
DESC_TRANSB = 4  # CUBLASLT_MATMUL_DESC_TRANSB, int32
DESC_A_SCALE = 17  # CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, const void*
DESC_B_SCALE = 18  # CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, const void*
DESC_D_SCALE = 20  # CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, const void*
DESC_AMAX_D = 21  # CUBLASLT_MATMUL_DESC_AMAX_D_POINTER, void*
DESC_FAST_ACCUM = 25  # CUBLASLT_MATMUL_DESC_FAST_ACCUM, int8

# cublasLtMatmulPreferenceAttributes_t
PREF_WORKSPACE = 1  # CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, uint64
PREF_REDUCTION = 3  # CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, uint32
PREF_ALIGNMENTS = (5, 6, 7, 8)  # CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_{A,B,C,D}_BYTES, uint32
# CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE: a product split along k is summed in fp32, never in the
# output's type.  Unsplit ones (..._NONE, 0) pass any mask.
FP32_REDUCTION = 2


class Algorithm(ctypes.Structure):
    """`cublasLtMatmulAlgo_t`: 64 opaque bytes."""

    _fields_ = (("data", c_uint64 * 8),)


class HeuristicResult(ctypes.Structure):
    """`cublasLtMatmulHeuristicResult_t`: 96 bytes, of which the algorithm is the first field."""

    _fields_ = (
        ("algo", Algorithm),
        ("workspace_size", c_size_t),
        ("state", c_int),  # cublasStatus_t
        ("waves_count", c_float),
        ("reserved", c_int * 4),
    )


# All return a cublasStatus_t.  Handles, descriptors and whatever is written to are pointers.
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cublasLtCreate": (c_void_p,),  # where the handle is written to
    "cublasLtMatmulDescCreate": (c_void_p, c_int, c_int),  # ., compute type, type of alpha and beta
    "cublasLtMatmulDescSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatrixLayoutCreate": (c_void_p, c_int, c_uint64, c_uint64, c_int64),  # type, r, c, ld
    "cublasLtMatmulPreferenceCreate": (c_void_p,),
    "cublasLtMatmulPreferenceSetAttribute": (c_void_p, c_int, c_void_p, c_size_t),
    "cublasLtMatmulPreferenceDestroy": (c_void_p,),
    # handle, description, layouts of A, B, C, D, preference; wanted; results, number of results
    "cublasLtMatmulAlgoGetHeuristic": (*[c_void_p] * 7, c_int, c_void_p, c_void_p),
    # handle, description, alpha, A, its layout, B, its layout, beta, C, its layout, D, its layout,
    # algorithm, workspace; bytes of it; stream
    "cublasLtMatmul": (*[c_void_p] * 14, c_size_t, c_void_p),
}


def create(library: Any, name: str, text: str, *arguments: int) -> int:
    """Call a function that writes the address of what it made to its first argument.

    Raises:
        LitesparkError: it failed; the message holds `text`, which says what it was for.
    """
    made = c_void_p()
    check(library, name, getattr(library, name)(ctypes.byref(made), *arguments), text)
    assert made.value is not None, "success means that it was written"
    return made.value


def set_attribute(
    library: Any, name: str, text: str, target: int, attribute: int, value: Any
) -> None:
    """Call a `...SetAttribute` function with a ctypes value.

    Raises:
        LitesparkError: it failed; the message holds `text`, which says what it was for.
    """
    function = getattr(library, name)
    status = function(target, attribute, ctypes.byref(value), ctypes.sizeof(value))
    check(library, f"{name}({attribute})", status, text)


def check(library: Any, name: str, status: int, text: str) -> None:
    """Raise the LitesparkError for a status other than success, with the library's name for it."""
    if status != SUCCESS:
        status_name = library.cublasLtGetStatusName(status).decode()
        raise LitesparkError(f"{name} returned {status_name} for {text}")


def paths_in(maps: str) -> list[str]:
    """The libcublasLt files in the text of /proc/self/maps, each once."""
    paths = (line[line.index("/") :] for line in maps.splitlines() if "/libcublasLt.so" in line)
    return list(dict.fromkeys(paths))


def with_prototypes(library: Any) -> Any:
    """The same library, its functions told what they take and return."""
    for name, arguments in PROTOTYPES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, c_int
    library.cublasLtGetStatusName.argtypes = (c_int,)
    library.cublasLtGetStatusName.restype = c_char_p
    library.cublasLtGetVersion.argtypes = ()
    library.cublasLtGetVersion.restype = c_size_t
    return library


@functools.cache
def find_library() -> Any:
    """libcublasLt, the copy that torch loaded, with prototypes; None where there is none."""
    if torch.version.cuda is None:
        return None
    major = torch.version.cuda.split(".")[0]
    name, packages = f"libcublasLt.so.{major}", Path(torch.__file__).parents[1]
    folders = ("torch/lib", f"nvidia/cu{major}/lib", "nvidia/cublas/lib")
    maps = Path("/proc/self/maps")
    loaded = paths_in(maps.read_text()) if maps.exists() else []
    for path in (*loaded, name, *(str(packages / folder / name) for folder in folders)):
        try:
            return with_prototypes(ctypes.CDLL(path))
        except OSError:
            continue
    return None
