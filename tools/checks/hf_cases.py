"""Tiny models of every family, in shapes that go wrong in different ways, and one rank's logits.

Every case is a change of the base shape below.  Weights are random and large enough for attention
and logits that differ from uniform; norms and biases too are random, so that a confusion shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BASE = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "initializer_range": 0.15,
}
# With 16 as the unscaled length, waves of all three kinds (kept, between, slowed) are there.
_LLAMA3_ROPE = {
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }
}
_THETA = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}
VARIANTS: dict[str, dict[str, Any]] = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "odd vocabulary": {"vocab_size": 301},
    "odd vocabulary, tied": {"vocab_size": 301, "tie_word_embeddings": True},
    "head size 24": {"head_dim": 24},
    "llama3 RoPE": _LLAMA3_ROPE,
    "RoPE base": _THETA,
    "epsilon": {"rms_norm_eps": 0.1},
}
# The parts that only one family has are in all of its cases: QKV bias in qwen2, QK-norm in qwen3.
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
}
EXTRA = {"mistral": {"window as long as the texts": {"sliding_window": 64}}}
LAYOUTS = {
    "TP1": {},
    "TP2": {"tensor": 2, "sequence": True},
    "TP2 x PP2": {"tensor": 2, "pipeline": 2},
}
NUM_TOKENS = 40
LOGITS = "expected.safetensors"


@dataclass(frozen=True)
class Case:
    """One model: where transformers saved it, and where it was imported to."""

    family: str
    variant: str
    folder: str

    @property
    def hf(self) -> Path:
        """The folder that transformers wrote."""
        return Path(self.folder) / "hf"

    @property
    def imported(self) -> Path:
        """The checkpoint that `litespark import` made of it."""
        return Path(self.folder) / "imported"


def all_cases(folder: Path) -> list[Case]:
    """Every family in every variant."""
    return [
        Case(family, variant, str(folder / f"{family}-{number}"))
        for family in FAMILIES
        for number, variant in enumerate({**VARIANTS, **EXTRA.get(family, {})})
    ]


def make(case: Case) -> None:
    """Write a random model with transformers, and its logits in fp32 of two random texts."""
    import transformers
    from safetensors.torch import save_file

    class_name, own = FAMILIES[case.family]
    variants = {**VARIANTS, **EXTRA.get(case.family, {})}
    config = getattr(transformers, class_name)(**{**BASE, **own, **variants[case.variant]})
    torch.manual_seed(7)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.normal_(0.0 if name.endswith("bias") else 1.0, 0.2)
        tokens_bs = torch.randint(config.vocab_size, (2, NUM_TOKENS))
        logits_bsv = model(tokens_bs).logits
    model.save_pretrained(case.hf)
    save_file({"tokens": tokens_bs, "logits": logits_bsv}, Path(case.folder) / LOGITS)


def largest_differences_rank(
    rank: int, world_size: int, cases: list[Case], layout: dict[str, Any]
) -> dict[str, float]:
    """Of each case's folder, the largest difference of logits over the largest logit.

    Only ranks of the last pipeline stage have logits; the others return nothing.
    """
    from safetensors.torch import load_file

    from litespark.config.schema import ParallelConfig
    from litespark.parallel.groups import start_model_parallel, start_process_group
    from litespark.parallel.rng import seed_all
    from megatron_patches import apply_patches

    process = start_process_group(120.0)
    apply_patches(process.device.type)
    parallel = ParallelConfig.model_validate(layout)
    start_model_parallel(parallel, 120.0)
    seed_all(0)
    found = {}
    for case in cases:
        expected = load_file(Path(case.folder) / LOGITS)
        logits_bsv = _logits(case, parallel, expected["tokens"])
        if logits_bsv is not None:
            difference = (logits_bsv - expected["logits"]).abs().max()
            found[case.folder] = float(difference / expected["logits"].abs().max())
    return found


def _logits(case: Case, parallel: Any, tokens_bs: Tensor) -> Tensor | None:
    import torch.distributed as dist
    from megatron.core import parallel_state

    from litespark.checkpoint.folder import CONFIG, find_checkpoint
    from litespark.checkpoint.load import load_weights
    from litespark.config.load import load_config
    from litespark.models.build import build_chunks
    from litespark.models.transformer_config import transformer_config

    checkpoint = find_checkpoint(case.imported)
    config = load_config(checkpoint / CONFIG).model_copy(update={"parallel": parallel})
    (chunk,) = build_chunks(config, transformer_config(config))
    load_weights(checkpoint, [chunk])
    chunk.eval()
    positions_bs = torch.arange(NUM_TOKENS).expand(2, -1)
    width = NUM_TOKENS // parallel.tensor if parallel.sequence else NUM_TOKENS
    hidden_sbh = torch.empty(width, 2, config.model.hidden_size)
    group = parallel_state.get_pipeline_model_parallel_group()
    stages = dist.get_process_group_ranks(group)
    with torch.no_grad():
        if not parallel_state.is_pipeline_first_stage():
            dist.recv(hidden_sbh, stages[dist.get_rank(group) - 1])
            chunk.set_input_tensor([hidden_sbh])
        output = chunk(tokens_bs, positions_bs, None, runtime_gather_output=True)
        if parallel_state.is_pipeline_last_stage():
            return output[..., : config.model.vocab_size]
        dist.send(output.contiguous(), stages[dist.get_rank(group) + 1])
    return None


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of tensors that two folders do not have alike, bit for bit."""
    from safetensors.torch import load_file

    left, right = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return [
        name
        for name in sorted(left.keys() | right.keys())
        if name not in left
        or name not in right
        or left[name].dtype != right[name].dtype
        or not torch.equal(left[name], right[name])
    ]
