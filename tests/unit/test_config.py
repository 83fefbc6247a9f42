"""The configuration: what is accepted, what is refused, and in which words."""

from __future__ import annotations

import pytest
import yaml

from litespark.config import dump_config, load_config, validate
from litespark.config.presets import PRESETS
from litespark.config.schema import ModelConfig
from litespark.errors import UserError
from litespark.metering.flops import total_parameters
from tests.support.configs import MINIMAL


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_minimal_file_and_round_trip(write):
    config = load_config(write(MINIMAL))
    assert config.optimizer.lr == 1e-3  # YAML 1.1 reads 1e-3 as a string
    assert config.model.head_dim == 32
    assert load_config(write(dump_config(config))) == config


def test_overrides_replace_and_add(write):
    overrides = ["model.num_layers=8", "parallel.tensor=2", "data.split=[98,2,0]", "run.name=a=b"]
    config = load_config(write(MINIMAL), overrides)
    assert config.model.num_layers == 8
    assert config.parallel.tensor == 2
    assert config.data.split == (98, 2, 0)
    assert config.run.name == "a=b"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("parallel: {tensr: 2}", ["9: parallel.tensr", "Did you mean 'tensor'"]),
        ("training2: {}", ["9: training2", "Did you mean 'training'"]),
        ("tensor: 2", ["9: tensor", "Did you mean 'parallel.tensor'"]),
        ("parallel: {tensor: two}", ["parallel.tensor = 'two'", "valid integer"]),
        ("parallel: {tensor: true}", ["parallel.tensor = True", "valid integer"]),
        ("parallel: {sequence: 1}", ["parallel.sequence = 1", "valid boolean"]),
        ("parallel: {tensor: 0}", ["parallel.tensor = 0", "greater than or equal to 1"]),
        ("precision: {mode: fp16}", ["precision.mode = 'fp16'", "'bf16', 'fp32' or 'fp8'"]),
        ("seed: 1\nseed: 2", ["10: seed", "stands twice (first in line 9)"]),
        ("schedule: [1, 2", ["is not valid YAML"]),
    ],
)
def test_mistakes_name_line_key_value_and_fix(write, change, words):
    with pytest.raises(UserError) as error:
        load_config(write(MINIMAL + change + "\n"))
    for word in words:
        assert word in str(error.value)


def test_all_mistakes_are_reported_at_once(write):
    text = MINIMAL.replace("steps: 10", "stps: 10").replace("global: 8", "global: many")
    with pytest.raises(UserError) as error:
        load_config(write(text))
    assert len(str(error.value).splitlines()) == 2


def test_missing_key_says_what_it_is(write):
    with pytest.raises(UserError, match=r"optimizer\.lr: is missing\. It is: Peak learning rate"):
        load_config(write(MINIMAL.replace("{lr: 1e-3}", "{}")))


def test_unknown_preset_names_the_nearest(write):
    with pytest.raises(UserError, match="Did you mean 'llama3-8b'"):
        load_config(write(MINIMAL), ["model.preset=llama3-8B"])


def test_missing_and_binary_files(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read"):
        load_config(tmp_path / "nowhere.yaml")
    binary = tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(binary)


def test_python_objects_are_no_yaml(write):
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write(MINIMAL + "seed: !!python/object/apply:os.getpid []\n"))


@pytest.mark.parametrize(
    "override",
    [
        "model.preset=[tiny]",
        "model.preset={a: 1}",
        f"seed={10**30}",
        "optimizer.lr=.inf",
        "optimizer.lr=.nan",
        "resilience.collective_timeout_seconds=.inf",
        "run.output_dir=''",
        "run.resume=''",
    ],
)
def test_odd_values_are_mistakes_too(write, override):
    with pytest.raises(UserError):
        load_config(write(MINIMAL), [override])


def test_yaml_that_contains_itself(write):
    with pytest.raises(UserError, match="not valid YAML"):
        load_config(write("model: &a {x: *a}\n"))


@pytest.mark.parametrize(
    ("world_size", "overrides", "words"),
    [
        (3, ["parallel.tensor=2"], ["2 x 1 x 1 = 2", "processes, 3"]),
        (1, ["parallel.tensor=2"], ["= 2: does not divide the number of processes, 1"]),
        (8, ["parallel.tensor=8"], ["num_attention_heads = 4", "parallel.tensor = 8"]),
        (2, ["parallel.tensor=2", "model.ffn_hidden_size=385"], ["ffn_hidden_size = 385"]),
        (
            2,
            ["parallel.tensor=2", "model.vocab_size=2047", "model.vocab_padding_multiple=1"],
            ["vocab_padding_multiple"],
        ),
        (
            1,
            ["model.rope_scaling={factor: 8.0, low_freq_factor: 4.0}"],
            ["high_freq_factor = 4.0", "low_freq_factor = 4.0"],
        ),
        (1, ["schedule.warmup_steps=3", "schedule.decay_steps=2"], ["decay_steps = 2"]),
        (1, ["schedule.kind=wsd", "schedule.decay_steps=11"], ["decay_steps = 11", "10 steps"]),
        (2, ["parallel.tensor=2", "parallel.sequence=true", "data.sequence_length=63"], ["= 63"]),
        (2, ["parallel.context=2", "data.sequence_length=66"], ["divisible by 4"]),
        (3, ["parallel.pipeline=3"], ["num_layers = 4"]),
        (1, ["parallel.virtual_pipeline=2"], ["parallel.pipeline is 1"]),
        (
            2,
            ["parallel.pipeline=2", "parallel.virtual_pipeline=2", "batch.global=7"],
            ["makes 7 micro-batches", "multiple of parallel.pipeline = 2"],
        ),
        (2, ["batch.global=7"], ["batch.global = 7", "1 x 2"]),
        (1, ["model.num_query_groups=3"], ["num_query_groups = 3"]),
        (1, ["model.head_dim=31"], ["head_dim = 31", "odd"]),
        (1, ["data.sequence_length=1024"], ["max_sequence_length = 512"]),
        (1, ["training.tokens=1000"], ["exactly one"]),
        (1, ["schedule.warmup_steps=11"], ["warmup_steps = 11", "10 steps"]),
        (1, ["schedule.min_lr=1.0"], ["min_lr = 1.0"]),
        (1, ["parallel.sequence=true"], ["parallel.sequence = true"]),
        (1, ["parallel.overlap_param_gather=true"], ["overlap_grad_reduce"]),
        (1, ["training.eval_every=5", "data.split=[1,0,0]"], ["eval_every = 5"]),
        (
            1,
            ["data.document_mask=true", "model.backend=te", "precision.mode=bf16"],
            ["data.document_mask = true with model.backend = te", "model.backend=auto"],
        ),
    ],
)
def test_what_cannot_run_together(write, world_size, overrides, words):
    errors = validate(load_config(write(MINIMAL), overrides), world_size)
    text = "\n".join(map(str, errors))
    for word in words:
        assert word in text


def test_a_good_configuration_has_no_errors(write):
    overrides = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    assert validate(load_config(write(MINIMAL), overrides), 8) == []


@pytest.mark.parametrize(
    ("preset", "billions"),
    [
        ("paper-3b", 2.29),  # as the report's shapes count
        ("paper-30b", 32.5),
        ("llama3.2-1b", 1.24),  # as the models' cards say
        ("llama3.2-3b", 3.21),
        ("llama2-7b", 6.74),
        ("llama3-8b", 8.03),
        ("llama2-13b", 13.0),
        ("llama3-70b", 70.6),
        ("llama-160m", 0.162),
        ("mistral-7b", 7.25),
        ("qwen2.5-0.5b", 0.494),
        ("qwen2.5-1.5b", 1.54),
        ("qwen3-0.6b", 0.596),
        ("qwen3-1.7b", 1.72),
    ],
)
def test_presets_have_the_published_number_of_parameters(preset, billions):
    model = ModelConfig.model_validate({"preset": preset})
    options = model.tie_embeddings, model.qkv_bias, model.qk_norm
    found = total_parameters(model, *options) / 1e9
    assert found == pytest.approx(billions, rel=0.005)


def test_every_preset_is_valid():
    for name in PRESETS:
        model = ModelConfig.model_validate({"preset": name})
        assert model.num_attention_heads % model.num_query_groups == 0


def test_dump_is_safe_yaml(write):
    text = dump_config(load_config(write(MINIMAL)))
    assert yaml.safe_load(text)["batch"]["global"] == 8


def test_blend_preset_is_slimpajamas_published_mix(write):
    text = MINIMAL.replace("[{prefix: shard}]", "{preset: slimpajama, prefix: data/slim}")
    config = load_config(write(text))
    assert [(entry.prefix, entry.weight) for entry in config.data.blend] == [
        ("data/slim_RedPajamaCommonCrawl_text_document", 52.2),
        ("data/slim_RedPajamaC4_text_document", 26.7),
        ("data/slim_RedPajamaGithub_text_document", 5.2),
        ("data/slim_RedPajamaArXiv_text_document", 4.6),
        ("data/slim_RedPajamaBook_text_document", 4.2),
        ("data/slim_RedPajamaWikipedia_text_document", 3.8),
        ("data/slim_RedPajamaStackExchange_text_document", 3.3),
    ]
    assert sum(entry.weight for entry in config.data.blend) == pytest.approx(100)
    assert load_config(write(dump_config(config))) == config
    other = load_config(write(text), ["data.blend.json_key=content"])
    assert other.data.blend[1].prefix == "data/slim_RedPajamaC4_content_document"


@pytest.mark.parametrize(
    ("blend", "words"),
    [
        (
            "{preset: slimpyjama, prefix: x}",
            ["4: data.blend.preset = 'slimpyjama'", "Did you mean 'slimpajama'? Known: slimpajama"],
        ),
        ("{preset: slimpajama}", ["4: data.blend = a mapping", "needs a text as prefix"]),
        ("{preset: slimpajama, prefix: 3}", ["4: data.blend", "needs a text as prefix"]),
        ("{prefix: x, weight: 1.0}", ["4: data.blend", "has the unknown key weight beside"]),
    ],
)
def test_wrong_blend_preset_is_explained(write, blend, words):
    with pytest.raises(UserError) as error:
        load_config(write(MINIMAL.replace("[{prefix: shard}]", blend)))
    for word in words:
        assert word in str(error.value)
