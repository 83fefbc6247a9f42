"""Which of the proposed algorithms is taken, when it may be timed and when not."""

from __future__ import annotations

import ctypes

import pytest
import torch

from litespark.ops.cublaslt import tuning
from tests.unit.cublaslt.fake import FP32, FakeLibrary, integers, multiply


class TestTuning:
    @pytest.fixture
    def library(self) -> FakeLibrary:
        return FakeLibrary(proposals=3)

    @pytest.fixture(autouse=True)
    def times(self, cuda):
        cuda.times = [3.0, 1.0, 2.0]

    def last_algorithm(self, library) -> int:
        name, arguments = library.calls[-1]
        assert name == "cublasLtMatmul"
        return ctypes.c_uint64.from_address(arguments[12]).value - 100

    def test_the_fastest_is_kept(self, engine, library):
        a, b, out = integers(4, 8), integers(6, 8), integers(4, 6, dtype=FP32)
        expected = out + a.float() @ b.float().t()
        multiply(engine, a, b, out, out)
        torch.testing.assert_close(out, expected)  # added once: trials go elsewhere
        assert self.last_algorithm(library) == 1
        assert library.names().count("Matmul") == 4
        multiply(engine, a, b, out, out)
        assert self.last_algorithm(library) == 1
        assert library.names() == ["Matmul"]
        [row] = engine.report
        assert (row.m, row.n, row.k, row.layout) == (4, 6, 8, "TN")
        assert row.dtypes == "bfloat16 x bfloat16 + add -> float32"
        assert (row.first_ms, row.best_ms, row.index) == (3.0, 1.0, 1)
        assert row.times_ms == (3.0, 1.0, 2.0)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_trials_do_the_same_work(self, engine, library, in_place):
        out = torch.zeros(4, 6)
        add = out if in_place else torch.ones(4, 6)
        multiply(engine, integers(4, 8), integers(6, 8), out, add)
        runs = [arguments for name, arguments in library.calls if name == "cublasLtMatmul"]
        for run in runs[:-1]:
            assert run[10] != out.data_ptr()
            assert run[8] == (run[10] if in_place else add.data_ptr())
        assert runs[-1][10] == out.data_ptr()

    def test_an_algorithm_that_does_not_run_is_passed_over(self, engine, library):
        library.broken_algorithms = {1}
        multiply(engine, integers(4, 8), integers(6, 8), torch.empty(4, 6))
        assert self.last_algorithm(library) == 2
        assert engine.report[0].times_ms == (3.0, float("inf"), 2.0)

    def test_a_result_that_is_no_algorithm_is_passed_over(self, engine, library, cuda):
        library.bad_results = {0}
        cuda.times = [2.0, 1.0]
        multiply(engine, integers(4, 8), integers(6, 8), torch.empty(4, 6))
        assert self.last_algorithm(library) == 2

    def test_without_tuning_the_first_is_taken_and_tuned_later(self, engine, library):
        product = integers(4, 8), integers(6, 8), torch.empty(4, 6)
        with tuning(False):
            multiply(engine, *product)
            multiply(engine, *product)
        assert self.last_algorithm(library) == 0
        assert engine.report == []
        assert library.names().count("Matmul") == 2
        multiply(engine, *product)
        assert self.last_algorithm(library) == 1

    def test_nothing_is_timed_under_capture(self, engine, library, cuda):
        product = integers(4, 8), integers(6, 8), torch.empty(4, 6)
        cuda.capturing = True
        multiply(engine, *product)
        assert self.last_algorithm(library) == 0
        cuda.capturing = False
        multiply(engine, *product)
        assert self.last_algorithm(library) == 1

    def test_it_is_a_setting_too(self):
        tuning(False)
        assert not tuning.enabled
        with tuning(True):
            assert tuning.enabled
        assert not tuning.enabled
        tuning(True)
