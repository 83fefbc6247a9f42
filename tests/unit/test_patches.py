"""The patch registry: what is applied when, undone how, and refused with which message."""

from __future__ import annotations

import itertools
import logging
import pathlib
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import megatron_patches
from litespark.errors import LitesparkError
from megatron_patches import applied_patches, apply_patches, registry, revert_patches
from megatron_patches.attributes import ModuleView, replace_attributes, resolve
from megatron_patches.read_side_by_side import THREADS, shares_of
from megatron_patches.registry import PATCH_NAMES, Condition, Patch, all_patches

CPU_PATCHES = [patch.name for patch in all_patches() if patch.condition is Condition.CPU]
README = pathlib.Path(megatron_patches.__file__).parent / "README.md"


def symbols():
    return {symbol: resolve(symbol) for patch in all_patches() for symbol in patch.symbols}


def stub(**changes):
    """A patch of this file's `TARGET`."""
    fields = {
        "name": "stub",
        "symbols": (f"{__name__}.TARGET.value",),
        "versions": ">=0.16.1,<0.17",
        "condition": Condition.ALWAYS,
        "why": "a test",
        "remove_when": "the test is gone",
        "apply": lambda: replace_attributes((TARGET, "value", "patched")),
    }
    return Patch(**{**fields, **changes})


TARGET = SimpleNamespace(value="original")


@pytest.fixture
def only_patch(monkeypatch):
    """Make a stub the only patch there is."""

    def install(patch):
        monkeypatch.setattr(registry, "all_patches", lambda: (patch,))

    return install


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_patches; print({'torch', 'megatron'} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=README.parent.parent,
    )
    assert done.stdout.strip() == "set()"


def test_applies_all_patches_of_a_cpu_machine_in_order():
    assert apply_patches("cpu") == list(PATCH_NAMES)
    assert applied_patches() == PATCH_NAMES


def test_applying_twice_changes_nothing():
    apply_patches("cpu")
    patched = symbols()
    assert apply_patches("cpu") == []
    assert all(resolve(symbol) is value for symbol, value in patched.items())


def test_reverting_restores_every_symbol():
    original = symbols()
    fused_before = "fused_weight_gradient_mlp_cuda" in vars(layers_module())
    apply_patches("cpu")
    # Some symbols are only leaned on; but of each patch at least one has changed.
    for patch in all_patches():
        if patch.symbols[0] != "megatron.core.tensor_parallel.layers._grad_accum_fusion_available":
            changed = [
                symbol for symbol in patch.symbols if resolve(symbol) is not original[symbol]
            ]
            assert changed, patch.name
    revert_patches()
    assert applied_patches() == ()
    assert all(resolve(symbol) is value for symbol, value in original.items())
    assert ("fused_weight_gradient_mlp_cuda" in vars(layers_module())) == fused_before
    assert {"cuda", "record_stream", "type"}.isdisjoint(vars(torch.Tensor))


def layers_module():
    from megatron.core.tensor_parallel import layers

    return layers


def test_patches_can_be_applied_again_after_reverting():
    apply_patches("cpu")
    revert_patches()
    assert apply_patches("cpu") == list(PATCH_NAMES)


def test_cpu_patches_are_not_applied_on_cuda():
    applied = apply_patches("cuda")
    assert set(applied) == set(PATCH_NAMES) - set(CPU_PATCHES)


def test_patches_for_a_missing_transformer_engine_need_it_missing(monkeypatch):
    monkeypatch.setattr(registry, "has_transformer_engine", lambda: True)
    applied = apply_patches("cuda")
    assert applied == [
        *("distopt_bucket_padding", "refuse_silent_faults"),
        *("safe_checkpoint_metadata", "read_side_by_side"),
    ]


@pytest.mark.parametrize(("module", "found"), [(SimpleNamespace(), True), (None, False)])
def test_transformer_engine_has_to_be_importable(module, found, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", module)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    assert registry.has_transformer_engine() is found


def test_only_selects_by_name():
    assert apply_patches("cpu", only=["rng", "current_device"]) == ["current_device", "rng"]


def test_unknown_name_is_refused_with_the_known_ones():
    with pytest.raises(LitesparkError, match=r"unknown patches: rgn\. Known are: current_device"):
        apply_patches("cpu", only=["rgn"])


def test_a_second_device_type_is_refused():
    apply_patches("cpu")
    with pytest.raises(LitesparkError, match="in place for device type 'cpu', asked for 'cuda'"):
        apply_patches("cuda")


def test_each_patch_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="litespark.patches")
    apply_patches("cpu")
    apply_patches("cpu")
    logged = [record for record in caplog.records if record.name == "litespark.patches"]
    assert [record.args[0] for record in logged] == list(PATCH_NAMES)
    assert {record.levelno for record in logged} == {logging.INFO}


def test_a_stub_is_applied_and_reverted(only_patch):
    only_patch(stub())
    assert apply_patches("cuda") == ["stub"]
    assert TARGET.value == "patched"
    revert_patches()
    assert TARGET.value == "original"


@pytest.mark.parametrize(
    "moved",
    [
        "megatron.core.optimizer.no_such_module.function",
        "megatron.core.optimizer.optimizer.NoSuchClass.step",
        "no_such_package.function",
    ],
)
def test_a_moved_symbol_is_an_error_that_names_patch_symbol_and_versions(moved, only_patch):
    only_patch(stub(symbols=(f"{__name__}.TARGET.value", moved)))
    with pytest.raises(LitesparkError) as error:
        apply_patches("cpu")
    assert str(error.value).startswith(f"patch stub: upstream symbol {moved} does not exist")
    assert registry.installed_megatron_version() in str(error.value)
    assert ">=0.16.1,<0.17" in str(error.value)
    assert TARGET.value == "original"
    assert applied_patches() == ()


def test_another_version_of_megatron_is_refused(only_patch, monkeypatch):
    only_patch(stub())
    monkeypatch.setattr(registry, "installed_megatron_version", lambda: "0.17.0")
    with pytest.raises(LitesparkError, match=r"patch stub \(.*TARGET.value\).*installed is 0.17.0"):
        apply_patches("cpu")
    assert TARGET.value == "original"


def test_missing_megatron_says_what_to_install(monkeypatch):
    def not_found(name):
        raise registry.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(registry.importlib.metadata, "version", not_found)
    with pytest.raises(LitesparkError, match="pip install litespark"):
        registry.installed_megatron_version()


def table_rows():
    lines = README.read_text(encoding="utf-8").splitlines()
    rows = [line.strip("|").split(" | ") for line in lines if line.startswith("| `")]
    return [[cell.strip() for cell in row] for row in rows]


def test_readme_lists_exactly_the_patches():
    expected = [
        [
            f"`{patch.name}`",
            ", ".join(f"`{symbol}`" for symbol in patch.symbols),
            f"`{patch.versions}`",
            f"`{patch.condition.name}`",
            patch.why,
            patch.remove_when,
        ]
        for patch in all_patches()
    ]
    assert table_rows() == expected


def test_every_file_is_named_after_its_patch_and_explains_itself():
    helpers = {"__init__", "attributes", "registry"}
    files = {file.stem for file in README.parent.glob("*.py")} - helpers
    assert files == set(PATCH_NAMES)
    for name, patch in zip(PATCH_NAMES, all_patches(), strict=True):
        docstring = sys.modules[f"megatron_patches.{name}"].__doc__
        assert patch.name == name
        assert "Without: " in docstring
        assert "Goes when: " in docstring


def test_replacing_an_inherited_or_missing_attribute_deletes_it_again():
    class Base:
        inherited = 1

    class Child(Base):
        pass

    undo = replace_attributes((Child, "inherited", 2), (Child, "missing", 3))
    assert (Child.inherited, Child.missing) == (2, 3)
    undo()
    assert set(vars(Child)) & {"inherited", "missing"} == set()


def test_replacing_keeps_static_methods_static():
    class Owner:
        @staticmethod
        def method():
            return "original"

    raw = vars(Owner)["method"]
    undo = replace_attributes((Owner, "method", staticmethod(lambda: "patched")))
    assert Owner().method() == "patched"
    undo()
    assert vars(Owner)["method"] is raw


def test_a_view_changes_its_names_and_passes_on_the_others():
    view = ModuleView(torch, zeros="replaced")
    assert view.zeros == "replaced"
    assert view.Tensor is torch.Tensor
    assert callable(torch.zeros)


def test_rotary_table_is_cut_in_two_chunks_per_rank():
    apply_patches("cpu", only=["cp_rope"])
    from megatron.core.models.common.embeddings.rope_utils import get_pos_emb_on_this_cp_rank

    table = torch.arange(24).reshape(12, 2)
    for rank in range(3):
        group = SimpleNamespace(size=lambda: 3, rank=lambda rank=rank: rank)
        first, second = 2 * rank, 12 - 2 * (rank + 1)
        expected = torch.cat([table[first : first + 2], table[second : second + 2]])
        assert torch.equal(get_pos_emb_on_this_cp_rank(table, 0, group), expected)
        assert torch.equal(get_pos_emb_on_this_cp_rank(table.T, 1, group), expected.T)


def test_streams_do_nothing():
    apply_patches("cpu", only=["streams"])
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        tensor = torch.ones(2)
        tensor.record_stream(side)
    event = torch.cuda.Event()
    event.record(torch.cuda.default_stream())
    event.wait()
    assert event.query()


def test_random_states_are_kept_apart_and_restored():
    apply_patches("cpu", only=["rng"])
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    tracker = CudaRNGStatesTracker()
    tracker.add("a", 1)
    tracker.add("b", 2)
    whole = torch.rand(6, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(3)
    outside = torch.rand(2, generator=torch.Generator().manual_seed(3))
    drawn = []
    with tracker.fork("a"):
        drawn.append(torch.rand(2))
        with tracker.fork("b"):
            torch.rand(5)
        with tracker.fork("a"):
            drawn.append(torch.rand(2))
        drawn.append(torch.rand(2))
    assert torch.equal(torch.cat(drawn), whole)
    assert torch.equal(torch.rand(2), outside)
    with pytest.raises(LitesparkError, match="'c' was never added"), tracker.fork("c"):
        pass


@pytest.mark.parametrize("sizes", [[], [7], [5, 5, 5, 5, 5, 5], [1, 1, 1, 90, 1, 1, 1]])
def test_a_checkpoint_is_read_in_shares_that_hold_everything_once(sizes):
    items = [SimpleNamespace(storage_index=number) for number in range(len(sizes))]
    offsets = itertools.accumulate(sizes, initial=0)
    places = {
        number: SimpleNamespace(relative_path=f"file{number % 2}", offset=offset, length=size)
        for number, (size, offset) in enumerate(zip(sizes, offsets, strict=False))
    }
    shares = shares_of(items[::-1], places)
    assert len(shares) <= THREADS
    read = [item.storage_index for share in shares for item in share]
    assert read == sorted(read, key=lambda number: (number % 2, number)), "contiguous on disk"
    assert sorted(read) == list(range(len(sizes)))
    largest = max((sum(sizes[item.storage_index] for item in share) for share in shares), default=0)
    assert largest <= sum(sizes) / THREADS + max(sizes, default=0)
