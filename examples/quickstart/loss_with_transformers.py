"""Computes an exported model's validation loss with transformers, on the run's own samples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from litespark.config import load_config
from litespark.data.blend import open_blend
from litespark.utils.files import write_text_atomically


def main() -> int:
    """Print and write the mean loss per token over the samples that training evaluated on."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="exported Hugging Face folder")
    parser.add_argument("--config", required=True, help="config.yaml of the run")
    parser.add_argument("--output", required=True, type=Path, help="JSON file for the result")
    args = parser.parse_args()
    config = load_config(args.config)
    samples = open_blend(
        [(entry.prefix, entry.weight) for entry in config.data.blend],
        config.data.split,
        "validation",
        config.data.sequence_length,
        config.seed,
    )
    if samples is None:
        raise SystemExit("data.split leaves nothing for validation")
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    loss_sum, num_tokens = 0.0, 0
    with torch.inference_mode():
        for number in range(config.training.eval_steps * config.batch.global_):
            tokens_s = torch.from_numpy(samples[number])
            logits_sv = model(tokens_s[None, :-1]).logits[0].float()
            loss_sum += float(F.cross_entropy(logits_sv, tokens_s[1:], reduction="sum"))
            num_tokens += len(tokens_s) - 1
    loss = loss_sum / num_tokens
    print(f"transformers: {loss:.6f} nats per token over {num_tokens} tokens")
    result = {"loss": loss, "tokens": num_tokens}
    write_text_atomically(args.output, json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
