"""The libraries that can compute softmax attention, behind one interface.

All compute o = softmax(scale * q k^T + mask) v in tiles that never reach DRAM (the math kernel
excepted), so what differs is how close each comes to the tensor cores' peak on a given GPU, shape
and number of key/value groups.  `attention_choice.py` measures that; here is what each can do.

Shapes: b batch, s sequence, n query heads, g key/value heads (n/g query heads share one), d head
size.  Tensors are [b, s, n, d] views of any strides with a contiguous last dimension, as the
projections leave them ([s, b, n, d] in memory); no library is given a copy or expanded keys.

Causal means aligned at the bottom right: the last query sees all keys.  With fewer queries than
keys (decoding, context parallelism) FlashAttention does so by itself, torch's `is_causal` aligns
at the top left and is not used there.

Document masks: tokens of all rows one after the other (row-major in b, s), `cu_seqlens` marking
where documents begin; a token sees its own document only.  Of a document that began before the
queries do, they are the last part: marks of their own say where its keys begin.
Sources: Dao 2023, arXiv 2307.08691; Shah et al. 2024, arXiv 2407.08608.
"""

from __future__ import annotations

import importlib
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from litespark.errors import LitesparkError
from litespark.modules.documents import Documents, document_places

_HALF = (torch.bfloat16, torch.float16)
Inputs: TypeAlias = tuple[Tensor, Tensor, Tensor]
Limits: TypeAlias = Iterable[tuple[bool, str]]


@dataclass(frozen=True)
class AttentionCase:
    """What decides which library is the fastest; hashable.

    `capability` is the GPU's compute capability.  With `variable_length` there are document masks,
    and the queries count (batch * q_length), neither the documents nor their keys, which differ
    from batch to batch: `kv_length` is `q_length` then.

    Raises:
        LitesparkError: lengths or heads that no mask is defined for.
    """

    batch: int
    q_length: int
    kv_length: int
    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype
    device_type: str
    capability: tuple[int, int] | None = None
    causal: bool = True
    variable_length: bool = False

    def __post_init__(self) -> None:
        if self.heads % self.groups:
            raise LitesparkError(f"{self.heads} query heads over {self.groups} key/value heads")
        if (self.causal and self.q_length > self.kv_length) or (
            self.variable_length and self.q_length != self.kv_length
        ):
            raise LitesparkError(
                f"attention of {self.q_length} queries to {self.kv_length} keys: causal attention "
                "takes at most as many queries as keys, and document masks the same number"
            )

    @classmethod
    def of(
        cls, q_bsnd: Tensor, k_bsgd: Tensor, *, causal: bool = True, variable_length: bool = False
    ) -> AttentionCase:
        """The case that these tensors are."""
        batch, q_length, heads, head_dim = q_bsnd.shape
        return cls(
            batch=batch,
            q_length=q_length,
            kv_length=q_length if variable_length else k_bsgd.size(1),
            heads=heads,
            groups=k_bsgd.size(2),
            head_dim=head_dim,
            dtype=q_bsnd.dtype,
            device_type=q_bsnd.device.type,
            capability=_capability(q_bsnd.device) if q_bsnd.is_cuda else None,
            causal=causal,
            variable_length=variable_length,
        )

    def __str__(self) -> str:
        kind = ("causal " if self.causal else "") + ("documents " if self.variable_length else "")
        return (
            f"b{self.batch} q{self.q_length} k{self.kv_length} h{self.heads}/{self.groups} "
            f"d{self.head_dim} {kind}{str(self.dtype).removeprefix('torch.')}"
        )


@lru_cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class AttentionBackend(ABC):
    """One library's attention.

    `last_resort` marks one that holds whole score matrices: taken only where no other can.
    """

    name: str
    last_resort: ClassVar[bool] = False

    def missing(self) -> str | None:
        """Why the library cannot be used on this machine at all; None when it can."""
        return None

    def is_available(self) -> bool:
        """Whether the library is installed and can be imported (which the first call does)."""
        return self.missing() is None

    def supports(self, case: AttentionCase) -> str | None:
        """Why the library cannot compute this case; None when it can."""
        return next((reason for holds, reason in self._limits(case) if holds), None)

    def attend(
        self,
        q_bsnd: Tensor,
        k_bsgd: Tensor,
        v_bsgd: Tensor,
        *,
        scale: float | None = None,
        causal_bottom_right: bool = True,
        documents: Documents | None = None,
    ) -> Tensor:
        """Attention of a supported case, differentiable; [b, s, n, d], last dimension contiguous.

        `scale` None is 1/sqrt(d).  With documents, rows that do not follow each other in memory are
        copied; a single row never is.
        """
        if documents is None:
            return self._attend_rows((q_bsnd, k_bsgd, v_bsgd), scale, causal_bottom_right)
        flat = (q_bsnd.flatten(0, 1), k_bsgd.flatten(0, 1), v_bsgd.flatten(0, 1))
        output_tnd = self._attend_documents(flat, scale, causal_bottom_right, documents)
        return output_tnd.unflatten(0, q_bsnd.shape[:2])

    @abstractmethod
    def _limits(self, case: AttentionCase) -> Limits:
        """What the library does not do: whether the case asks for it, and how to say so."""

    @abstractmethod
    def _attend_rows(self, qkv_bsnd: Inputs, scale: float | None, causal: bool) -> Tensor:
        """Every row of the batch to itself; [b, s, n, d]."""

    def _attend_documents(
        self, qkv_tnd: Inputs, scale: float | None, causal: bool, documents: Documents
    ) -> Tensor:
        """Every document to itself; [t, n, d]."""
        raise LitesparkError(f"the attention '{self.name}' has no document masks")


class FlashLibrary(AttentionBackend):
    """A FlashAttention package: versions 2, 3 and 4 (CuTe) take the same arguments by name.

    Args:
        name: what the choice is called.
        module: where `flash_attn_func` and `flash_attn_varlen_func` are.
        head_limits: the largest head for each major compute capability it has a backward for.
    """

    def __init__(self, name: str, module: str, head_limits: Mapping[int, int]) -> None:
        self.name = name
        self.module = module
        self.head_limits = head_limits

    def missing(self) -> str | None:
        """Why the module cannot be imported; None when it is."""
        return _import_problem(self.module)

    def _limits(self, case: AttentionCase) -> Limits:
        major = case.capability[0] if case.capability else 0
        limit = self.head_limits.get(major, 0)
        return (
            *_cuda_halves(case),
            (limit == 0, f"has no kernels for compute capability {major}.x"),
            (case.head_dim > limit, f"takes heads up to {limit}"),
        )

    def _attend_rows(self, qkv_bsnd: Inputs, scale: float | None, causal: bool) -> Tensor:
        library = importlib.import_module(self.module)
        return _first(library.flash_attn_func(*qkv_bsnd, softmax_scale=scale, causal=causal))

    def _attend_documents(
        self, qkv_tnd: Inputs, scale: float | None, causal: bool, documents: Documents
    ) -> Tensor:
        library = importlib.import_module(self.module)
        return _first(
            library.flash_attn_varlen_func(
                *qkv_tnd,
                cu_seqlens_q=documents.cu_seqlens,
                cu_seqlens_k=documents.of_keys.cu_seqlens,
                max_seqlen_q=documents.max_length,
                max_seqlen_k=documents.of_keys.max_length,
                softmax_scale=scale,
                causal=causal,
            )
        )


class TorchAttention(AttentionBackend):
    """torch's `scaled_dot_product_attention`, held to one of its kernels.

    With one kernel enabled torch raises where that kernel cannot run, instead of taking another.
    """

    kernel: ClassVar[SDPBackend]

    def _attend_rows(self, qkv_bsnd: Inputs, scale: float | None, causal: bool) -> Tensor:
        q_length, kv_length = qkv_bsnd[0].size(1), qkv_bsnd[1].size(1)
        causal = causal and q_length > 1  # the newest token alone sees every key
        square = q_length == kv_length
        mask = None
        if causal and not square:
            mask = self._bottom_right_mask(q_length, kv_length, qkv_bsnd[0].device)
        return self._call(qkv_bsnd, mask, is_causal=causal and square, scale=scale)

    def _call(
        self, qkv_bsnd: Inputs, mask: Tensor | None, *, is_causal: bool, scale: float | None
    ) -> Tensor:
        q_bnsd, k_bgsd, v_bgsd = (tensor.transpose(1, 2) for tensor in qkv_bsnd)
        grouped = q_bnsd.size(1) != k_bgsd.size(1)
        # torch's CPU kernels: the tiled one is better than the math one in every way.
        with sdpa_kernel(self.kernel) if q_bnsd.is_cuda else nullcontext():
            output_bnsd = F.scaled_dot_product_attention(
                q_bnsd, k_bgsd, v_bgsd, mask, is_causal=is_causal, scale=scale, enable_gqa=grouped
            )
        return output_bnsd.transpose(1, 2)

    def _bottom_right_mask(self, q_length: int, kv_length: int, device: torch.device) -> Tensor:
        """A mark, not a matrix: the kernel is told which diagonal it is."""
        return causal_lower_right(q_length, kv_length)


# Replayed from a CUDA graph its kernels for 32 tokens give wrong values, or read where nothing is
# (torch 2.11+cu130 on an H200); for 128 and more they give the same bits as without a graph.
_CUDNN_SHORTEST = 128


class CudnnAttention(TorchAttention):
    """cuDNN's attention through torch, which lets it align causality at the top left only."""

    name = "cudnn"
    kernel = SDPBackend.CUDNN_ATTENTION

    def _limits(self, case: AttentionCase) -> Limits:
        oblong = case.causal and 1 < case.q_length < case.kv_length
        too_short = min(case.q_length, case.kv_length) < _CUDNN_SHORTEST
        return (
            *_cuda_halves(case),
            (case.variable_length, "has no document masks in torch"),
            (case.head_dim > 128, "takes heads up to 128"),
            (too_short, f"takes {_CUDNN_SHORTEST} tokens or more"),
            (oblong, "takes no causal mask with fewer queries than keys in torch"),
        )


class TorchFlashAttention(TorchAttention):
    """FlashAttention 2 as built into torch."""

    name = "sdpa-flash"
    kernel = SDPBackend.FLASH_ATTENTION

    def _limits(self, case: AttentionCase) -> Limits:
        yield from _cuda_halves(case)
        yield case.head_dim > 256, "takes heads up to 256"
        if case.variable_length:  # importing it takes seconds
            complete = {"scale", "window_size"} <= _varlen_arguments()
            yield not complete, "this torch has no varlen_attn with a scale and a window"

    def _attend_documents(
        self, qkv_tnd: Inputs, scale: float | None, causal: bool, documents: Documents
    ) -> Tensor:
        from torch.nn.attention import varlen

        options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
        if "enable_gqa" in _varlen_arguments():  # older ones take fewer groups unasked
            options["enable_gqa"] = qkv_tnd[0].size(1) != qkv_tnd[1].size(1)
        keys = documents.of_keys
        marks = (documents.cu_seqlens, keys.cu_seqlens)
        longest = (documents.max_length, keys.max_length)
        return _first(varlen.varlen_attn(*qkv_tnd, *marks, *longest, **options))


class TorchEfficientAttention(TorchAttention):
    """The CUTLASS kernel that torch has from xFormers: also fp32 and older GPUs."""

    name = "sdpa-efficient"
    kernel = SDPBackend.EFFICIENT_ATTENTION

    def _limits(self, case: AttentionCase) -> Limits:
        return (
            *_cuda_floats(case, (*_HALF, torch.float32)),
            (case.groups != case.heads, "takes no grouped key/value heads"),
            (case.variable_length, "has no document masks in torch"),
        )


class MathAttention(TorchAttention):
    """Everything: whole score matrices in memory on a GPU, torch's tiled kernel on a CPU."""

    name = "sdpa-math"
    kernel = SDPBackend.MATH
    last_resort = True

    def _limits(self, case: AttentionCase) -> Limits:
        return ()

    def _bottom_right_mask(self, q_length: int, kv_length: int, device: torch.device) -> Tensor:
        ones = torch.ones(q_length, kv_length, dtype=torch.bool, device=device)
        return ones.tril(kv_length - q_length)

    def _attend_documents(
        self, qkv_tnd: Inputs, scale: float | None, causal: bool, documents: Documents
    ) -> Tensor:
        q_1tnd, k_1tgd, v_1tgd = (tensor[None] for tensor in qkv_tnd)
        query_q, before_end_q = document_places(documents.cu_seqlens, q_1tnd.size(1))
        key_k, before_end_k = document_places(documents.of_keys.cu_seqlens, k_1tgd.size(1))
        mask_qk = query_q[:, None] == key_k
        if causal:
            mask_qk &= before_end_q[:, None] <= before_end_k
        return self._call((q_1tnd, k_1tgd, v_1tgd), mask_qk, is_causal=False, scale=scale)[0]


def _cuda_halves(case: AttentionCase) -> Limits:
    too_old = case.capability is not None and case.capability < (8, 0)
    return (*_cuda_floats(case, _HALF), (too_old, "needs compute capability 8.0"))


def _cuda_floats(case: AttentionCase, dtypes: tuple[torch.dtype, ...]) -> Limits:
    return (
        (case.device_type != "cuda", "needs a CUDA device"),
        (case.dtype not in dtypes, f"takes no {case.dtype}"),
        (case.head_dim % 8 != 0, "takes heads of a multiple of 8"),
    )


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The output of a function that, depending on its version, returns the log-sum-exp too."""
    return output if isinstance(output, Tensor) else output[0]


@lru_cache
def _import_problem(module: str) -> str | None:
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"the Python module '{error.name}' is not installed"
    except Exception as error:  # a binary for another torch raises almost anything
        return f"importing {module} failed: {error!r}"
    # FlashAttention 4 makes `flash_attn` importable without version 2 in it.
    if not hasattr(found, "flash_attn_func"):
        return f"the Python module '{module}' has no flash_attn_func"
    return None


@lru_cache
def _varlen_arguments() -> frozenset[str]:
    from torch.nn.attention import varlen

    return frozenset(inspect.signature(varlen.varlen_attn).parameters)


# In the order in which they are taken unmeasured: what starts at once before what compiles kernels
# (FlashAttention 4) or plans (cuDNN) for new shapes, which generating a text has at every token.
BACKENDS: tuple[AttentionBackend, ...] = (
    FlashLibrary("flash3", "flash_attn_interface", {9: 256}),
    FlashLibrary("flash2", "flash_attn", {8: 256, 9: 256, 10: 256, 12: 256}),
    TorchFlashAttention(),
    TorchEfficientAttention(),
    FlashLibrary("flash-cute", "flash_attn.cute", {9: 256, 10: 128, 11: 128, 12: 128}),
    CudnnAttention(),
    MathAttention(),
)
