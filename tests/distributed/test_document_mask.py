"""Document masks: a document in a sample is computed as the document alone, at every layout.

Bounds as in `test_layouts.py`: only the order of fp32 sums may differ.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from tests.distributed.test_layouts import LAYOUTS, assert_same, options_of
from tests.support.runs import (
    VOCAB_SIZE,
    train_alone,
    train_and_save_rank,
    train_rank,
    write_config,
)
from tests.support.spawn import run_distributed

pytestmark = pytest.mark.distributed

MASK = "data.document_mask=true"
BACKENDS = ["reference", "triton"]


def write_short_documents(prefix):
    """Many documents end in a sample of 32, some at its end; one token and none are lengths too."""
    from litespark.data.indexed import IndexedWriter

    generator = np.random.default_rng(5)
    with IndexedWriter(str(prefix), VOCAB_SIZE) as writer:
        for number in range(400):
            length = (1, 0, 16, 70)[number // 8 % 4] if number % 8 == 0 else generator.integers(24)
            writer.add_document(generator.integers(0, VOCAB_SIZE, size=int(length)).tolist())
    return str(prefix)


@pytest.fixture(scope="module")
def config_path(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("documents")
    return write_config(folder, write_short_documents(folder / "tokens"))


def alone_rank(rank, world_size, config_path, overrides):
    """One micro-batch as it is trained on, and its documents one by one without any mask.

    Returns losses by token, the sum of the losses, and gradients by name, of both; and how far the
    losses are from those without the mask.
    """
    import torch

    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.data.loader import Batch
    from litespark.objectives.language_modelling import document_bounds
    from litespark.training.setup import set_up

    run = set_up(load_config(config_path, overrides))
    (chunk,) = run.chunks
    model = bare_model(chunk)
    assert run.train_batches is not None
    batch = run.train_batches.next_step()[0]
    run.train_batches.close()
    assert batch.cu_seqlens is not None
    bounds = batch.cu_seqlens.tolist()

    def train_on(batches):
        chunk.zero_grad_buffer()
        total = 0.0
        for one in batches:
            output, loss_of = run.forward_step(iter([one]), chunk)
            loss, _, _ = loss_of(output)
            loss.backward()
            total += loss.item()
        gradients = {n: p.main_grad.double().numpy().copy() for n, p in model.named_parameters()}
        return total, gradients

    def losses_of(tokens, labels, **options):
        positions = torch.arange(tokens.size(1))[None]
        with torch.no_grad():
            return model(
                tokens, options.pop("positions", positions), None, labels=labels, **options
            )

    flat = {
        name: getattr(batch, name).view(1, -1)
        for name in ("tokens_bs", "labels_bs", "position_ids_bs", "loss_mask_bs")
    }
    documents = [
        Batch(
            **{name: part[:, start:end] for name, part in flat.items()},
        )
        for start, end in pairwise(bounds)
    ]
    together = losses_of(
        flat["tokens_bs"],
        flat["labels_bs"],
        positions=flat["position_ids_bs"],
        packed_seq_params=document_bounds(batch.cu_seqlens, batch.longest_document_tokens),
    )
    apart = torch.cat([losses_of(one.tokens_bs, one.labels_bs) for one in documents], dim=1)
    unmasked = losses_of(batch.tokens_bs, batch.labels_bs).reshape(1, -1)
    return (
        (together.numpy(), *train_on([batch])),
        (apart.numpy(), *train_on(documents)),
        float((together - unmasked).abs().max()),
        len(bounds) - 1,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_documents_of_a_sample_are_those_documents_alone(backend, recompute, config_path):
    options = [MASK, f"model.backend={backend}", f"training.recompute={recompute}"]
    options.append("batch.micro=4")
    together, apart, effect, documents = run_distributed(alone_rank, 1, config_path, options)[0]
    assert documents > 5
    np.testing.assert_allclose(together[0], apart[0], rtol=1e-5)
    assert together[1] == pytest.approx(apart[1], rel=1e-6)
    for name, gradient in together[2].items():
        np.testing.assert_allclose(
            gradient, apart[2][name], atol=1e-5 * np.abs(gradient).max(), err_msg=name
        )
    assert effect > 1e-3, "the mask changes nothing here"


def rotary_rank(rank, world_size, config_path, overrides):
    """The angles that the first layer is given with its documents; the angles of positions 0, 1,
    ...; and which of the tokens this rank has."""
    import torch
    from megatron.core import parallel_state

    from litespark.checkpoint.sharded import bare_model
    from litespark.config import load_config
    from litespark.modules.core_attention import zigzag_positions
    from litespark.training.setup import set_up
    from litespark.training.step import train_step

    run = set_up(load_config(config_path, overrides))
    model = bare_model(run.chunks[0])
    seen = []
    model.decoder.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(
            (kwargs["rotary_pos_emb"], kwargs["packed_seq_params"].cu_seqlens_q.tolist())
        ),
        with_kwargs=True,
    )
    train_step(run)
    assert run.train_batches is not None
    run.train_batches.close()
    table = model.rotary_pos_emb(64, packed_seq=True)[:, 0, 0].numpy()
    group = parallel_state.get_context_parallel_group()
    own = zigzag_positions(64 // group.size(), group.rank(), group.size(), torch.device("cpu"))
    return [(angles[:, 0, 0].numpy(), bounds) for angles, bounds in seen], table, own.numpy()


@pytest.mark.parametrize(
    ("world_size", "overrides"),
    [
        *((1, ""), (2, "parallel.tensor=2 parallel.sequence=true"), (4, "parallel.pipeline=4")),
        (4, "parallel.context=2 parallel.pipeline=2"),
    ],
)
def test_positions_begin_anew_on_every_stage(world_size, overrides, config_path):
    """Attention sees differences of positions only, so no loss would tell."""
    options = [MASK, *overrides.split()]
    for seen, table, own in run_distributed(rotary_rank, world_size, config_path, options):
        assert len(seen) == 4
        for angles, bounds in seen:
            places = np.array([place for a, b in pairwise(bounds) for place in range(b - a)])
            assert np.array_equal(angles, table[places[own]])


@pytest.fixture(scope="module")
def single_process(config_path):
    return train_alone(config_path, MASK, "model.backend=reference")


def test_the_mask_matters(config_path, single_process):
    unmasked = train_alone(config_path, "model.backend=reference")
    with pytest.raises(AssertionError):
        assert_same(unmasked, single_process)


REFERENCE_LAYOUTS = [
    *("TP2+SP", "PP2 interleaved", "PP4", "TP2xDP2", "TP2+SP full recompute", "CP2"),
]
FUSED_LAYOUTS = [
    *("TP2", "TP2xPP2+SP", "PP2 interleaved", "DP2", "DP2 distributed optimizer"),
    *("DP2 overlapped", "PP2 selective recompute", "TP2+SP full recompute", "CP2"),
    *("TP2xCP2+SP", "CP2xPP2 interleaved", "CP4 full recompute"),
]
CONTEXT_LAYOUTS = {
    "CP4 full recompute": (
        4,
        ["parallel.context=4", "batch.micro=4", "training.recompute=full"],
    ),
}


@pytest.mark.parametrize(
    ("backend", "name"),
    [
        *(("triton", name) for name in ["one process", *FUSED_LAYOUTS]),
        *(("reference", name) for name in REFERENCE_LAYOUTS),
    ],
)
def test_every_layout_equals_the_single_process(backend, name, config_path, single_process):
    world_size, layout = CONTEXT_LAYOUTS.get(name) or options_of(name)
    options = [MASK, f"model.backend={backend}", *layout]
    histories = run_distributed(train_rank, world_size, config_path, options)
    assert all(history == histories[0] for history in histories), "ranks disagree on the loss"
    assert_same(histories[0], single_process)


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_of_another_size_train_the_same(micro, config_path, single_process):
    options = [MASK, "model.backend=triton", f"batch.micro={micro}"]
    assert_same(train_alone(config_path, *options), single_process)


def test_fp8_learns_as_bf16_does(config_path):
    """The bound is that of `test_fused_layouts.py`, whose samples have no documents."""
    options = [MASK, "model.backend=triton"]
    expected = train_alone(config_path, *options, "precision.mode=bf16")
    found = train_alone(config_path, *options, "precision.mode=fp8")
    assert found != expected
    for (loss, _), (wanted, _) in zip(found, expected, strict=True):
        assert loss == pytest.approx(wanted, rel=2e-3)


def test_resume_at_another_layout(config_path, single_process, tmp_path):
    target = [MASK, f"run.output_dir={tmp_path / 'run'}"]
    saved_at = LAYOUTS["TP2xPP2+SP"][1].split()
    run_distributed(train_and_save_rank, 4, config_path, [*target, *saved_at], 5)
    options = [*target, "model.backend=triton", "batch.micro=4"]
    found = run_distributed(train_rank, 2, config_path, options)[0]
    assert len(found) == 5
    assert_same(found, single_process[5:])
