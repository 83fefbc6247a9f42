"""Text from the fused layers: on a GPU `litespark generate` takes them, on a CPU it does not."""

from __future__ import annotations

import pytest
import torch
import yaml

from litespark.cli import generate as command
from litespark.cli.main import build_parser
from litespark.models.generate import Sampling, generate
from litespark.modules.fused_layer import FusedTransformerLayer
from litespark.training import single
from tests.integration.tiny import write_tokenizer
from tests.support.runs import config_tree, train_and_save_rank, write_shard
from tests.support.spawn import run_distributed

PROMPT = [5, 99, 3, 17, 42]
COUNT = 32


def continuation(model) -> list[int]:
    sampling = Sampling(temperature=0.0)
    return generate(model, PROMPT, max_new_tokens=COUNT, sampling=sampling, eos_id=None)


@torch.inference_mode()
def recomputed(model) -> list[int]:
    """Greedy text with the whole sequence computed anew for each token: through the blocks."""
    ids = list(PROMPT)
    for _ in range(COUNT):
        logits_bsv = model(torch.tensor([ids]), torch.arange(len(ids))[None], None)
        ids.append(int(model.mask_padding(logits_bsv)[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize(
    "shape",
    [{}, {"num_query_groups": 1, "head_dim": 24}, {"vocab_size": 101, "tie_embeddings": True}],
    ids=["gqa", "mqa_head_dim", "padded_tied"],
)
def test_fused_layers_write_the_references_text(make_model, shape):
    """fp32, greedy: with the key/value cache, which megatron-core's layer serves, and without."""
    expected = continuation(make_model(backend="reference", **shape))
    fused = make_model(backend="triton", **shape)
    assert all(isinstance(layer, FusedTransformerLayer) for layer in fused.decoder.layers)
    assert continuation(fused) == expected
    assert recomputed(fused) == expected
    assert continuation(fused) == expected, "after the blocks as before"
    assert len(set(expected)) > 3, "a text of one token would prove nothing"


@pytest.mark.distributed
@pytest.mark.parametrize("mode", ["fp32", "bf16", "fp8"])
def test_a_checkpoint_of_fused_layers_is_continued(mode, tmp_path, capsys, monkeypatch):
    """The command's own choice, plain torch on a CPU, against the fused layers by force.

    In BF16 the two sum in other orders: of greedy tokens the first ones are the same, and a near
    tie may end that; in fp32 all are.
    """
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["model"].update(backend="triton", vocab_size=300, init_std=0.15)
    tree["precision"]["mode"] = mode
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    run_distributed(train_and_save_rank, 1, str(path), [], 3)
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    words = ["--prompt", "the cat and", "--max-new-tokens", "12", "--temperature", "0"]
    words += ["--seed", "1", "--tokenizer", str(tokenizer)]
    args = build_parser(["generate"]).parse_args(["generate", str(tmp_path / "run"), *words])
    assert command.run(args) == 0
    plain = capsys.readouterr().out
    chosen = single._for_this_machine

    def fused(config):
        config = chosen(config)
        assert config.precision.mode != "fp8", "FP8 is for training"
        model = config.model.model_copy(update={"backend": "triton"})
        return config.model_copy(update={"model": model})

    monkeypatch.setattr(single, "_for_this_machine", fused)
    assert command.run(args) == 0
    found = capsys.readouterr().out
    assert plain.startswith("the cat and")
    assert len(plain) > len("the cat and") + 4
    same = len(plain) if mode == "fp32" else len("the cat and") + 1
    assert found[:same] == plain[:same]
