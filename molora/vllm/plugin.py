"""The entry point of ``vllm.general_plugins``: every process of vLLM calls :func:`register`."""

import inspect
from functools import wraps
from pathlib import Path
from typing import Any

from molora.errors import BackendError, MoLoRAError
from molora.vllm.folder import MANIFEST
from molora.vllm.selections import check_choice, choice_of

_ROUTED = {
    "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU": "molora.vllm.wrapper_cpu.SparseCPU",
    "vllm.lora.punica_wrapper.punica_gpu.PunicaWrapperGPU": "molora.vllm.wrapper_gpu.SparseGPU",
}


def register() -> None:
    """Makes vLLM route the folders of :mod:`molora.vllm.export`. A second call changes nothing."""
    from vllm.lora.peft_helper import PEFTHelper
    from vllm.lora.worker_manager import WorkerLoRAManager
    from vllm.platforms import current_platform
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.lora_model_runner_mixin import LoRAModelRunnerMixin

    if hasattr(WorkerLoRAManager._load_adapter, "molora"):
        return
    platform = type(current_platform)
    platform.get_punica_wrapper = classmethod(_routed(platform.get_punica_wrapper.__func__))
    LoRAModelRunnerMixin.load_lora_model = _routing(LoRAModelRunnerMixin.load_lora_model)
    PEFTHelper.from_local_dir = classmethod(_unlocked(PEFTHelper.from_local_dir.__func__))
    InputProcessor.process_inputs = _with_choice(InputProcessor.process_inputs)
    WorkerLoRAManager._load_adapter = _with_stack(WorkerLoRAManager._load_adapter)


def _routed(get_punica_wrapper: Any) -> Any:
    @wraps(get_punica_wrapper)
    def get(cls: Any) -> str:
        name = get_punica_wrapper(cls)
        if name not in _ROUTED:
            raise BackendError(f"MoLoRA does not route in {name}: it runs on vLLM's CPU and CUDA builds.")
        return _ROUTED[name]

    return get


def _routing(load_lora_model: Any) -> Any:
    @wraps(load_lora_model)
    def load(self: Any, *args: Any, **kwargs: Any) -> Any:
        from molora.vllm.runner import Routing  # needs the worker's part of vLLM

        model = load_lora_model(self, *args, **kwargs)
        if not hasattr(self, "molora"):  # a model may be loaded again
            self.molora = Routing(self)
        self.lora_manager.molora = self.molora
        return model

    return load


def _with_choice(process_inputs: Any) -> Any:
    """A request's own selection is refused here, where an error is the request's alone. It goes into what the prefix
    cache knows its blocks by, and so does the stack's folder: vLLM 0.26 knows an adapter by its name alone, under which
    a server may be given another version."""
    from vllm.exceptions import VLLMValidationError

    signature = inspect.signature(process_inputs)

    @wraps(process_inputs)
    def process(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        lora = given.get("lora_request")
        try:
            choice = choice_of(given["params"])
            if choice is not None:
                check_choice(choice, None if lora is None else _folder(lora))
        except MoLoRAError as error:  # the kind that vLLM's server tells the client
            raise VLLMValidationError(str(error), parameter="extra_args") from error
        request = process_inputs(*args, **kwargs)
        if lora is not None and (choice is not None or (Path(lora.lora_path) / MANIFEST).is_file()):
            request.cache_salt = f"{request.cache_salt or ''}/molora {lora.lora_path} {choice}"
        return request

    return process


def _unlocked(from_local_dir: Any) -> Any:
    """An exported folder says DoRA, so that vLLM refuses it where this plugin is missing."""

    @wraps(from_local_dir)
    def read(cls: Any, lora_path: str, *args: Any, **kwargs: Any) -> Any:
        helper = from_local_dir(cls, lora_path, *args, **kwargs)
        if (Path(lora_path) / MANIFEST).is_file():
            helper.use_dora = False
        return helper

    return read


def _folder(lora_request: Any) -> Path:
    from vllm.lora.utils import get_adapter_absolute_path

    return Path(get_adapter_absolute_path(lora_request.lora_path))


def _with_stack(load_adapter: Any) -> Any:
    @wraps(load_adapter)
    def load(self: Any, lora_request: Any) -> Any:
        lora = load_adapter(self, lora_request)
        lora.molora = self.molora.open(_folder(lora_request))
        return lora

    load.molora = True  # type: ignore[attr-defined]
    return load
