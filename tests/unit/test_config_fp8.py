"""The configuration's FP8 keys: what is accepted, what is refused, and in which words."""

from __future__ import annotations

from typing import get_args

import pytest
from megatron.core.enums import Fp8Recipe

from litespark.config import validate
from litespark.config.schema import PrecisionConfig, RunConfig
from litespark.errors import UserError
from litespark.fp8.linear import BlockwiseFp8, ScaledFp8
from litespark.fp8.policy import PrecisionPolicy
from tests.support import cli
from tests.support.configs import loader

# Every size a multiple of 128, which is what the blockwise recipe needs.
MINIMAL = """\
run: {output_dir: out}
model: {preset: tiny, hidden_size: 128, ffn_hidden_size: 512, head_dim: 32}
data:
  blend: [{prefix: shard}]
  sequence_length: 128
batch: {global: 8}
optimizer: {lr: 1e-3}
training: {steps: 10}
precision: {mode: fp8}
"""
TE = "model.backend=te"
NO_VALUES = [
    ("recipe=current", ["recipe = 'current'", "'delayed', 'tensorwise' or 'blockwise'"]),
    ("recipe=mxfp8", ["recipe = 'mxfp8'"]),
    ("recipe=[delayed]", ["precision.recipe"]),
    ("recipie=delayed", ["precision.recipie", "Did you mean 'recipe'"]),
    ("primary_weights=fp32", ["primary_weights = 'fp32'", "'bf16' or 'fp8'"]),
    ("amax_history_steps=0", ["amax_history_steps = 0", "greater than or equal to 1"]),
    ("amax_history_steps=1.5", ["amax_history_steps = 1.5", "integer"]),
    ("margin=-1", ["margin = -1", "greater than or equal to 0"]),
    ("margin=17", ["margin = 17", "less than or equal to 16"]),
    ("margin=true", ["margin = True", "integer"]),
    ("bf16_first_layers=-1", ["bf16_first_layers = -1", "greater than or equal to 0"]),
    ("bf16_last_layers=all", ["bf16_last_layers = 'all'", "integer"]),
    ("fc1_output=fp32", ["fc1_output = 'fp32'", "'bf16', 'fp8_kept' or 'fp8'"]),
    ("fast_accumulation=true", ["fast_accumulation = True", "'forward' or 'all'"]),
    ("guard_every=0", ["guard_every = 0", "greater than or equal to 1"]),
    ("guard_max_gap=0", ["guard_max_gap = 0", "greater than 0"]),
    ("guard_max_gap=.inf", ["guard_max_gap = inf", "finite"]),
    ("guard_max_gap=.nan", ["guard_max_gap = nan", "finite"]),
    ("guard_action=stop", ["guard_action = 'stop'", "'log' or 'bf16'"]),
]


@pytest.fixture
def load(tmp_path):
    return loader(tmp_path, MINIMAL)


def problems(config: RunConfig, world_size: int = 1) -> str:
    return "\n".join(map(str, validate(config, world_size)))


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("backend", ["auto", "triton", "te"])
def test_every_recipe_is_accepted_by_every_backend_that_computes_fp8(recipe, backend, load):
    assert problems(load(f"precision.recipe={recipe}", f"model.backend={backend}")) == ""


@pytest.mark.parametrize(("override", "words"), NO_VALUES)
def test_a_value_that_is_none_is_named(override, words, load):
    with pytest.raises(UserError) as error:
        load(f"precision.{override}")
    for word in words:
        assert word in str(error.value)


def test_every_key_has_a_case_above():
    """A key that is added to the section needs a case of its own."""
    tested = {override.partition("=")[0] for override, _ in NO_VALUES} - {"recipie"}
    assert tested == set(PrecisionConfig.model_fields) - {"mode"}


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (1, ["model.backend=reference"], ["mode = fp8", "not computed by model.backend = ref"]),
        (1, [TE, "precision.guard_every=5"], ["guard_every = 5", "layer by layer"]),
        (1, [TE, "precision.bf16_first_layers=1"], ["recipe = delayed", "tensorwise"]),
        (1, [TE, "precision.bf16_last_layers=1"], ["recipe = delayed", "megatron-core's"]),
        (1, ["precision.bf16_first_layers=5"], ["= 5", "leaves none of the 4 layers"]),
        (1, ["precision.bf16_last_layers=4"], ["= 4", "leaves none of the 4 layers"]),
        (
            1,
            ["precision.bf16_first_layers=2", "precision.bf16_last_layers=2"],
            ["bf16_first_layers + bf16_last_layers = 4", "precision.mode=bf16"],
        ),
        (1, ["model.hidden_size=136"], ["multiples of 16", "model.hidden_size is 136"]),
        (1, ["model.ffn_hidden_size=520"], ["multiples of 16", "is 520"]),
        (2, ["parallel.tensor=2", "model.ffn_hidden_size=496"], ["/ parallel.tensor is 248"]),
        (1, ["data.sequence_length=100"], ["tokens of a micro-batch is 100"]),
        (
            1,
            ["precision.recipe=blockwise", "model.ffn_hidden_size=384", "batch.micro=1"],
            [],
        ),
        (
            1,
            ["precision.recipe=blockwise", "model.ffn_hidden_size=400"],
            ["fp8 (blockwise)", "multiples of 128", "is 400"],
        ),
        (
            1,
            ["precision.recipe=blockwise", "data.sequence_length=64"],
            ["multiples of 128", "tokens of a micro-batch is 64"],
        ),
        (
            4,
            ["parallel.tensor=4", "model.num_query_groups=2"],
            ["num_query_groups = 2", "parallel.tensor = 4 ranks", "model.backend=te"],
        ),
    ],
)
def test_what_cannot_run_together(world_size, overrides, words, load):
    text = problems(load(*overrides), world_size)
    assert bool(text) == bool(words), text
    for word in words:
        assert word in text


@pytest.mark.parametrize(
    ("option", "has_effect"),
    [
        ("primary_weights=fp8", {"delayed", "tensorwise"}),
        ("margin=1", {"delayed", "tensorwise", "te delayed"}),
        ("fc1_output=fp8", {"delayed"}),
        ("fast_accumulation=all", {"delayed", "tensorwise"}),
    ],
)
@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("backend", ["auto", "triton", "te"])
def test_an_option_without_effect_is_refused(option, has_effect, recipe, backend, load):
    name = option.partition("=")[0]
    text = problems(
        load(f"precision.{option}", f"precision.recipe={recipe}", f"model.{backend=!s}")
    )
    found = f"te {recipe}" if backend == "te" else recipe
    if found in has_effect:
        assert text == ""
    else:
        assert f"precision.{name} = {option.partition('=')[2]}: has no effect with" in text
        assert f"precision.recipe = {recipe}" in text
        assert ("model.backend = te" in text) == (backend == "te")


@pytest.mark.parametrize("mode", ["bf16", "fp32"])
def test_the_keys_of_fp8_may_stay_when_another_mode_is_set(mode, load):
    """So that one override compares; the section's docstring says what they are for."""
    options = [
        "precision.recipe=blockwise",
        "precision.primary_weights=fp8",
        "precision.margin=2",
        "precision.fc1_output=fp8",
        "precision.fast_accumulation=all",
        "precision.guard_every=5",
        "precision.guard_action=bf16",
        "precision.bf16_first_layers=9",
        "model.hidden_size=132",
        "model.backend=reference",
    ]
    assert problems(load(*options, f"precision.mode={mode}")) == ""


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise"])
@pytest.mark.parametrize("backend", ["triton", "te"])
def test_fc1_output_may_be_bf16_everywhere(recipe, backend, load):
    """Also where it is so anyway."""
    overrides = [f"precision.recipe={recipe}", f"model.backend={backend}"]
    assert problems(load("precision.fc1_output=bf16", *overrides)) == ""


@pytest.mark.parametrize(
    ("recipe", "writes_fp8", "fast_gradients"),
    [("delayed", True, True), ("tensorwise", False, False)],
)
def test_unset_options_are_the_fastest_measured(recipe, writes_fp8, fast_gradients, load):
    precision = load(f"precision.recipe={recipe}").precision
    formats = PrecisionPolicy(precision, num_layers=2).formats(1)
    assert formats.fc1_output is not None
    assert formats.fc1_writes_fp8 == writes_fp8
    assert isinstance(formats.fc2, ScaledFp8)
    assert formats.fc2._fast_gradients == fast_gradients


def test_all_mistakes_are_reported_at_once(load):
    config = load("precision.recipe=blockwise", "precision.margin=1", "precision.fc1_output=fp8")
    assert len(validate(config, 1)) == 2


RECIPES = get_args(PrecisionConfig.model_fields["recipe"].annotation)


def test_recipes_have_megatron_cores_names():
    """Backend `te` hands them on; `tensorwise` is its name of current scales."""
    assert {Fp8Recipe(recipe).name for recipe in RECIPES} == set(RECIPES)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_called_the_same_everywhere(recipe, load):
    described = PrecisionConfig.model_fields["recipe"].description
    helped = cli.run("bench", "--help").stdout
    for text in (described, helped, (cli.ROOT / "README.md").read_text()):
        assert recipe in str(text)
    policy = PrecisionPolicy(load(f"precision.recipe={recipe}").precision, 4)
    if recipe == "blockwise":
        assert policy.scaling is None, "a scale for each tile"
        assert isinstance(policy.formats(1).fc1, BlockwiseFp8)
    else:
        assert policy.scaling is not None
        assert policy.scaling.delayed == (recipe == "delayed")
