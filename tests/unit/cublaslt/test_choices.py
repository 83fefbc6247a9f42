"""Choices of algorithms on disk: found again, agreed on, and never a reason to fail.

A new `Engine` on the same file stands for another process.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import math
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from litespark.ops import cublaslt
from litespark.ops.cublaslt import Engine, Scales, tuning
from litespark.ops.cublaslt_choices import AlgorithmChoice, AlgorithmChoices, kind_of
from litespark.ops.cublaslt_product import Product
from litespark.ops.formats import E4M3
from litespark.utils import choice_cache
from litespark.utils.choice_cache import ChoiceCache
from tests.unit.cublaslt.fake import FakeCuda, FakeLibrary, integers

KEY = "H100 | TN m 4 n 6 k 8, bfloat16 x bfloat16 -> float32, strides a 8 b 8 out 6, alignment 16"


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "cache" / "cublaslt.json"


class Process:
    """One process: it proposes and times as it is told, and says which algorithm it launched."""

    def __init__(self, path: Path | None, *times: float, machine: str = "H100") -> None:
        self.library, self.cuda = FakeLibrary(proposals=len(times)), FakeCuda()
        self.cuda.times = list(times)
        choices = AlgorithmChoices(lambda: path, lambda _: machine)
        self.engine = Engine(self.library, self.cuda, choices)

    def multiply(self, m: int = 4) -> int:
        """The algorithm that computed the product."""
        out = torch.empty(m, 6)
        a, b = integers(m, 8), integers(6, 8)
        self.engine.matmul(Product(a, b, out, None, None, False))
        torch.testing.assert_close(out, a.float() @ b.float().t(), rtol=0, atol=0)
        name, arguments = self.library.calls[-1]
        assert name == "cublasLtMatmul"
        return ctypes.c_uint64.from_address(arguments[12]).value - 100

    def launches(self) -> int:
        return self.library.names().count("Matmul")


def test_another_process_takes_what_was_chosen_without_timing(path):
    first = Process(path, 3.0, 1.0, 2.0)
    assert first.multiply() == 1
    assert first.launches() == 4
    second = Process(path, 1.0, 3.0, 2.0)
    assert second.multiply() == 1
    assert second.launches() == 1
    assert second.engine.report == first.engine.report, "the times are those of the first"
    assert second.multiply(m=5) == 0, "another kind is timed"
    assert Process(path, 9.0, 9.0, 9.0).multiply(m=5) == 0


def test_what_is_in_the_file(path):
    process = Process(path, 3.0, 1.0, 2.0)
    process.library.broken_algorithms = {2}
    process.multiply()
    assert json.loads(path.read_text()) == {KEY: {"index": 1, "milliseconds": [3.0, 1.0, None]}}


def test_choices_of_another_machine_do_not_count(path):
    Process(path, 2.0, 1.0).multiply()
    assert Process(path, 1.0, 2.0, machine="A100").multiply() == 0
    assert len(json.loads(path.read_text())) == 2


def test_the_machine_is_the_gpu_and_the_versions(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device}")
    library = SimpleNamespace(cublasLtGetVersion=lambda: 130100)
    expected = f"GPU 3, cublasLt 130100, torch {torch.__version__}, workspace 4096"
    assert cublaslt._machine_name(library, 3) == expected


def test_the_others_stay_in_the_order_to_fall_back_to(path):
    Process(path, 4.0, 1.0, 3.0, 2.0).multiply()
    later = Process(path, 9.0, 9.0, 9.0, 9.0)
    later.library.broken_algorithms = {1, 3}
    assert later.multiply() == 2
    assert later.launches() == 3


def test_another_number_of_proposals_is_timed_again(path):
    Process(path, 2.0, 1.0).multiply()
    assert Process(path, 2.0, 3.0, 1.0).multiply() == 2
    assert json.loads(path.read_text())[KEY]["index"] == 2


@pytest.mark.parametrize(
    "value",
    [
        "3",
        "[]",
        "{}",
        '{"index": 1}',
        '{"index": 2, "milliseconds": [2.0, 1.0]}',
        '{"index": -1, "milliseconds": [2.0, 1.0]}',
        '{"index": true, "milliseconds": [2.0, 1.0]}',
        '{"index": 1.0, "milliseconds": [2.0, 1.0]}',
        '{"index": 1, "milliseconds": [2.0, null]}',
        '{"index": 1, "milliseconds": [2.0, NaN]}',
        '{"index": 1, "milliseconds": [2.0, "fast"]}',
        '{"index": 1, "milliseconds": [2.0, [1.0]]}',
        '{"index": 1, "milliseconds": 2}',
        '{"index": 1, "milliseconds": [2.0, 1' + "0" * 400 + "]}",
    ],
)
def test_a_row_that_is_no_choice_is_timed_again(path, value, caplog):
    path.parent.mkdir()
    path.write_text(f'{{"{KEY}": {value}, "other": 1}}')
    assert Process(path, 1.0, 2.0).multiply() == 0
    content = json.loads(path.read_text())
    assert content == {KEY: {"index": 0, "milliseconds": [1.0, 2.0]}, "other": 1}
    assert caplog.messages == []


@pytest.mark.parametrize("content", [b"", b'{"H100 | TN', b"[1]", b"\xff", b"[" * 100_000])
def test_a_damaged_file_is_written_anew(path, content, caplog):
    path.parent.mkdir()
    path.write_bytes(content)
    process = Process(path, 2.0, 1.0)
    assert [process.multiply(m) for m in (4, 5, 4)] == [1, 1, 1]
    assert len(json.loads(path.read_text())) == 2
    [message] = caplog.messages
    assert message.startswith(f"matrix products: {path} ")
    assert "is not used" in message


def test_a_file_that_cannot_be_written_is_no_failure(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    process = Process(tmp_path / "cache" / "cublaslt.json", 2.0, 1.0)
    assert [process.multiply(m) for m in (4, 5, 4)] == [1, 1, 1]
    assert process.launches() == 2 * 3 + 1
    [message] = caplog.messages
    assert message.startswith("matrix products: the choice is not kept for the next run: ")


def test_without_a_home_nothing_is_kept(caplog):
    process = Process(None, 2.0, 1.0)
    assert [process.multiply(), process.multiply()] == [1, 1]
    assert caplog.messages == []


def test_what_never_ran_is_not_kept(path):
    choices = AlgorithmChoices(lambda: path, str)
    choice = choices.choose("kind", 0, 2, lambda: [math.inf, math.inf])
    assert choice == AlgorithmChoice(0, (math.inf, math.inf))
    assert choices.choose("kind", 0, 2, lambda: None) is None, "timing had no memory"
    assert not path.exists()


@pytest.mark.parametrize("why", ["tuning is off", "capture"])
def test_who_does_not_tune_looks_at_no_file(path, why):
    Process(path, 2.0, 1.0).multiply()
    before = path.read_bytes()
    process = Process(path, 9.0, 9.0)
    process.cuda.capturing = why == "capture"
    with tuning(why == "capture"):
        assert process.multiply() == 0
        assert process.multiply(m=5) == 0
    assert path.read_bytes() == before
    process.cuda.capturing = False
    assert process.multiply() == 1, "met again, it is tuned: the file knows how"
    assert process.engine.report[0].times_ms == (2.0, 1.0)


def test_the_file_is_read_once_and_written_once_a_kind(path, monkeypatch):
    Process(path, 2.0, 1.0).multiply()
    done = []

    class Watched(type(path)):
        def read_bytes(self):
            done.append("read")
            return super().read_bytes()

    write = choice_cache.write_text_atomically
    monkeypatch.setattr(
        choice_cache, "write_text_atomically", lambda *args: (done.append("write"), write(*args))
    )
    process = Process(Watched(path), 2.0, 1.0)
    process.multiply()
    process.multiply()
    assert done == ["read"]
    process.multiply(m=5)
    process.multiply(m=5)
    assert done == ["read", "read", "write"], "merged with what the file holds by then"


class Interrupted(FakeCuda):
    """While this process times, another one finishes."""

    def __init__(self, times, other) -> None:
        super().__init__()
        self.times, self.other = times, other

    def median_milliseconds(self, launches):
        self.other()
        return super().median_milliseconds(launches)


def test_who_writes_second_takes_the_choice_of_the_first(path):
    first, second = Process(path, 2.0, 1.0), Process(path, 1.0, 2.0)
    second.engine._cuda = Interrupted([1.0, 2.0], lambda: [first.multiply(m) for m in (4, 5)])
    before = first.multiply(m=7)
    assert before == 1
    assert second.multiply() == 1, "its first real launch is the first's choice"
    assert second.engine.report[0].times_ms == (2.0, 1.0)
    assert Process(path, 1.0, 2.0).multiply() == 1
    second.library.names()
    assert second.multiply(m=5) == 1
    assert second.launches() == 1, "what else was merged is known too"
    assert len(json.loads(path.read_text())) == 3


def test_who_writes_second_keeps_the_choices_of_the_first(path):
    first, second = Process(path, 2.0, 1.0), Process(path, 1.0, 2.0)
    second.engine._cuda = Interrupted([1.0, 2.0], lambda: first.multiply(m=5))
    second.multiply()
    assert sorted(row["index"] for row in json.loads(path.read_text()).values()) == [0, 1]


def test_kinds_have_names_of_their_own():
    a, b = integers(16, 16, dtype=E4M3), integers(16, 16, dtype=E4M3)
    out, add, wide = torch.zeros(16, 16), torch.zeros(16, 16), torch.zeros(16, 32)
    half, one = out.to(torch.bfloat16), torch.ones(1)
    fp8 = integers(16, 16, dtype=E4M3)
    products = [
        Product(a, b, out, None, None, False),
        Product(a, b, out, out, None, False),
        Product(a, b, out, add, None, False),
        Product(a, b, out, wide[:, :16], None, False),
        Product(a, b, out, None, None, True),
        Product(a, b, out, None, Scales(one, one), False),
        Product(a, b, fp8, None, Scales(one, one), False),
        Product(a, b, fp8, None, Scales(one, one, one), False),
        Product(a, b, fp8, None, Scales(one, one, None, one), False),
        Product(a, b, fp8, None, Scales(one, one, one, one), False),
        Product(a, b, half, None, None, False),
        Product(a, b, wide[:, :16], None, None, False),
        Product(a[:8], b, out[:8], None, None, False),
        Product(a, b[:8], out[:, :8].contiguous(), None, None, False),
        Product(a[:, :8].contiguous(), b[:, :8].contiguous(), out, None, None, False),
        Product(a, b.view(torch.float8_e5m2), out, None, None, False),
        Product(half, half, out, None, None, False),
        Product(half.t(), half, out, None, None, False),
        Product(half, half.t(), out, None, None, False),
    ]
    names = {kind_of(product, alignment) for product in products for alignment in (2, 16)}
    assert len(names) == 2 * len(products)
    full = kind_of(Product(a, b, fp8, half, Scales(one, one, one, one), True), 16)
    assert full == (
        "TN m 16 n 16 k 16, float8_e4m3fn x float8_e4m3fn + add -> float8_e4m3fn, "
        "strides a 16 b 16 out 16 add 16, alignment 16, scales, out scale, amax, fast"
    )


def as_integer(value) -> int | None:
    return value if type(value) is int else None


def test_many_writers_agree_and_lose_nothing(path, monkeypatch):
    """Threads stand for processes: a lock belongs to the opened file, not to the process."""
    monkeypatch.setattr(choice_cache, "PATIENCE_SECONDS", 60.0)  # each write syncs the disk
    writers, keys = 6, [f"key {index}" for index in range(4)]
    start, taken = threading.Barrier(writers), {}

    def write(number: int) -> None:
        cache = ChoiceCache(lambda: path, "test")
        start.wait()
        for key in [*keys, f"own {number}"]:
            earlier = cache.settle(key, number, as_integer)
            taken[number, key] = number if earlier is None else earlier

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = json.loads(path.read_text())
    assert len(content) == len(keys) + writers
    assert {(number, key): content[key] for number, key in taken} == taken
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_a_lock_that_is_never_released_is_passed_by(path, monkeypatch):
    monkeypatch.setattr(choice_cache, "PATIENCE_SECONDS", 0.02)
    path.parent.mkdir()
    with open(f"{path}.lock", "wb") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        assert ChoiceCache(lambda: path, "test").settle("key", 1, as_integer) is None
    assert json.loads(path.read_text()) == {"key": 1}


def test_a_file_system_without_locks(path, monkeypatch):
    def refuse(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert ChoiceCache(lambda: path, "test").settle("key", 1, as_integer) is None
    assert ChoiceCache(lambda: path, "test").settle("key", 2, as_integer) == 1
