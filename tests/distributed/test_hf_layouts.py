"""Hugging Face's models at every layout: imported, and as the weights that training starts with.

The whole matrix is `tools/checks/hf_matrix.py`; here are the cases that differ most, of which one
group of processes computes all."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from litespark.checkpoint.folder import find_checkpoint
from litespark.checkpoint.hf.export import export_checkpoint
from litespark.checkpoint.hf.import_ import Importing, import_hf
from litespark.checkpoint.hf.registry import read_model
from litespark.training.single import single_process
from tests.support.runs import config_tree, train_rank, write_shard
from tests.support.spawn import run_distributed
from tools.checks.hf_cases import (
    LAYOUTS,
    Case,
    differing_tensors,
    largest_differences_rank,
    make,
)

pytestmark = pytest.mark.distributed
# Two sides that compute in fp32 and sum in another order: see test_hf_parity.py.
BOUND = 1e-5
CASES = [
    ("llama", "llama3 RoPE"),
    ("llama", "odd vocabulary, tied"),
    ("mistral", "window as long as the texts"),
    ("qwen2", "odd vocabulary"),
    ("qwen2", "mqa"),
    ("qwen3", "head size 24"),
    ("qwen3", "tied"),
]


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("families")
    made = [Case(family, name, str(folder / str(i))) for i, (family, name) in enumerate(CASES)]
    for case in made:
        make(case)
        import_hf(case.hf, case.imported, Importing())
    return made


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_logits_equal_transformers(cases, layout):
    world_size = layout.get("tensor", 1) * layout.get("pipeline", 1)
    results = run_distributed(largest_differences_rank, world_size, cases, layout)
    for case in cases:
        values = [result[case.folder] for result in results if result]
        print(case.family, case.variant, values)
        assert values
        assert max(values) < BOUND, case


def test_export_gives_back_every_bit(cases):
    with single_process():
        for case in cases:
            exported = Path(case.folder) / "exported"
            export_checkpoint(find_checkpoint(case.imported), exported)
            assert differing_tensors(case.hf, exported) == []
            again = read_model(exported)
            assert again == read_model(case.hf)


def test_training_starts_from_a_folder_and_from_a_checkpoint_at_any_layout(cases, tmp_path):
    """Six steps from the folder in one process, and at TP2 x PP2 from the folder and from the
    import; the first loss is of the weights alone, the others need optimizer and schedule."""
    case = cases[CASES.index(("qwen3", "tied"))]
    tree = config_tree(tmp_path, write_shard(tmp_path / "tokens"))
    tree["model"] = read_model(case.hf).model_dump(mode="json")
    tree["training"] = {"steps": 6}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    many = ["parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"]
    histories = [
        run_distributed(
            train_rank,
            world_size,
            str(path),
            [f"run.init_from={source}", f"run.output_dir={tmp_path / name}", *layout],
        )[0]
        for name, source, world_size, layout in (
            ("one", case.hf, 1, []),
            ("hf", case.hf, 4, many),
            ("litespark", case.imported, 4, [*many, "model.vocab_padding_multiple=128"]),
        )
    ]
    fresh = run_distributed(train_rank, 1, str(path), [f"run.output_dir={tmp_path / 'fresh'}"])[0]
    assert abs(fresh[0][0] / histories[0][0][0] - 1) > 1e-3, "the weights were not taken over"
    for history in histories[1:]:
        for (loss, _), (expected, _) in zip(history, histories[0], strict=True):
            assert loss == pytest.approx(expected, rel=1e-5)
