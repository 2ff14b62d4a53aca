"""Which modules of a base are adapted, and by which code: its wrapped modules, and the groups of their adapters."""

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedModel

from molora.adapter import Adapter, LoRAWeights
from molora.ahead import Ahead
from molora.backend import backend_for, check_backend
from molora.cores import add_apart
from molora.errors import BaseModelError
from molora.groups import AdapterGroup, siblings
from molora.layer import MoLoRALinear, linear_size, multiplied_in
from molora.packed import Packed, Place, pack
from molora.routing import RoutingState, decoder_layers
from molora.shared import core_dtype
from molora.spread import device_of, share_of
from molora_kernels.megablocks import FactorStack, PairOrder, add_lora_megablocks, pair_order, stack_factors
from molora_kernels.order import PagedPlan
from molora_kernels.pages import Writes


class PairOrders:
    """The order of the last plan: made once for a forward, for every module that has as many slots."""

    def __init__(self) -> None:
        self._last: tuple[PagedPlan, int, PairOrder] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies order for themselves: the weights of a plan in training are no tensor that can be copied."""
        return {"_last": None}

    def of(self, plan: PagedPlan, slots: int) -> PairOrder:
        """The order of ``plan`` for slots below ``slots``."""
        if self._last is None or self._last[0] is not plan or self._last[1] != slots:
            self._last = (plan, slots, pair_order(plan.slots, slots))
        return self._last[2]


class MegaBlocksGroup(AdapterGroup):
    """A group whose adapters MegaBlocks multiplies, from a copy of its pages that is made when it is needed.

    The pages stay, and what else reads them, such as a captured decode step, finds the same adapters.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.orders = PairOrders()  # one for all groups of a model, once it has them
        self._stacks: dict[int, FactorStack | None] = {}  # by piece; None: nothing is to be copied

    def _written(self, piece: int) -> None:
        self._stacks.pop(piece, None)

    def add(self, y: torch.Tensor, x: torch.Tensor, flat: torch.Tensor, plan: PagedPlan, piece: int) -> torch.Tensor:
        if not self.pages.adapted(piece):
            return y
        if self.compressed(piece):  # these are not copied
            y = add_apart(y, flat.to(self.pages.A.dtype), self.pages, plan, piece)
        if piece not in self._stacks:
            names = self.pages.names(piece)
            own = {slot: factors for slot, factors in self.pages.factors(piece).items() if slot not in names}
            with torch.inference_mode(False), torch.no_grad():  # a later forward may want gradients through it
                self._stacks[piece] = stack_factors(own) if own else None
        stack = self._stacks[piece]
        if stack is None:
            return y
        rows = y.view(-1, y.shape[-1])
        order = self.orders.of(plan, len(stack.A) - 1)
        return add_lora_megablocks(rows, flat, plan.weights, stack, order).view(y.shape)

    def apply(self, change: Any) -> None:
        super().apply(change)
        self._stacks.clear()


class AdaptedModules:
    """Wraps modules of ``base`` as adapters come.

    Args:
        base: the model.
        routing: where the modules find the plan.
        backend: "torch", "triton", "megablocks", or None: by the device of each module.

    Raises:
        ConfigError: there is no such backend. BackendError: it is not installed.
    """

    def __init__(self, base: PreTrainedModel, routing: RoutingState, backend: str | None) -> None:
        check_backend(backend)
        self.base, self.routing, self.backend = base, routing, backend
        self.groups: dict[str, AdapterGroup] = {}  # by module name, where kernels serve the adapters
        self.orders = PairOrders()  # of MegaBlocks
        self._modules: dict[str, MoLoRALinear] = {}  # by name, what was wrapped
        self._last = 0  # slot that was ever taken, or is reserved
        self._pages = 0  # that are reserved in each group
        self._ahead = Ahead()

    def pack(self, adapter: Adapter) -> Packed:
        """Makes an adapter ready for :meth:`put`; from any thread."""
        return pack(adapter, self._place, self._part, self)

    def fetch(self, packed: Packed) -> None:
        """Starts an adapter's way to its devices, where :meth:`put` will want it; from any thread."""
        self._ahead.start(packed)

    def reserve(self, adapters: int) -> None:
        """Takes the memory of so many adapters, of a page of ranks each, at once: what was captured for the pages as
        they are then stays of use while these come."""
        self._last, self._pages = max(self._last, adapters - 1), max(self._pages, adapters)
        for group in self.groups.values():
            group.reserve(self._last, self._pages)

    def put(self, slot: int, packed: Packed) -> None:
        """Puts an adapter into a slot of all modules that it adapts; the others know the slot then too."""
        self._last = max(self._last, slot)
        for group in self.groups.values():
            group.reserve(self._last)
        writes, brought = Writes(), packed.brought(self._ahead.take(packed))
        for name, weights in packed.adapter.modules.items():
            module = self._wrapped(name)
            module.set_factors(slot, weights, self._dtype(module.weight), brought.get(name), writes)
        writes.done()

    def drop(self, slot: int, adapter: Adapter) -> None:
        """Empties the slot of those modules."""
        writes = Writes()
        for name in adapter.modules:
            self._wrapped(name).set_factors(slot, None, self.base.dtype, writes=writes)
        writes.done()

    def afresh(self) -> None:
        """Has the next forward compute, to the last bit, as if there had been none before it: modules keep joined what
        their last steps wanted. By the one who has the turn."""
        for module in self._modules.values():
            module.afresh()

    def moved(self, adapters: Mapping[int, Adapter]) -> None:
        """The base may be on another kind of device, where other code serves: then adapters (by slot) go there."""
        wrapped = self._modules
        if all((module.group is None) == (self._group(name) is None) for name, module in wrapped.items()):
            return
        self.groups.clear()
        for name, module in wrapped.items():
            module.group = self._group(name)
            module.piece = module.group.names.index(name) if module.group is not None else 0
            module.factors.clear()
            module.shared.clear()
        for slot, adapter in adapters.items():
            self.put(slot, self.pack(adapter))

    def _dtype(self, weight: torch.Tensor) -> torch.dtype:
        """In which a module with this weight computes."""
        return weight.dtype if weight.is_floating_point() else self.base.dtype

    def _part(self, name: str, weights: LoRAWeights) -> LoRAWeights:
        share = share_of(self.base, name)
        return weights if share is None else share.part(weights)

    def _place(self, name: str, shared: bool) -> Place:
        module: Any = self._modules.get(name) or self.base.get_submodule(name)
        device, dtype = device_of(getattr(module, "base_layer", module)), self._dtype(module.weight)
        kernels = self._by_kernels(device)
        if kernels:
            return device, dtype, True
        return device, core_dtype(module.weight) if shared else multiplied_in(device, dtype), False

    def _by_kernels(self, device: torch.device) -> bool:
        return (self.backend or backend_for(device)) != "torch"

    def _wrapped(self, name: str) -> MoLoRALinear:
        found = self._modules.get(name)
        if found is None:
            group = self._group(name)
            piece = group.names.index(name) if group is not None else 0
            module = self.base.get_submodule(name)
            if isinstance(module, MoLoRALinear):  # whose plans and pages are those of another model
                raise BaseModelError("This base serves another MoLoRAModel already: load it anew.")
            share = share_of(self.base, name)
            found = MoLoRALinear.from_base(module, self.routing, self._layer(name), group, piece, share).eval()
            parent, _, child = name.rpartition(".")
            setattr(self.base.get_submodule(parent), child, found)
            self._modules[name] = found
        return found

    def _layer(self, name: str) -> int:
        """The decoder layer that a module stands in; after the last for the head."""
        layers, _ = decoder_layers(self.base)
        if name.startswith(f"{layers}."):
            return int(name[len(layers) + 1 :].split(".")[0])
        return int(self.base.config.get_text_config().num_hidden_layers)

    def _group(self, name: str) -> AdapterGroup | None:
        """The pages of a module and of those that share its input; None where torch does the work."""
        module: Any = self.base.get_submodule(name)
        if not self._by_kernels(device_of(getattr(module, "base_layer", module))):
            return None
        if name not in self.groups:
            names = self._siblings(name)
            group = (MegaBlocksGroup if self.backend == "megablocks" else AdapterGroup).of(self.base, names)
            if isinstance(group, MegaBlocksGroup):
                group.orders = self.orders
            group.reserve(self._last, self._pages)
            self.groups.update(dict.fromkeys(names, group))
        return self.groups[name]

    def _siblings(self, name: str) -> tuple[str, ...]:
        modules: dict[str, Any] = dict(self.base.named_modules())
        names = siblings(name)
        found = [modules.get(other) for other in names]
        sizes = [linear_size(getattr(module, "base_layer", module)) if module is not None else None for module in found]
        same = all(size is not None for size in sizes) and len({size[0] for size in sizes if size is not None}) == 1
        places = {device_of(getattr(module, "base_layer", module)) for module in found if module is not None}
        return names if same and len(places) == 1 else (name,)
