"""What the patches take for granted about megatron-core and torch: names, parameters, attributes.

When this fails after an upgrade, upstream has changed under a patch: adapt the patch, then this
list.
"""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

from megatron_patches.attributes import resolve
from megatron_patches.registry import PATCH_NAMES, all_patches, installed_megatron_version

CORE = "megatron.core"
CHECKPOINT = f"{CORE}.dist_checkpointing"
TORCH_CHECKPOINT = "torch.distributed.checkpoint"
DISTOPT = f"{CORE}.optimizer.distrib_optimizer.DistributedOptimizer"
RANDOM = f"{CORE}.tensor_parallel.random"
EMBEDDINGS = f"{CORE}.models.common.embeddings"

# Parameters of each function that a patch replaces or calls, in order.
SIGNATURES = {
    # models/gpt.py
    f"{CORE}.models.gpt.gpt_model.GPTModel._preprocess": (
        "self input_ids position_ids decoder_input inference_context packed_seq_params padding_mask"
    ),
    # cuda_literals
    f"{CHECKPOINT}.mapping.ShardedTensor.init_data": "self device init_fn",
    # type_names
    f"{CORE}.optimizer.clip_grads.clip_grad_by_total_norm_fp32": (
        "parameters max_norm total_norm use_decoupled_grad"
    ),
    # rng
    f"{RANDOM}._get_cuda_rng_state": "device clone graph_safe",
    f"{RANDOM}._set_cuda_rng_state": "new_state device graph_safe",
    f"{RANDOM}.CudaRNGStatesTracker.fork": "self name",
    # cp_rope
    f"{EMBEDDINGS}.rope_utils.get_pos_emb_on_this_cp_rank": "pos_emb seq_dim cp_group",
    # keep_pipeline_outputs, refuse_silent_faults
    f"{CORE}.model_parallel_config.ModelParallelConfig.__post_init__": "self",
    f"{CORE}.transformer.TransformerConfig.__post_init__": "self",
    f"{CORE}.pipeline_parallel.schedules.deallocate_output_tensor": (
        "out deallocate_pipeline_outputs"
    ),
    f"{CHECKPOINT}.strategies.async_utils.AsyncCallsQueue.__init__": "self persistent",
    # ckpt_fork_queue
    f"{CHECKPOINT}.strategies.filesystem_async._get_write_results_queue": "",
    # distopt_torch_adam, distopt_bucket_padding
    f"{DISTOPT}.state_dict": "self",
    f"{DISTOPT}.load_state_dict": "self state_dict",
    f"{DISTOPT}._get_main_param_and_optimizer_states": "self model_param",
    f"{DISTOPT}._set_main_param_and_optimizer_states": "self model_param tensors",
    f"{DISTOPT}.sharded_param_state_fully_reshardable": (
        "self model_sharded_state_dict is_loading metadata"
    ),
    # recompute_without_te
    f"{RANDOM}.CheckpointWithoutOutput.__init__": "self fp8",
    # safe_checkpoint_metadata
    f"{TORCH_CHECKPOINT}.filesystem.FileSystemReader.read_metadata": "self args kwargs",
    f"{TORCH_CHECKPOINT}.default_planner.DefaultLoadPlanner.load_bytes": "self read_item value",
    f"{CHECKPOINT}.strategies.common.TorchCommonLoadStrategy.load_common": "self checkpoint_dir",
    f"{CHECKPOINT}.strategies.torch.TorchDistLoadShardedStrategy.load": (
        "self sharded_state_dict checkpoint_dir"
    ),
    # read_side_by_side
    f"{CHECKPOINT}.strategies.torch._get_filesystem_reader": "checkpoint_dir cache_metadata",
    f"{TORCH_CHECKPOINT}.filesystem.FileSystemReader.read_data": "self plan planner",
}

# Fields of the configuration that a guard reads.
CONFIG_FIELDS = (
    "batch_p2p_comm",
    "cross_entropy_loss_fusion",
    "deallocate_pipeline_outputs",
    "enable_autocast",
    "fp4",
    "fp8",
    "overlap_p2p_comm",
    "params_dtype",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
)

# Text in the source of a function: the fault that a patch repairs, or a name it leans on.
SOURCES = {
    # models/gpt.py: by name, so that the documents of a batch can be taken out of it
    f"{CORE}.models.gpt.gpt_model.GPTModel.forward": (
        "self._preprocess(\n            input_ids=input_ids,\n            position_ids=position_ids"
    ),
    f"{DISTOPT}.sharded_param_state_fully_reshardable": "param_index_map.items()",
    f"{DISTOPT}.load_state_dict": 's["step"] = step',
    f"{RANDOM}.CheckpointWithoutOutput.__init__": "fp8 is not None",
    f"{RANDOM}.CudaRNGStatesTracker.fork": "_current_state_name",
    f"{TORCH_CHECKPOINT}.filesystem.FileSystemReader.read_metadata": "pickle.load(",
    f"{TORCH_CHECKPOINT}.default_planner.DefaultLoadPlanner.load_bytes": "weights_only=False",
    f"{CHECKPOINT}.strategies.common.TorchCommonLoadStrategy.load_common": "torch.load(",
    f"{CHECKPOINT}.strategies.torch._get_filesystem_reader": "CachedMetadataFileSystemReader(",
    f"{CORE}.transformer.utils.get_default_causal_mask": 'device="cuda"',
    f"{CORE}.optimizer.clip_grads.clip_grad_by_total_norm_fp32": "'torch.cuda.FloatTensor'",
}


def all_symbols():
    return sorted({symbol for patch in all_patches() for symbol in patch.symbols})


@pytest.mark.parametrize("name", PATCH_NAMES)
def test_the_installed_version_is_in_range(name):
    (patch,) = [patch for patch in all_patches() if patch.name == name]
    assert SpecifierSet(patch.versions).contains(installed_megatron_version())


@pytest.mark.parametrize("symbol", all_symbols())
def test_symbol_exists(symbol):
    resolve(symbol)


@pytest.mark.parametrize("symbol", SIGNATURES)
def test_parameters(symbol):
    function = resolve(symbol)
    assert callable(function)
    assert list(inspect.signature(function).parameters) == SIGNATURES[symbol].split()


@pytest.mark.parametrize("symbol", SOURCES)
def test_source(symbol):
    function = inspect.unwrap(resolve(symbol))
    assert SOURCES[symbol] in inspect.getsource(function)


def test_every_patched_function_of_megatron_has_its_parameters_pinned():
    unpinned = []
    for symbol in all_symbols():
        is_function = inspect.isfunction(resolve(symbol))
        if symbol.startswith(CORE) and is_function and symbol not in SIGNATURES:
            unpinned.append(symbol)
    # Wrapped as they are (whatever the arguments), or imported names of what is pinned above.
    assert unpinned == [
        f"{EMBEDDINGS}.rotary_pos_embedding.get_pos_emb_on_this_cp_rank",
        f"{EMBEDDINGS}.yarn_rotary_pos_embedding.get_pos_emb_on_this_cp_rank",
        f"{DISTOPT}.__init__",
        f"{CORE}.optimizer.optimizer.Float16OptimizerWithFloat16Params.__init__",
        f"{CORE}.optimizer.optimizer.clip_grad_by_total_norm_fp32",
    ]


def test_config_has_the_fields_the_guards_read():
    config = resolve(f"{CORE}.transformer.TransformerConfig")
    assert set(CONFIG_FIELDS) <= {field.name for field in dataclasses.fields(config)}


def test_importers_of_replaced_functions_are_the_known_ones():
    """A module that imported a function by name keeps the old one unless the patch knows it."""
    import megatron.core

    names = {
        "get_pos_emb_on_this_cp_rank": {
            "models/common/embeddings/rope_utils.py",
            "models/common/embeddings/rotary_pos_embedding.py",
            "models/common/embeddings/yarn_rotary_pos_embedding.py",
        },
        "clip_grad_by_total_norm_fp32": {"optimizer/clip_grads.py", "optimizer/optimizer.py"},
        "_get_write_results_queue": {"dist_checkpointing/strategies/filesystem_async.py"},
    }
    root = Path(megatron.core.__path__[0])
    sources = {
        path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
        for path in root.rglob("*.py")
    }
    for name, known in names.items():
        found = {path for path, text in sources.items() if re.search(rf"\b{name}\b", text)}
        assert found == known


def test_cuda_literals_of_the_patched_modules():
    """The modules of the training path that write the device out are those of the patch."""
    from megatron_patches.cuda_literals import MODULES

    for module in MODULES:
        source = inspect.getsource(resolve(module))
        assert 'device="cuda"' in source or "device='cuda'" in source


def test_bucket_and_buffer_attributes():
    """Attributes that `distopt_bucket_padding` reads from instances."""
    source = inspect.getsource(resolve(f"{CORE}.distributed.param_and_grad_buffer"))
    for name in ("self.buckets", "self.param_index_map"):
        assert f"{name} = " in source or f"{name}: " in source
    bucket = resolve(f"{CORE}.distributed.param_and_grad_buffer._ParamAndGradBucket.__init__")
    assert {"offset", "numel_unpadded", "bucket_id"} <= set(inspect.signature(bucket).parameters)


def test_the_metadata_classes_exist():
    """Of the classes allowed in `.metadata`, those of torch must still have their names."""
    from megatron_patches.safe_checkpoint_metadata import ALLOWED_GLOBALS

    for module, name in sorted(ALLOWED_GLOBALS):
        if not module.startswith("pathlib"):  # one of two modules, and two platforms
            resolve(f"{module}.{name}")
