"""The learning rate of every kind of schedule at its corners."""

from __future__ import annotations

import math

import pytest

from litespark.config.schema import RunConfig
from litespark.training.schedule import learning_rate


def config(**schedule) -> RunConfig:
    return RunConfig.model_validate(
        {
            "run": {"output_dir": "out"},
            "model": {"preset": "tiny"},
            "data": {"blend": [{"prefix": "x"}], "sequence_length": 8},
            "batch": {"global": 1},
            "optimizer": {"lr": 1.0},
            "training": {"steps": 100},
            "schedule": schedule,
        }
    )


def test_warmup_is_linear_and_ends_at_the_peak():
    run = config(kind="constant", warmup_steps=10)
    assert learning_rate(1, run) == pytest.approx(0.1)
    assert learning_rate(10, run) == 1.0
    assert learning_rate(100, run) == 1.0


def test_cosine():
    run = config(kind="cosine", warmup_steps=20, min_lr=0.1)
    assert learning_rate(60, run) == pytest.approx(0.55)  # half-way: the mean
    assert learning_rate(40, run) == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(100, run) == pytest.approx(0.1)


def test_cosine_stays_at_the_floor_after_its_decay():
    run = config(kind="cosine", decay_steps=50, min_lr=0.2)
    assert learning_rate(50, run) == pytest.approx(0.2)
    assert learning_rate(90, run) == pytest.approx(0.2)


def test_linear():
    run = config(kind="linear", warmup_steps=20, min_lr=0.2)
    assert learning_rate(60, run) == pytest.approx(0.6)
    assert learning_rate(100, run) == pytest.approx(0.2)


def test_wsd_stays_then_falls_over_the_last_steps():
    run = config(kind="wsd", warmup_steps=5, decay_steps=20)
    assert learning_rate(6, run) == 1.0
    assert learning_rate(80, run) == 1.0
    assert learning_rate(90, run) == pytest.approx(0.5)
    assert learning_rate(100, run) == 0.0
    assert learning_rate(95, config(kind="wsd")) == pytest.approx(0.5)  # default: the last tenth
