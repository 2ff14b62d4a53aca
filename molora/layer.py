"""A linear module of the base with the adapters that adapt it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from molora.adapter import LoRAWeights, SharedWeights
from molora.backend import failed
from molora.errors import BaseModelError
from molora.groups import AdapterGroup
from molora.packed import ready
from molora.plan import RoutingPlan
from molora.shared import SharedPath
from molora.spread import Share, current, device_of
from molora_kernels import Dispatch, Factors, add_lora
from molora_kernels.pages import Writes

_HALF = (torch.bfloat16, torch.float16)
_FEW = 48  # tokens up to which all adapters are multiplied with all of them
_MOST_RANKS = 512  # that are kept joined beyond those that act


def multiplied_in(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which torch multiplies adapters of a module: on a CPU half precision is slower."""
    return torch.float32 if device.type == "cpu" and dtype in _HALF else dtype


class PlanSource(Protocol):
    """Where a module finds the plan of the forward that is under way."""

    kept: slice | torch.Tensor  # the positions whose hidden states reach the head

    def plan(self, layer: int) -> RoutingPlan | None: ...


def linear_size(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a module that can be adapted, None for another module."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.nf
    if isinstance(module, nn.Linear):  # quantised linear modules of bitsandbytes are subclasses
        return module.in_features, module.out_features
    return None


class MoLoRALinear(nn.Module):
    """y = base(x) + sum of the adapters that the plan has for each token.

    ``layer`` is the decoder layer it stands in, which says whose plan holds. Factors are kept by slot, in the compute
    dtype and on the device of the base module: in ``factors``, or where the kernels of a GPU serve them, in the pages
    of ``group``, which it shares with the modules that read the same input and in which it is number ``piece``.
    Those of a compressed store are in ``shared`` where torch multiplies them. Where processes share the module,
    ``share`` is this one's part, and factors are parts as well.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        source: PlanSource,
        layer: int,
        group: AdapterGroup | None = None,
        piece: int = 0,
        share: Share | None = None,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.layer = layer
        self.group, self.piece = group, piece
        self.share = share
        self.factors: dict[int, Factors] = {}
        self.shared: list[SharedPath] = []  # one for each basis
        self.source = source
        self._joined: _Joined | None = None
        # In a state dict the base is the base: what is saved of it loads anywhere.
        self.register_state_dict_post_hook(_as_unwrapped)
        self.register_load_state_dict_pre_hook(_as_wrapped)

    @classmethod
    def from_base(
        cls,
        base_layer: nn.Module,
        source: PlanSource,
        layer: int = 0,
        group: AdapterGroup | None = None,
        piece: int = 0,
        share: Share | None = None,
    ) -> "MoLoRALinear":
        if linear_size(base_layer) is None:
            raise BaseModelError(f"{type(base_layer).__name__} is no linear module, so no LoRA can adapt it.")
        return cls(base_layer, source, layer, group, piece, share)

    @property
    def weight(self) -> torch.Tensor:
        return self.base_layer.weight  # type: ignore[return-value]

    @property
    def bias(self) -> torch.Tensor | None:
        return self.base_layer.bias  # type: ignore[return-value]

    def set_factors(
        self,
        slot: int,
        weights: LoRAWeights | SharedWeights | None,
        dtype: torch.dtype,
        factors: Factors | None = None,
        writes: Writes | None = None,
    ) -> None:
        """Puts an adapter into a slot, or empties it.

        Args:
            slot, weights, dtype: which, what, and the module's.
            factors: what :func:`molora.packed.ready` makes of the weights, if it is there.
            writes: gathers what is written into the kernels' pages, for the caller to do.
        """
        if self._joined is not None:  # setting an attribute of a module is slow
            self._joined = None
        if self.group is not None:
            basis = weights.basis if isinstance(weights, SharedWeights) else None
            if weights is not None and factors is None:
                own = weights.core if isinstance(weights, SharedWeights) else weights
                factors = ready(own, device_of(self.base_layer), dtype)
            self.group.put(slot, self.piece, factors, writes, basis)
            return
        self.factors.pop(slot, None)
        self._share(slot, weights if isinstance(weights, SharedWeights) else None, factors)
        if isinstance(weights, LoRAWeights):
            device = device_of(self.base_layer)  # the model may have moved since they were made ready
            factors = ready(weights, device, multiplied_in(device, dtype)) if factors is None else factors
            self.factors[slot] = Factors(factors.A.to(device), factors.B.to(device))

    def afresh(self) -> None:
        """Forgets what was joined for the last steps, by which sums are rounded."""
        if self._joined is not None:  # setting an attribute of a module is slow
            self._joined = None

    def _share(self, slot: int, weights: SharedWeights | None, factors: Factors | None) -> None:
        for path in self.shared:
            path.put(slot, None)
        if weights is not None:
            own = next((path for path in self.shared if path.basis is weights.basis), None)
            if own is None:
                own = SharedPath(weights.basis, self._inner, self.weight)
                self.shared.append(own)
            own.put(slot, weights, factors)
        if not all(path.adapts for path in self.shared):
            self.shared = [path for path in self.shared if path.adapts]

    def _inner(self, linear: nn.Module) -> "MoLoRALinear":
        return MoLoRALinear(linear, self.source, self.layer)

    def _apply(self, fn: Any, recurse: bool = True) -> "MoLoRALinear":
        """``.to()`` and the like move the factors too."""
        super()._apply(fn, recurse)
        self._joined = None
        if self.group is not None:
            self.group.apply(fn)
        for path in self.shared:
            path.apply(fn)
        self.factors = {slot: Factors(_compute(fn(A)), _compute(fn(B))) for slot, (A, B) in self.factors.items()}
        return self

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = self._alone(x, *args, **kwargs)
        if self.shared and self.source.plan(self.layer) is not None:
            y = sum((path(x).to(y.dtype) for path in self.shared), y)
        return y

    def _alone(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Without what is shared."""
        plan = self.source.plan(self.layer)
        if plan is None or not (self.factors or self.group):
            return self.base_layer(x, *args, **kwargs)
        plan = self._here(plan, x)
        if self.share is not None:
            return self.share.run(self.base_layer, x, partial(self._added, plan))
        flat = x.reshape(-1, x.shape[-1])  # before the base's product: the way back sums gradients in this order
        by_kernels = self.group is not None and self.group.serves(flat)
        if by_kernels and self.group is not None and not args and not kwargs:
            with current(x.device):
                found = self.group.linear(self.base_layer, x, plan.on(x.device).paged, self.piece)
            if found is not None:
                return found
        return self._added(plan, self.base_layer(x, *args, **kwargs), x, flat)

    def _added(
        self, plan: RoutingPlan, y: torch.Tensor, x: torch.Tensor, flat: torch.Tensor | None = None
    ) -> torch.Tensor:
        """y plus what the adapters of a plan add for the input x. flat: x as [T, in]."""
        # The base may have taken its input to another device.
        plan, x = plan.on(y.device), x.to(y.device)
        flat = x.reshape(-1, x.shape[-1]) if flat is None else flat.to(y.device)
        if self.group is not None and self.group.serves(flat):
            try:
                with current(x.device):
                    return self.group.add(y.contiguous(), x, flat, plan.paged, self.piece)
            except Exception as error:  # Triton's own errors have no common class
                if not failed(error):
                    raise
        factors = self.factors
        if self.group is not None:
            self._joined = None  # pages may have been written since
            factors = self.group.factors(self.piece, plan.dispatch.slots)
        return self._add(y.reshape(-1, y.shape[-1]), flat, plan.dispatch, factors).view(y.shape)

    def _here(self, plan: RoutingPlan, x: torch.Tensor) -> RoutingPlan:
        """The plan of the rows of x: of all tokens, or of those that are kept for the head."""
        batch, tokens, _ = plan.shape
        rows = x.shape[:-1].numel()
        if rows == batch * tokens:
            return plan
        if x.dim() == 3 and x.shape[0] == batch and x.shape[1] < tokens:
            kept = plan.at(self.source.kept)  # the head under logits_to_keep
            if kept.shape[1] == x.shape[1]:
                return kept
        raise BaseModelError(
            f"A module got {rows} rows in a forward of {batch} x {tokens} tokens: "
            f"it does not see one row a token, so it cannot be adapted."
        )

    def _add(self, y: torch.Tensor, x: torch.Tensor, work: Dispatch, factors: dict[int, Factors]) -> torch.Tensor:
        if not work.groups:
            return y
        if work.everywhere and not torch.is_grad_enabled():
            return self._add_everywhere(y, x, work, factors)
        if work.tokens <= _FEW and not torch.is_grad_enabled():
            return self._add_few(y, x, work, factors)
        return add_lora(y, x, factors, work)

    def _add_everywhere(
        self, y: torch.Tensor, x: torch.Tensor, work: Dispatch, factors: dict[int, Factors]
    ) -> torch.Tensor:
        """All groups act on all tokens (decoding, forced adapters): their ranks joined, two products serve them."""
        slots = tuple(slot for slot in work.slots if slot in factors)
        if not slots:
            return y
        if self._joined is None or self._joined.slots != slots:
            self._joined = _Joined.of(slots, factors)
        A, B = self._joined.factors
        h = x.to(A.dtype) @ A.T
        if not work.unit:
            h = h * _rank_weights(work, [(s, factors[s].A.shape[0]) for s in slots])
        # Under autocast the products come in another dtype than the factors.
        return y.add_((h @ B.to(h.dtype)).to(y.dtype))

    def _add_few(self, y: torch.Tensor, x: torch.Tensor, work: Dispatch, factors: dict[int, Factors]) -> torch.Tensor:
        """Few tokens, each with its own adapters: two products with all of them, of which each token keeps its own. A
        product is so thin that calling one for each adapter takes longer than all the others' numbers."""
        acting = {slot for slot in work.slots if slot in factors}
        if not acting:
            return y
        joined = self._joined
        if joined is None or not acting <= set(joined.slots):
            # The next step's tokens may want other ones of those that were wanted before.
            slots = sorted(acting.union(joined.slots if joined is not None else ()) & factors.keys())
            if sum(factors[slot].A.shape[0] for slot in slots) > _MOST_RANKS:
                slots = sorted(acting)
            joined = self._joined = _Joined.of(tuple(slots), factors)
        A, B = joined.factors
        shares = work.shares(joined.slots, joined.ranks, x.device)
        h = x.to(A.dtype) @ A.T
        if shares.weights is not None:
            h = h * shares.weights
        # Not multiplied by 0: what is no number in one sequence must not reach another one.
        h = h.masked_fill(shares.idle, 0.0)
        return y.add_((h.to(B.dtype) @ B).to(y.dtype))


@dataclass(frozen=True)
class _Joined:
    """Factors of several slots as one adapter's; ``ranks`` of each."""

    slots: tuple[int, ...]
    ranks: tuple[int, ...]
    factors: Factors

    @classmethod
    def of(cls, slots: tuple[int, ...], factors: Mapping[int, Factors]) -> "_Joined":
        parts = [factors[slot] for slot in slots]
        joined = parts[0] if len(parts) == 1 else Factors(*(torch.cat(pair) for pair in zip(*parts, strict=True)))
        return cls(slots, tuple(len(part.A) for part in parts), joined)


def _as_unwrapped(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name in [name for name in state if name.startswith(f"{prefix}base_layer.")]:
        state[prefix + name.removeprefix(f"{prefix}base_layer.")] = state.pop(name)


def _as_wrapped(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    inside = f"{prefix}base_layer."
    for name in [name for name in state if name.startswith(prefix) and not name.startswith(inside)]:
        state[inside + name.removeprefix(prefix)] = state.pop(name)


def _compute(tensor: torch.Tensor) -> torch.Tensor:
    """A factor in the dtype of its products: float32 on a CPU, where a thin product in half precision takes 40 times
    as long (90 against 2 microseconds on two cores)."""
    return tensor.float() if tensor.dtype in _HALF and tensor.device.type == "cpu" else tensor


def _rank_weights(work: Dispatch, ranks: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[T, R] weights of the joined ranks, float32."""
    weights = {group.slot: group.weights for group in work.groups}
    columns = [w.unsqueeze(1).expand(-1, rank) for slot, rank in ranks if (w := weights[slot]) is not None]
    return torch.cat(columns, 1)
