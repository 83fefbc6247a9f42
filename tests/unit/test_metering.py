"""FLOPs against the published figures, peaks by device name, energy with a fake driver, memory."""

import logging
import resource
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from litespark.errors import LitesparkError
from litespark.metering import memory
from litespark.metering.energy import EnergyMeter
from litespark.metering.flops import (
    flops_per_token,
    matrix_parameters,
    mfu,
    tflops,
    total_parameters,
)
from litespark.metering.gpu_peaks import check_below_peak, peak_for_device
from litespark.metering.memory import peak_memory_bytes


@dataclass(frozen=True)
class Shape:
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    head_dim: int
    vocab_size: int


PAPER_3B = Shape(28, 2048, 11008, 16, 2, 128, 32000)
PAPER_30B = Shape(60, 6656, 17920, 64, 64, 104, 32000)


@pytest.mark.parametrize(
    ("shape", "causal_gigaflops", "full_gigaflops", "digits"),
    [(PAPER_3B, 14.75, 16.16, 2), (PAPER_30B, 203.7, 213.5, 1)],
)
def test_flops_per_token_of_the_papers_models(shape, causal_gigaflops, full_gigaflops, digits):
    assert round(flops_per_token(shape, 4096, causal=True) / 1e9, digits) == causal_gigaflops
    assert round(flops_per_token(shape, 4096, causal=False) / 1e9, digits) == full_gigaflops


def test_parameters_of_the_papers_models():
    assert round(total_parameters(PAPER_3B, tie_embeddings=False) / 1e9, 2) == 2.29
    assert round(total_parameters(PAPER_30B, tie_embeddings=False) / 1e9, 1) == 32.5


def test_parameters_equal_those_of_a_model_built_by_hand():
    shape = Shape(3, 24, 40, 6, 2, 8, 50)  # head_dim × heads (48) is not the hidden size
    layer = [(24, 48), (24, 16), (24, 16), (48, 24), (24, 40), (24, 40), (40, 24)]
    matrices = 3 * sum(rows * columns for rows, columns in layer) + 50 * 24
    norms = 3 * 2 * 24 + 24
    assert matrix_parameters(shape) == matrices
    assert total_parameters(shape, tie_embeddings=False) == matrices + 50 * 24 + norms
    assert total_parameters(shape, tie_embeddings=True) == matrices + norms
    biases, head_norms = 3 * (48 + 16 + 16), 3 * (8 + 8)
    assert total_parameters(shape, True, qkv_bias=True) == matrices + norms + biases
    assert total_parameters(shape, True, qk_norm=True) == matrices + norms + head_norms


def test_flops_equal_the_products_counted_one_by_one():
    """Counts multiply-adds of numpy products forward and backward, full attention, one layer."""
    shape = Shape(1, 12, 20, 3, 1, 4, 30)
    s = 7
    flops = 0

    def product(a, b):
        nonlocal flops
        flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        return np.zeros((a.shape[0], b.shape[1]))

    def trained(x, rows, columns):
        y = product(x, np.zeros((rows, columns)))
        product(y, np.zeros((columns, rows)))  # gradient of x
        product(x.T, y)  # gradient of the weight
        return y

    x = np.zeros((s, 12))
    trained(x, 12, 12 + 2 * 4)
    for _ in range(3):
        for _ in range(3):  # forward, and the gradients of both factors
            product(np.zeros((s, 4)), np.zeros((4, s)))  # QK^T
            product(np.zeros((s, s)), np.zeros((s, 4)))  # PV
    trained(np.zeros((s, 12)), 12, 12)
    trained(x, 12, 20)
    trained(x, 12, 20)
    trained(np.zeros((s, 20)), 20, 12)
    trained(x, 12, 30)
    assert flops == s * flops_per_token(shape, s, causal=False)


def test_causal_attention_is_half_of_full_attention():
    without = 6 * matrix_parameters(PAPER_3B)
    causal = flops_per_token(PAPER_3B, 4096, causal=True) - without
    full = flops_per_token(PAPER_3B, 4096, causal=False) - without
    assert 2 * causal == full == 12 * 28 * 2048 * 4096


def test_the_run_schemas_model_has_the_shape():
    from litespark.config import ModelConfig

    model = ModelConfig.model_validate({"preset": "paper-3b"})
    assert flops_per_token(model, 4096, causal=True) == flops_per_token(PAPER_3B, 4096, causal=True)


@pytest.mark.parametrize(
    ("preset", "matrices", "length", "causal", "full"),
    [
        # By hand: L (h (n + 2 g) d + n d h + 3 h f) + v h; 6 of it + 6 (or 12) L n d s.
        ("tiny", 4 * (128 * 256 + 128 * 128 + 3 * 128 * 384) + 2048 * 128, 512, 7864320, 9437184),
        ("paper-3b", 2_223_505_408, 4096, 14_750_318_592, 16_159_604_736),
        ("paper-30b", 32_315_146_240, 4096, 203_705_548_800, 213_520_220_160),
        ("llama-160m", 137_822_208, 2048, 940_179_456, 1_053_425_664),
        ("llama2-7b", 6_607_077_376, 4096, 42_863_689_728, 46_084_915_200),
        ("llama2-13b", 12_851_609_600, 4096, 82_142_822_400, 87_175_987_200),
        ("llama3-8b", 7_504_658_432, 4096, 48_249_176_064, 51_470_401_536),
        ("llama3-70b", 69_501_714_432, 4096, 433_116_413_952, 449_222_541_312),
        # Tied heads are multiplied with all the same.
        ("llama3.2-1b", 1_235_746_816, 4096, 8_219_787_264, 9_025_093_632),
        ("llama3.2-3b", 3_212_574_720, 4096, 21_389_377_536, 23_503_306_752),
    ],
)
def test_flops_of_every_llama_preset(preset, matrices, length, causal, full):
    from litespark.config import ModelConfig

    model = ModelConfig.model_validate({"preset": preset})
    layers, hidden, ffn = model.num_layers, model.hidden_size, model.ffn_hidden_size
    width, groups = (
        n * model.head_dim for n in (model.num_attention_heads, model.num_query_groups)
    )
    layer = hidden * (width + 2 * groups) + width * hidden + 3 * hidden * ffn
    assert matrix_parameters(model) == layers * layer + model.vocab_size * hidden == matrices
    attention = 6 * layers * width * length
    assert flops_per_token(model, length, causal=True) == 6 * matrices + attention == causal
    assert flops_per_token(model, length, causal=False) == 6 * matrices + 2 * attention == full


def test_documents_shorten_what_a_token_attends_to():
    """Two documents of 1024 and one of 2048 in a sequence: a token's mean document is 1536."""
    mean = (2 * 1024**2 + 2048**2) / 4096
    masked = flops_per_token(PAPER_3B, mean, causal=True)
    whole = flops_per_token(PAPER_3B, 4096, causal=True)
    assert whole - masked == 6 * 28 * 2048 * (4096 - 1536)


def test_mfu():
    rate = tflops(30_000, flops_per_token(PAPER_3B, 4096, causal=True))
    assert rate == pytest.approx(442.5, rel=1e-3)
    assert mfu(rate, 989) == pytest.approx(0.4474, rel=1e-3)
    assert mfu(rate, None) is None
    with pytest.raises(ValueError, match="must be positive"):
        mfu(rate, 0.0)


@pytest.mark.parametrize(
    ("name", "bf16_tflops", "fp8_tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 1979),
        ("NVIDIA H100 PCIe", 756, 1513),
        ("NVIDIA H100 NVL", 835.5, 1670.5),
        ("NVIDIA H200", 989, 1979),
        ("NVIDIA H200 NVL", 835.5, 1670.5),
        ("NVIDIA GH200 480GB", 989, 1979),
        ("NVIDIA A100-SXM4-80GB", 312, None),
        ("NVIDIA A100 80GB PCIe", 312, None),
        ("NVIDIA B200", 2250, 4500),
        ("NVIDIA GB200", 2500, 5000),
        ("NVIDIA L40S", 362, 733),
        ("NVIDIA L4", 121, 242),
    ],
)
def test_peaks_by_device_name(name, bf16_tflops, fp8_tflops):
    peak = peak_for_device(name)
    assert peak is not None
    assert (peak.bf16_tflops, peak.fp8_tflops) == (bf16_tflops, fp8_tflops)


@pytest.mark.parametrize(
    "name",
    ["cpu", "", "NVIDIA L40", "NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3 MIG 1g.10gb"],
)
def test_unknown_devices_have_no_peak(name):
    assert peak_for_device(name) is None


def test_a_rate_above_the_peak_is_an_error():
    h100, a100 = peak_for_device("NVIDIA H100 80GB HBM3"), peak_for_device("NVIDIA A100-SXM4-80GB")
    assert h100 is not None
    assert a100 is not None
    check_below_peak(989.0, h100, "bf16")
    check_below_peak(1500.0, h100, "fp8")
    with pytest.raises(LitesparkError, match=r"1500\.0 TFLOP/s.*bf16 peak of the H100 SXM is 989"):
        check_below_peak(1500.0, h100, "bf16")
    with pytest.raises(LitesparkError, match="fp8 peak"):
        check_below_peak(2000.0, h100, "fp8")
    with pytest.raises(LitesparkError, match="312"):  # no FP8 units: the BF16 peak bounds it
        check_below_peak(400.0, a100, "fp8")
    with pytest.raises(LitesparkError, match="nan"):
        check_below_peak(float("nan"), h100, "bf16")


class FakeNvml(types.ModuleType):
    """NVML with two GPUs; `CUDA device 0` is the one with the UUID `beef`."""

    def __init__(self, counters, fault=None):
        super().__init__("pynvml")
        self.counters = counters
        self.fault = fault
        self.num_reads = 0

    def nvmlInit(self):
        if self.fault == "init":
            raise RuntimeError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid not in self.counters:
            raise RuntimeError("Not Found")
        return uuid

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.num_reads += 1
        if self.fault == "read":
            raise RuntimeError("Not Supported")
        return self.counters[handle]


@pytest.fixture
def one_gpu(monkeypatch):
    """A machine whose CUDA_VISIBLE_DEVICES leaves one GPU, the second on the bus."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(uuid="beef")
    )

    def install(nvml):
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return install


def test_energy_of_this_processes_gpu_by_uuid(one_gpu, caplog):
    nvml = one_gpu(FakeNvml({"GPU-cafe": 7, "GPU-beef": 1_234_500}))
    meter = EnergyMeter()
    assert meter.read_joules() == pytest.approx(1234.5)
    nvml.counters["GPU-beef"] += 500
    assert meter.read_joules() == pytest.approx(1235.0)
    assert not caplog.records


@pytest.mark.parametrize(
    ("counters", "fault", "reason"),
    [
        ({"GPU-beef": 1}, "init", "Driver Not Loaded"),
        ({"GPU-cafe": 1}, None, "Not Found"),
        ({"GPU-beef": 1}, "read", "Not Supported"),
    ],
)
def test_energy_that_cannot_be_read_is_none_with_one_warning(
    one_gpu, caplog, counters, fault, reason
):
    nvml = one_gpu(FakeNvml(counters, fault))
    with caplog.at_level(logging.WARNING):
        meter = EnergyMeter()
        assert [meter.read_joules() for _ in range(3)] == [None, None, None]
    assert [reason in record.getMessage() for record in caplog.records] == [True]
    assert nvml.num_reads <= 1


def test_energy_without_pynvml_is_none_with_one_warning(one_gpu, caplog):
    one_gpu(None)  # None in sys.modules makes the import fail
    assert EnergyMeter().read_joules() is None
    assert len(caplog.records) == 1


def test_energy_on_a_cpu_machine_is_none_and_silent(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert EnergyMeter().read_joules() is None
    assert not caplog.records


def test_peak_memory_of_a_cpu_process_grows_and_stays():
    before = peak_memory_bytes("cpu")
    block = np.ones(before // 8 + (64 << 20) // 8)  # larger than everything so far: a new peak
    assert peak_memory_bytes("cpu") >= block.nbytes
    size_bytes = block.nbytes
    del block
    assert peak_memory_bytes("cpu") >= size_bytes


def test_peak_memory_where_there_is_no_proc(monkeypatch):
    monkeypatch.setattr(memory, "_STATUS_FILE", Path("/nonexistent/status"))
    usage = types.SimpleNamespace(ru_maxrss=3000)
    monkeypatch.setattr(resource, "getrusage", lambda who: usage)
    monkeypatch.setattr(sys, "platform", "linux")
    assert peak_memory_bytes("cpu") == 3000 * 1024
    monkeypatch.setattr(sys, "platform", "darwin")
    assert peak_memory_bytes("cpu") == 3000


def test_peak_memory_of_a_gpu_is_the_allocators(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 123)
    assert peak_memory_bytes() == 123
