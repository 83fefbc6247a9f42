"""The log of lines under a disk that refuses some: none is lost, and none is torn."""

from __future__ import annotations

import resource
from contextlib import contextmanager

from litespark.training.hooks.sinks import TensorBoardSink
from litespark.utils.line_log import LineLog


@contextmanager
def largest_file(size_bytes):
    """As a full disk does, this refuses a write in its middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_refused_lines_wait_for_room(tmp_path, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier run\n")
    log = LineLog(path)
    log.write("first")
    before = path.read_text()
    with largest_file(len(before) + 10):
        log.write("second, which does not fit")
        assert path.read_text() == before, "torn"
        log.write("third")
    assert path.read_text() == before
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "File too large" in record.getMessage()
    log.write("fourth")
    whole = before + "second, which does not fit\nthird\nfourth\n"
    assert path.read_text() == whole
    with largest_file(len(whole) + 1):
        log.write("fifth")
    assert len(caplog.records) == 2, "another refusal is told again"
    log.close()
    assert path.read_text() == whole + "fifth\n"


def test_tensorboard_ends_and_training_does_not(tmp_path, caplog):
    sink = TensorBoardSink(tmp_path, purge_step=1)
    with largest_file(0):
        for step in range(3):
            sink.write({"step": step, "loss": 1.0})
            if sink.writer is not None:
                try:
                    sink.writer.flush()
                except OSError:
                    continue  # the writing thread has met it; the next write hears of it
        sink.close()
    assert [str(tmp_path) in record.getMessage() for record in caplog.records] == [True]
    sink.write({"step": 4, "loss": 1.0})
