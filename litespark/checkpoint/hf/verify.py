"""The proof of an export or import: both models compute the same on real text.

A wrong row of a table, a forgotten RoPE scaling, a padded vocabulary that leaks: none of them makes
an error, all of them make another model.  So text goes through Litespark's model, with the
checkpoint's weights, and through transformers' model, with the folder's, both in fp32, and the
logits and the loss are compared.

Small models are loaded whole, each in its own way.  Of large ones one layer at a time is built on
each side, and each side's hidden states go from layer to layer by themselves, so that differences
add up as they would in the whole.

Bound: both sides compute in fp32 with unit roundoff u = 2^-24 and sum in another order.  A product
that sums k terms has a relative error of about sqrt(k) u; the 5 L + 1 products of L layers and the
head add up like independent errors, to sqrt(5 L + 1) sqrt(k) u, of which 4 times is allowed,
relative to the largest logit.  The loss follows the logits: it differs by at most twice their
largest difference.

Shapes: s tokens, h hidden, v vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from litespark.checkpoint.folder import CONFIG
from litespark.checkpoint.hf.adapters import open_reader
from litespark.checkpoint.hf.folder import VERIFICATION, write_json
from litespark.checkpoint.hf.layerwise import hf_hidden, litespark_hidden, logits_of
from litespark.checkpoint.hf.registry import family_of_model
from litespark.checkpoint.hf.source import HFSource
from litespark.checkpoint.load import load_weights
from litespark.config.load import load_config
from litespark.config.precision import PrecisionConfig
from litespark.config.schema import ModelConfig, ParallelConfig, RunConfig
from litespark.data.tokenizers import load_tokenizer
from litespark.errors import LitesparkError, MissingExtraError, UserError
from litespark.models.build import build_chunks
from litespark.models.transformer_config import transformer_config

NUM_TOKENS = 256
_WHOLE_BYTES = 4 << 30  # both models in fp32


@dataclass(frozen=True)
class Verification:
    """What was found; differences are absolute, the logits' bound is relative to the largest."""

    num_tokens: int
    largest_logit: float
    logits_difference: float
    logits_relative_difference: float
    logits_bound: float
    loss_litespark: float
    loss_transformers: float
    loss_difference: float
    loss_bound: float
    passed: bool
    method: str = ""
    text: str = ""
    weights: str = ""

    def describe(self) -> str:
        """The result in two lines."""
        return (
            f"logits differ by at most {self.logits_relative_difference:.2e} of the largest "
            f"(bound {self.logits_bound:.2e}), the loss {self.loss_litespark:.6f} by "
            f"{self.loss_difference:.2e} (bound {self.loss_bound:.2e})\n"
            f"on {self.num_tokens} tokens of {self.text}, weights in {self.weights}, computed in "
            f"fp32, {self.method}: {'same model' if self.passed else 'NOT THE SAME MODEL'}"
        )


@torch.no_grad()
def verify(
    checkpoint: Path,
    hf_folder: Path,
    result_folder: Path,
    *,
    text_file: Path | None = None,
    layer_by_layer: bool | None = None,
    allow_pickle: bool = False,
) -> Verification:
    """Compare a checkpoint with a Hugging Face folder; to be called inside `single_process`.

    The result is written to `result_folder` as verification.json, also when it is bad.

    Args:
        checkpoint: a complete checkpoint.
        hf_folder: what it was exported to, or imported from.
        result_folder: where to write.
        text_file: UTF-8 text; None takes English that comes with Python.
        layer_by_layer: None: for models that need more than 4 GiB as a whole.
        allow_pickle: the folder may hold `pytorch_model*.bin`.

    Raises:
        LitesparkError: they do not compute the same.
        UserError: one of them, or the text, cannot be read.
    """
    try:
        import transformers  # noqa: F401 - asked for here, before minutes of work
    except ImportError:
        raise MissingExtraError("transformers", "hf", "--verify") from None
    source = HFSource.open(hf_folder, allow_pickle=allow_pickle)
    config = _in_fp32(load_config(checkpoint / CONFIG))
    model = config.model
    ids_s, text = _tokens(hf_folder, text_file, model.vocab_size, model.longest_exact_sequence)
    num_parameters = sum(math.prod(tensor.shape) for tensor in source.tensors.values())
    if layer_by_layer is None:
        layer_by_layer = 8 * num_parameters > _WHOLE_BYTES
    compute = _layer_by_layer if layer_by_layer else _whole
    ours_sv, theirs_sv = compute(checkpoint, config, source, ids_s)
    result = _compare(ours_sv, theirs_sv, ids_s, _bound(model))
    result = replace(
        result,
        method="layer by layer" if layer_by_layer else "as whole models",
        text=text,
        weights=str(source.dtype).removeprefix("torch."),
    )
    write_json(result_folder / VERIFICATION, asdict(result))
    if not result.passed:
        raise LitesparkError(f"{checkpoint} and {hf_folder}: {result.describe()}")
    return result


def _bound(model: ModelConfig) -> float:
    """How much of the largest logit may differ; see the module's docstring."""
    width = max(model.hidden_size, model.ffn_hidden_size)
    return 4 * math.sqrt((5 * model.num_layers + 1) * width) * 2**-24


def _compare(ours_sv: Tensor, theirs_sv: Tensor, ids_s: Tensor, bound: float) -> Verification:
    largest = float(theirs_sv.abs().max())
    difference = float((ours_sv - theirs_sv).abs().max())
    ours, theirs = (
        float(F.cross_entropy(logits_sv[:-1].double(), ids_s[1:]))
        for logits_sv in (ours_sv, theirs_sv)
    )
    return Verification(
        num_tokens=len(ids_s),
        largest_logit=largest,
        logits_difference=difference,
        logits_relative_difference=difference / largest,
        logits_bound=bound,
        loss_litespark=ours,
        loss_transformers=theirs,
        loss_difference=abs(ours - theirs),
        loss_bound=2 * bound * largest,
        # A NaN is no pass.
        passed=difference <= bound * largest and abs(ours - theirs) <= 2 * bound * largest,
    )


def _whole(
    checkpoint: Path, config: RunConfig, source: HFSource, ids_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Both models, each loaded as a user would."""
    from transformers import AutoModelForCausalLM

    (ours,) = build_chunks(config, transformer_config(config))
    load_weights(checkpoint, [ours])
    _round(ours, source.dtype)
    ours.eval()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.folder,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    theirs, report = loaded
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report.get(what):
            raise LitesparkError(f"transformers reports {what} {sorted(report[what])[:5]}")
    positions_s = torch.arange(len(ids_s))
    logits_sv = ours(ids_s[None], positions_s[None], None)[0, :, : config.model.vocab_size]
    expected_sv = theirs.eval()(ids_s[None], use_cache=False).logits[0]
    return logits_sv, expected_sv


def _layer_by_layer(
    checkpoint: Path, config: RunConfig, source: HFSource, ids_s: Tensor
) -> tuple[Tensor, Tensor]:
    model = config.model
    reader = open_reader(checkpoint, family_of_model(model), model)
    ours_sh = litespark_hidden(reader, config, ids_s, source.dtype)
    theirs_sh = hf_hidden(source, ids_s)
    return logits_of(reader, source, ours_sh, theirs_sh)


def _round(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Give the weights the values that they have in the folder's format."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype).float())


def _in_fp32(config: RunConfig) -> RunConfig:
    """One process, plain torch, fp32."""
    return config.model_copy(
        update={
            "parallel": ParallelConfig(),
            "precision": PrecisionConfig(mode="fp32"),
            "model": config.model.model_copy(update={"backend": "reference", "attention": "auto"}),
        }
    )


def _tokens(folder: Path, text_file: Path | None, vocab: int, longest: int) -> tuple[Tensor, str]:
    """Real text as the folder's tokenizer splits it; without one, its bytes."""
    if text_file is None:
        from pydoc_data.topics import topics

        text, name = "\n".join(topics[key] for key in sorted(topics)), "Python's documentation"
    else:
        try:
            text, name = text_file.read_text(encoding="utf-8"), str(text_file)
        except (OSError, ValueError) as error:
            raise UserError(str(text_file), f"cannot be read ({error})", "Give a text.") from None
    wanted = min(NUM_TOKENS, longest)
    text = text[: 64 * wanted]
    if any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        ids = load_tokenizer(folder).encode(text)
    else:
        ids, name = list(text.encode()), f"{name}, bytes as tokens"
    ids = [number % vocab for number in ids[:wanted]]
    if len(ids) < 2:
        raise UserError(name, "has fewer than 2 tokens", "Give a longer text.")
    return torch.tensor(ids), name
