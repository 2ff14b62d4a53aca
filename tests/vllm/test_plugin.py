"""Registering, and that every door of vLLM is where it was."""

import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest


def test_registering_twice_changes_nothing() -> None:
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.platforms import current_platform
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    from molora.vllm.plugin import register

    register()
    doors = WorkerLoRAManager._load_adapter, LoRAModelRunnerMixin.load_lora_model
    register()
    assert (WorkerLoRAManager._load_adapter, LoRAModelRunnerMixin.load_lora_model) == doors
    assert current_platform.get_punica_wrapper() == "molora.vllm.wrapper_cpu.SparseCPU"


def test_the_gpu_wrapper_fits_its_base() -> None:
    """Not run, for want of a GPU; but vLLM's class is there, and takes what ours hands on."""
    from vllm.lora.ops.triton_ops.lora_kernel_metadata import LoRAKernelMeta
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from molora.vllm.wrapper_gpu import Sparse, SparseGPU

    assert [kind.__name__ for kind in SparseGPU.__mro__[1:3]] == ["Sparse", "PunicaWrapperGPU"]
    parameters = list(inspect.signature(PunicaWrapperGPU.add_expand).parameters)
    assert parameters[:5] == ["self", "y", "x", "lora_b_stacked", "output_slices"]
    theirs, ours = (list(inspect.signature(kind.add_lora_linear).parameters) for kind in (PunicaWrapperGPU, Sparse))
    assert theirs[:7] == ours[:7]
    source = inspect.getsource(PunicaWrapperGPU)
    assert "self.add_expand(" in source and "self.token_mapping_meta.meta_args(" in source
    assert list(inspect.signature(LoRAKernelMeta.meta_args).parameters)[1:] == ["token_nums", "specialize_active_lora"]


def test_the_same_content_has_the_same_id_everywhere(folders: dict[str, Path], tmp_path: Path) -> None:
    from molora.vllm.export import export
    from molora.vllm.folder import request

    again = request(export(folders["averages"].parent / "saved" / "averages", tmp_path))
    first, other = request(folders["averages"]), request(folders["gated"])
    assert (again.lora_int_id, again.lora_name) == (first.lora_int_id, first.lora_name)
    assert first.lora_int_id != other.lora_int_id and first.lora_name != other.lora_name


def test_without_the_plugin_a_stack_is_refused(folders: dict[str, Path]) -> None:
    """It would be the sum of all adapters."""
    from vllm.lora.peft_helper import PEFTHelper

    from molora.vllm.plugin import register

    register()
    with_it = PEFTHelper.from_local_dir(str(folders["averages"]), 400)
    assert not with_it.use_dora
    without = PEFTHelper.from_dict(json.loads((folders["averages"] / "adapter_config.json").read_text()))
    with pytest.raises(ValueError, match="DoRA"):
        without.validate_legal(SimpleNamespace(max_lora_rank=64))


def test_another_model_runner_is_refused() -> None:
    from molora.errors import BackendError
    from molora.vllm.runner import Routing

    with pytest.raises(BackendError, match="VLLM_USE_V2_MODEL_RUNNER=0"):
        Routing(SimpleNamespace())


def test_compiled_and_captured_models_show_no_hidden_states() -> None:
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    from molora.errors import BackendError
    from molora.vllm.runner import check_shown

    for mode, graphs in (
        (CompilationMode.NONE, CUDAGraphMode.NONE),
        (CompilationMode.VLLM_COMPILE, CUDAGraphMode.NONE),
        (CompilationMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY),
    ):
        config = SimpleNamespace(compilation_config=CompilationConfig(mode=mode, cudagraph_mode=graphs))
        if mode is CompilationMode.NONE and graphs is CUDAGraphMode.NONE:
            check_shown(config)
        else:
            with pytest.raises(BackendError, match="--enforce-eager"):
                check_shown(config)


def test_the_hidden_state_is_what_vllm_says() -> None:
    """To speculative decoding, of the models whose layers are handed a residual."""
    import torch
    from vllm.model_executor.models.interfaces import EagleModelMixin

    from molora.vllm.hidden import entering

    class Layer(torch.nn.Module):
        def forward(self, positions: object, hidden_states: object, residual: object) -> None: ...

    model = EagleModelMixin()
    model.aux_hidden_state_layers = (4,)
    hidden, residual = torch.randn(2, 5, 3)
    for given in (residual, None):
        (told,) = model._maybe_add_hidden_state([], 4, hidden, given)
        assert torch.equal(entering(Layer(), (None, hidden), {"residual": given}), told)
