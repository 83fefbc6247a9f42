"""The memory that a checkpoint is copied to: the values, the room it takes, and its use again."""

from __future__ import annotations

import io

import pytest
import torch

from litespark.checkpoint import host_copy
from litespark.checkpoint.host_copy import HostBuffers, padded


def sources():
    """Dtypes of 1 to 8 bytes, odd numbers of elements, none, no axis, and a transposed one."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(13, 7, generator=generator)
    return [
        wide,
        wide.t(),
        wide[3:, 2:5],
        wide.bfloat16(),
        wide[0].to(torch.float8_e4m3fn),
        wide.double(),
        wide > 0,
        torch.tensor(3, dtype=torch.int64),
        torch.empty(0, 4),
        torch.nn.Parameter(wide[:1].clone()),
    ]


def copied(buffers, tensors):
    buffers.reserve(sum(padded(t.numel() * t.itemsize) for t in tensors), pinned=False)
    copies = [buffers.copy(tensor) for tensor in tensors]
    buffers.finish()
    return copies


def assert_equal(copies, tensors):
    for copy, tensor in zip(copies, tensors, strict=True):
        assert (copy.dtype, copy.shape) == (tensor.dtype, tensor.shape)
        assert copy.is_contiguous()
        assert not copy.requires_grad
        assert torch.equal(copy.double(), tensor.detach().double())


@pytest.mark.parametrize("part_bytes", [1 << 20, 64, 100])
def test_values_of_any_dtype_also_where_a_tensor_crosses_from_part_to_part(part_bytes, monkeypatch):
    monkeypatch.setattr(host_copy, "_PIN_BYTES", part_bytes)
    tensors = sources()
    assert_equal(copied(HostBuffers(), tensors), tensors)


def test_what_is_written_is_the_tensor_and_not_the_block():
    tensors = [torch.arange(100.0) + number for number in range(50)]
    for copy, tensor in zip(copied(HostBuffers(), tensors), tensors, strict=True):
        file, alone = io.BytesIO(), io.BytesIO()
        torch.save(copy, file)
        torch.save(tensor, alone)
        assert file.getvalue() == alone.getvalue()


def test_the_originals_may_change_at_once():
    tensors = [torch.ones(5), torch.ones(3, 3)]
    copies = copied(HostBuffers(), tensors)
    for tensor in tensors:
        tensor.zero_()
    assert_equal(copies, [torch.ones(5), torch.ones(3, 3)])


def test_memory_is_used_again_and_grows_when_it_must():
    buffers = HostBuffers()
    first = copied(buffers, [torch.ones(1000)])[0]
    again = copied(buffers, [torch.full((500,), 2.0), torch.full((100,), 3.0)])
    assert again[0].data_ptr() == first.data_ptr(), "allocated anew"
    assert first[:500].eq(2).all(), "not the same memory"
    grown = copied(buffers, [torch.full((5000,), 4.0)])[0]
    assert grown.eq(4).all()
    assert again[1].eq(3).all(), "a copy that is still held was freed"


class Cuda:
    """Stands for the CUDA runtime: which memory is registered now, and what is refused."""

    class cudaError:
        success = 0

    def __init__(self, refused=()):
        self.registered, self.calls, self.refused = {}, 0, refused

    def cudaHostRegister(self, address, size_bytes, flags):
        self.calls += 1
        if self.calls in self.refused:
            return 2
        assert address not in self.registered
        self.registered[address] = size_bytes
        return 0

    def cudaHostUnregister(self, address):
        del self.registered[address]


@pytest.fixture
def cuda(monkeypatch):
    runtime = Cuda()
    monkeypatch.setattr(host_copy, "_cudart", lambda: runtime)
    monkeypatch.setattr(host_copy, "_PIN_BYTES", 1000)
    monkeypatch.setattr(host_copy, "_PINNING_THREADS", 1)  # so that calls have an order
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    return runtime


def test_all_of_the_block_is_pinned_once_and_unpinned_before_it_is_freed(cuda):
    buffers = HostBuffers()
    for _ in range(3):
        buffers.reserve(2500, pinned=True)
    assert sorted(cuda.registered.values()) == [500, 1000, 1000]
    assert cuda.calls == 3
    buffers.reserve(4000, pinned=True)
    assert sorted(cuda.registered.values()) == [1000] * 4
    del buffers
    assert cuda.registered == {}


def test_memory_is_got_ready_once_in_the_background_for_the_device_of_the_caller(cuda, monkeypatch):
    devices = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    buffers = HostBuffers()
    buffers.prepare(2500)
    buffers.reserve(2400, pinned=True)
    assert sorted(cuda.registered.values()) == [500, 1000, 1000]
    assert devices == [3]
    tensor = torch.arange(600.0)
    assert torch.equal(buffers.copy(tensor), tensor)
    buffers.reserve(3000, pinned=True)  # more than was foreseen
    assert sorted(cuda.registered.values()) == [1000] * 3


def test_memory_that_cannot_be_pinned_is_used_all_the_same_and_that_is_said(cuda, caplog):
    cuda.refused = (2,)
    buffers = HostBuffers()
    buffers.reserve(2500, pinned=True)
    assert len(cuda.registered) == 2
    assert "only 2 of 3 parts" in caplog.text
    tensor = torch.arange(600.0)
    assert torch.equal(buffers.copy(tensor), tensor)
    buffers.release()
    assert cuda.registered == {}
