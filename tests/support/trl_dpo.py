"""What TRL's DPOTrainer computes of pairs of tokens, to compare with and to write down.

`python -m tests.support.trl_dpo` writes `tests/golden/trl_dpo.json`, which tests compare with where
TRL is not installed; where it is, they compare with TRL itself and with the file.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from litespark.config.schema import ModelConfig
from tests.support.chats import token_pairs, train_chat_tokenizer

GOLDEN = Path(__file__).parents[1] / "golden" / "trl_dpo.json"
PAIRS = token_pairs(6, 128)
# Litespark's options, and TRL's: what the loss is called there.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({"beta": 0.3}, {"beta": 0.3, "loss_type": ["sigmoid"]}),
    "ipo": (
        {"beta": 0.5, "loss": "ipo", "length_normalised": True},
        {"beta": 0.5, "loss_type": ["ipo"]},
    ),
    "sigmoid per token": (
        {"beta": 2.0, "length_normalised": True},
        {"beta": 2.0, "loss_type": ["sigmoid_norm"]},
    ),
}


def llama(shape: ModelConfig, weights: dict[str, torch.Tensor]) -> LlamaForCausalLM:
    """transformers' model of a shape, with these weights."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_attention_heads,
        num_key_value_heads=shape.num_query_groups,
        rms_norm_eps=shape.norm_epsilon,
        tie_word_embeddings=shape.tie_embeddings,
    )
    model = LlamaForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    return model


def trl_numbers(
    policy: LlamaForCausalLM,
    reference: LlamaForCausalLM,
    documents: list[tuple[list[int], list[int]]],
    options: dict[str, Any],
) -> dict[str, Any]:
    """Loss, mean rewards and accuracy of TRL's trainer; gradients are left on `policy`."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    examples = [
        {"prompt_ids": chosen[0], "chosen_ids": chosen[1], "rejected_ids": rejected[1]}
        for chosen, rejected in zip(documents[::2], documents[1::2], strict=True)
    ]
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = AutoTokenizer.from_pretrained(train_chat_tokenizer(Path(folder) / "tokenizer"))
        arguments = DPOConfig(output_dir=folder, report_to=[], use_cpu=True, bf16=False, **options)
        trainer = DPOTrainer(
            model=policy,
            ref_model=reference,
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}]),
            processing_class=tokenizer,
        )
        policy.train()
        loss = trainer._compute_loss(policy, DataCollatorForPreference(0)(examples), False)
        loss.backward()
        found = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return {
        "loss": loss.item(),
        "reward_chosen": found["rewards/chosen"],
        "reward_rejected": found["rewards/rejected"],
        "reward_margin": found["rewards/margins"],
        "reward_accuracy": found["rewards/accuracies"],
    }


def sketch(gradients: dict[str, torch.Tensor]) -> dict[str, list[float]]:
    """Of each gradient its norm and its sum along a fixed direction."""
    found = {}
    for name, gradient in sorted(gradients.items()):
        values = gradient.double().flatten()
        direction = torch.arange(len(values), dtype=torch.float64).mul(0.7).sin()
        found[name] = [values.norm().item(), (values * direction).sum().item()]
    return found


def main() -> None:
    """Write the golden file."""
    from tests.integration.test_post_training_parity import hf_twins

    golden = {}
    for name, (_, options) in VARIANTS.items():
        policy, reference = hf_twins()
        numbers = trl_numbers(policy, reference, PAIRS, options)
        gradients = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
        golden[name] = {**numbers, "gradients": sketch(gradients)}
    import trl

    GOLDEN.write_text(json.dumps({"trl": trl.__version__, "variants": golden}, indent=1) + "\n")


if __name__ == "__main__":
    main()
