"""SFT and DPO on packed batches equal transformers and TRL on the same tokens, one by one."""

from __future__ import annotations

import importlib.util
import json
from itertools import pairwise

import pytest
import torch

from litespark.config.post_training import DpoConfig
from litespark.config.schema import RunConfig
from litespark.data.chat_samples import ChatCorpus
from litespark.data.loader import BatchLoader
from litespark.modules.documents import document_bounds
from litespark.objectives.dpo import answers_step, dpo_step
from litespark.objectives.language_modelling import language_modelling_step
from litespark.objectives.preferences import METRICS, preference_terms
from litespark.training.single import single_process
from tests.integration.test_hf_parity import in_hf_words, relative_difference, stored_parameters
from tests.integration.tiny import build, tiny_values
from tests.support.chats import TokenShard, token_pairs
from tests.support.trl_dpo import GOLDEN, PAIRS, VARIANTS, llama, sketch, trl_numbers

# As in test_hf_parity: fp32 on both sides, sums in another order.
RELATIVE = 1e-5
LENGTH = 96
CPU = torch.device("cpu")
POLICY_SEED, REFERENCE_SEED = 1234, 77


def config_of(seed=POLICY_SEED, backend="reference"):
    values = tiny_values("unused", backend=backend, max_sequence_length=LENGTH)
    values["data"] |= {"sequence_length": LENGTH, "document_mask": True}
    return RunConfig.model_validate({**values, "seed": seed})


def batch_of(documents, task, reference=None):
    """All documents packed into the rows of one micro-batch."""
    shard = TokenShard(documents, task)
    corpus = ChatCorpus(shard, (0, shard.units), LENGTH, 0, reference)
    count = corpus.samples_per_epoch
    loader = BatchLoader(corpus, count, count, 0, 1, document_mask=True)
    (batch,) = loader.next_step()
    loader.close()
    return batch


def hf_twins():
    """transformers' models with the weights of policy and reference."""
    twins = []
    for seed in (POLICY_SEED, REFERENCE_SEED):
        config = config_of(seed)
        with single_process():
            (model,) = build(config)
            words = in_hf_words(config.model, stored_parameters(model))
        weights = {name: value.detach().clone() for name, value in words.items()}
        twins.append(llama(config.model, weights))
    return twins


def one_step(model, step, batch):
    output, loss_of = step(iter([batch]), model)
    loss, count, report = loss_of(output)
    return loss, int(count), report


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_sft_on_a_packed_batch_equals_transformers_on_each_conversation(backend):
    documents = token_pairs(9, 128, seed=5)
    batch = batch_of(documents, "sft")
    assert len(batch.documents) == len(documents) > len(batch.tokens_bs) * 3, "nothing is packed"
    config = config_of(backend=backend)
    twin, _ = hf_twins()
    total, counted = 0.0, 0
    logits = {}
    for number, (prompt, answer) in enumerate(documents):
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[*[-100] * len(prompt), *answer]])
        output = twin(input_ids=ids, labels=labels)
        total = total + output.loss * len(answer)
        counted += len(answer)
        logits[number] = output.logits[0].detach()
    total.backward()
    with single_process():
        (model,) = build(config)
        parameters = stored_parameters(model)
        loss, count, _ = one_step(model, language_modelling_step(CPU), batch)
        loss.backward()
        with torch.no_grad():
            packed = model(
                batch.tokens_bs.view(1, -1),
                batch.position_ids_bs.view(1, -1),
                None,
                packed_seq_params=document_bounds(
                    batch.cu_seqlens, batch.longest_document_tokens, CPU
                ),
            )[0]
    assert count == counted
    assert loss.item() == pytest.approx(total.item(), rel=RELATIVE)
    assert_same_gradients(config, parameters, twin)
    # A packed conversation has the logits that it has alone.
    starts = conversation_starts(batch)
    for start, number in zip(starts, batch.documents.tolist(), strict=True):
        alone = logits[number]
        found = packed[start : start + len(alone)]
        assert relative_difference(found, alone) < RELATIVE


def conversation_starts(batch):
    """Where the conversations begin, padding left out."""
    used = (batch.document_of_bs.view(-1) >= 0).tolist()
    bounds = batch.cu_seqlens.tolist()
    return [a for a, b in pairwise(bounds) if any(used[a:b])]


def assert_same_gradients(config, parameters, twin, relative=RELATIVE, divisor=1):
    gradients = in_hf_words(config.model, {k: p.grad for k, p in parameters.items()})
    for name, parameter in twin.named_parameters():
        assert relative_difference(gradients[name] / divisor, parameter.grad) < relative, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_dpo_equals_trl(variant):
    """With TRL itself where it is installed, else with what it computed when it was."""
    golden = json.loads(GOLDEN.read_text())["variants"][variant]
    gradients_of = golden.pop("gradients")
    ours, theirs = VARIANTS[variant]
    twin = None
    if importlib.util.find_spec("trl") is not None:
        twin, reference_twin = hf_twins()
        live = trl_numbers(twin, reference_twin, PAIRS, theirs)
        assert live == pytest.approx(golden, rel=1e-4), "the file is another TRL's"
    for backend in ("reference", "triton"):
        config = config_of(backend=backend)
        found, parameters = dpo_numbers(config, DpoConfig(**ours))
        assert found == pytest.approx(golden, rel=1e-4)
        gradients = in_hf_words(
            config.model, {k: p.grad / (len(PAIRS) // 2) for k, p in parameters.items()}
        )
        for name, (norm, along) in sketch(gradients).items():
            assert norm == pytest.approx(gradients_of[name][0], rel=1e-4), name
            assert along == pytest.approx(gradients_of[name][1], abs=1e-4 * norm), name
        if twin is not None:
            assert_same_gradients(config, parameters, twin, 1e-4, divisor=len(PAIRS) // 2)


def dpo_numbers(config, options):
    """Loss and metrics by pair, and the parameters with their gradients."""
    reference_config = config_of(REFERENCE_SEED, config.model.backend)
    batch = batch_of(PAIRS, "dpo")
    with single_process():
        (reference,) = build(reference_config)
        with torch.no_grad():
            _, _, report = one_step(reference, answers_step(CPU), batch)
        by_document = torch.empty(len(PAIRS))
        by_document[batch.documents] = report["logps_n"]
        batch = batch_of(PAIRS, "dpo", by_document.numpy())
        (model,) = build(config)
        parameters = stored_parameters(model)
        loss, count, report = one_step(model, dpo_step(CPU, options), batch)
        loss.backward()
    assert count == len(PAIRS) // 2
    sums = (report["loss_and_tokens"] / count).tolist()
    names = ["loss", "pairs", *METRICS]
    found = dict(zip(names, sums, strict=True))
    return {k: v for k, v in found.items() if k not in ("pairs", "kl_estimate")}, parameters


def test_label_smoothing_is_the_mixture_of_both_orders():
    """A pair whose label is wrong with probability e: its loss and that of the swapped pair."""
    generator = torch.manual_seed(1)
    logps, reference = torch.randn(2, 12, generator=generator).unbind()
    tokens = torch.ones(12)
    swapped = torch.arange(12).view(-1, 2).flip(1).flatten()
    plain = DpoConfig(beta=0.7)
    smoothed = DpoConfig(beta=0.7, label_smoothing=0.2)
    right = preference_terms(logps, reference, tokens, plain).losses_p
    wrong = preference_terms(logps[swapped], reference[swapped], tokens, plain).losses_p
    found = preference_terms(logps, reference, tokens, smoothed).losses_p
    torch.testing.assert_close(found, 0.8 * right + 0.2 * wrong)


def test_ipo_of_whole_answers_is_its_closed_form():
    logps, reference = torch.tensor([1.0, 2.0]), torch.tensor([0.5, 3.0])
    options = DpoConfig(beta=0.25, loss="ipo")
    found = preference_terms(logps, reference, torch.tensor([3.0, 4.0]), options)
    assert found.losses_p.item() == pytest.approx((1.5 - 2.0) ** 2)
    assert found.metrics_mp[:, 0].tolist() == pytest.approx([0.125, -0.25, 0.375, 1.0, 0.25])
