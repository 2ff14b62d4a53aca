"""A base that lies on several devices: where each module multiplies, and which part of an adapter a sharded one needs.

- ``device_map``: whole modules on different devices; weights may also wait on the disk until they are asked for.
- tensor parallelism of ``transformers``: each of several processes has a part of a module's outputs (column-parallel:
  it takes those rows of B, and all of A) or of its inputs (row-parallel: those columns of A, and all of B; what the
  processes find is summed together with what the base finds).
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from molora.adapter import Adapter, LoRAWeights, SharedWeights
from molora.errors import BaseModelError, UnsupportedAdapterError

_CUT = {"colwise": "B", "colwise_gather_output": "B", "rowwise": "A"}  # by transformers' plan of a module


def device_of(module: nn.Module) -> torch.device:
    """Where a module of the base multiplies; if its weights come there when they are asked for, that device."""
    weight: Any = module.weight
    hook = getattr(module, "_hf_hook", None)  # of accelerate
    if weight.device.type != "meta" or getattr(hook, "execution_device", None) is None:
        return weight.device
    return torch.device(hook.execution_device)  # type: ignore[union-attr]


def current(device: torch.device) -> AbstractContextManager[Any]:
    """Within, a GPU is the current one: Triton launches its kernels there, wherever the tensors are."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def local(weight: torch.Tensor) -> torch.Tensor:
    """This process's part of a weight; of one that is not sharded all of it."""
    return weight.to_local() if sharded(weight) else weight  # type: ignore[attr-defined]


def sharded(weight: torch.Tensor) -> bool:
    """Whether several processes have a part each."""
    return hasattr(weight, "to_local")


@dataclass(frozen=True)
class Share:
    """This process's part of a linear module. style: of ``transformers``, which says what goes in and out. mesh: the
    processes that share it. cuts: "A" or "B"."""

    style: Any
    mesh: Any
    cuts: str

    def part(self, weights: LoRAWeights) -> LoRAWeights:
        """What the module's part needs of an adapter: columns of A, or rows of B."""
        if self.cuts == "B":
            return LoRAWeights(weights.A, self._own(weights.B, 0), weights.scale)
        return LoRAWeights(self._own(weights.A, 1), weights.B, weights.scale)

    def _own(self, factor: torch.Tensor, dim: int) -> torch.Tensor:
        size = -(-factor.shape[dim] // self.mesh.size())  # as the weights are cut: the last part may be shorter
        first = min(self.mesh.get_local_rank() * size, factor.shape[dim])
        return factor.narrow(dim, first, min(size, factor.shape[dim] - first)).contiguous()

    def run(
        self, module: nn.Module, x: torch.Tensor, add: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        """The module's output with what ``add(y, x)`` adds to this process's part of it, before parts are put together.

        Raises:
            BaseModelError: a gradient is asked for.
        """
        if torch.is_grad_enabled() and x.requires_grad:
            raise BaseModelError(
                "A base that is spread by tensor parallelism serves, and nothing is trained through it: load it on one "
                "device to train."
            )
        with torch.no_grad():
            (x, *_), _ = self.style.transform_inputs_pre_forward(module, (x,), {}, self.mesh)
            with self.style.context_around_forward(module, self.mesh):
                y = type(module).forward(module, x)  # the instance's own one is all of this, without the adapters
            found: torch.Tensor = self.style.transform_output_post_forward(module, add(y, x), self.mesh)
        return found


def share_of(base: PreTrainedModel, name: str) -> Share | None:
    """This process's part of a linear module, by its name in the base; None where it has all of it.

    Raises:
        UnsupportedAdapterError: it is shared in a way that adapters are not.
    """
    if getattr(base, "_device_mesh", None) is None:
        return None
    module: Any = base.get_submodule(name)
    if not sharded(module.weight):
        return None
    from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

    mesh: Any = base._device_mesh
    plan = (base.tp_plan or {}).get(replace_layer_number_by_wildcard(name))
    if plan not in _CUT:
        raise UnsupportedAdapterError(
            f"The base shares its module {name} among processes as {plan!r}, and adapters follow {', '.join(_CUT)} "
            f"alone. Load it with device_map, or take an adapter without {name}."
        )
    return Share(ALL_PARALLEL_STYLES[plan], mesh["tp"] if mesh.ndim > 1 else mesh, _CUT[plan])


def check_shares(adapter: Adapter, base: PreTrainedModel) -> None:
    """Raises UnsupportedAdapterError where the processes of a sharded base cannot share ``adapter``."""
    for name, weights in adapter.modules.items():
        if share_of(base, name) is not None and isinstance(weights, SharedWeights):
            raise UnsupportedAdapterError(
                f"{adapter.path} is compressed, and the base is spread by tensor parallelism, which takes adapters as "
                f"they were trained."
            )
