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
    assert current_platform.get_punica_wrapper() == "molora.vllm.wrapper.GatedCPU"


def test_the_gpu_wrapper_fits_its_base() -> None:
    """Not run, for want of a GPU; but vLLM's class is there, and takes what ours hands on."""
    pytest.importorskip("vllm.lora.punica_wrapper.punica_gpu")
    from vllm.lora.punica_wrapper.punica_gpu import PunicaWrapperGPU

    from molora.vllm.wrapper_gpu import GatedGPU

    assert GatedGPU.__mro__[1].__name__ == "Gated" and GatedGPU.__mro__[2] is PunicaWrapperGPU
    parameters = list(inspect.signature(PunicaWrapperGPU.add_expand).parameters)
    assert parameters[:5] == ["self", "y", "x", "lora_b_stacked", "output_slices"]
    assert "self.add_expand(" in inspect.getsource(PunicaWrapperGPU.add_lora_linear)


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
