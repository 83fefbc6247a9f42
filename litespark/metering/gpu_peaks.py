"""Dense peak rates of GPUs, the yardstick of MFU.

Data sheets print the rate with 2:4 sparsity, which training does not use; the values here are
without it, half of the printed ones where only those are given.  A GPU that is not in the table has
no peak and so no MFU: a guess would make two runs look comparable that are not.
"""

from __future__ import annotations

import re
from typing import Literal, NamedTuple

from litespark.errors import LitesparkError

Precision = Literal["bf16", "fp32", "fp8"]


class GpuPeak(NamedTuple):
    """Dense peaks of one kind of GPU in TFLOP/s; `fp8_tflops` is None without FP8 units."""

    kind: str
    bf16_tflops: float
    fp8_tflops: float | None


# The first pattern found in torch's device name decides, so the narrower names come first.
_TABLE: tuple[tuple[re.Pattern[str], GpuPeak], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), peak)
    for pattern, peak in (
        # NVIDIA HGX B200 and GB200 data sheets: BF16 2.25 and 2.5 PFLOP/s dense, FP8 twice that.
        (r"\bGB200\b", GpuPeak("GB200", 2500, 5000)),
        (r"\bB200\b", GpuPeak("B200", 2250, 4500)),
        # NVIDIA H200 data sheet: NVL BF16 1671, SXM BF16 1979, FP8 3958, all with sparsity.
        (r"\bH200 NVL\b", GpuPeak("H200 NVL", 835.5, 1670.5)),
        (r"\bG?H200\b", GpuPeak("H200 SXM", 989, 1979)),
        # NVIDIA H100 data sheet: PCIe BF16 1513, NVL BF16 1671, SXM BF16 1979, with sparsity.
        (r"\bH[18]00 PCIe\b", GpuPeak("H100 PCIe", 756, 1513)),
        (r"\bH100 NVL\b", GpuPeak("H100 NVL", 835.5, 1670.5)),
        (r"\bH[18]00\b", GpuPeak("H100 SXM", 989, 1979)),  # H800: the same cores, a slower NVLink
        # NVIDIA A100 data sheet: BF16 312 dense for SXM and PCIe alike; no FP8 units before Hopper.
        (r"\bA[18]00\b", GpuPeak("A100", 312, None)),
        # NVIDIA L40S data sheet: BF16 362 dense, FP8 733 dense.  L4: 242 and 485 with sparsity.
        (r"\bL40S\b", GpuPeak("L40S", 362, 733)),
        (r"\bL4\b", GpuPeak("L4", 121, 242)),
    )
)


def peak_for_device(device_name: str) -> GpuPeak | None:
    """The peaks of the GPU that torch calls `device_name`, or None when they are not known.

    None too for a CPU, and for a MIG slice, which has only a part of the GPU named.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    return next((peak for pattern, peak in _TABLE if pattern.search(device_name)), None)


def check_below_peak(tflops_per_gpu: float, peak: GpuPeak, precision: Precision) -> None:
    """Refuse a rate that the hardware cannot reach: such a figure is a bug in the measurement.

    Args:
        tflops_per_gpu: TFLOP/s of one GPU with causal attention, the work really done.
        peak: the GPU's peaks.
        precision: that of the run; fp32 runs are bounded by the BF16 peak, which is above TF32's.

    Raises:
        LitesparkError: when the rate is above the peak of `precision`, or is not a number.
    """
    limit = peak.bf16_tflops
    if precision == "fp8" and peak.fp8_tflops is not None:
        limit = peak.fp8_tflops
    if not tflops_per_gpu <= limit:  # written so that NaN is refused too
        raise LitesparkError(
            f"measured {tflops_per_gpu:.1f} TFLOP/s, but the dense {precision} peak of the "
            f"{peak.kind} is {limit:g}: the time or the count of tokens is wrong"
        )
