"""A process takes its share of the cores it was granted, not of those the machine has."""

from __future__ import annotations

import argparse
import os

import pytest
import torch

from litespark.cli.preprocess import add_common_arguments
from litespark.parallel import device
from litespark.utils.processes import available_cores


@pytest.fixture(autouse=True)
def four_cores_of_64(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {1, 3, 5, 7}, raising=False)


def test_granted_cores_are_counted(monkeypatch):
    assert available_cores() == 4
    monkeypatch.delattr(os, "sched_getaffinity")
    assert available_cores() == 64


def test_cpu_ranks_share_the_granted_cores(monkeypatch):
    chosen = []
    monkeypatch.setattr(device, "has_cuda", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    device.select_device(0, 2)
    device.select_device(0, 8)
    assert chosen == [2, 1]


def test_preprocess_starts_a_worker_for_each_granted_core():
    parser = argparse.ArgumentParser()
    add_common_arguments(parser)
    assert parser.parse_args(["--input", "a", "--output-prefix", "p"]).workers == 4
