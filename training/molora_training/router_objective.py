"""What a router learns from a batch: the losses, and how often it is right."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from molora import MoLoRAModel, Router
from molora.errors import DataError
from molora.router import balance_loss, chosen_share, entropy, z_loss
from molora.routing import decoder_layers
from molora.selection import ResolvedSelection
from molora_training.data import IGNORED, Batch
from molora_training.distillation import Teacher
from molora_training.processes import Processes
from molora_training.router_settings import LossWeights
from molora_training.selections import KeptSelections
from molora_training.shares import Shares
from molora_training.token_losses import TokenLosses

_SIDE = {"balance": balance_loss, "z": z_loss, "entropy": entropy}  # of one layer's logits, at the real tokens


class Labels:
    """Which row of each stack layer is right for each domain.

    A layer is taught if one of its adapters is a domain (the shared row of a shared layer counts for each of them);
    there, every other domain's text belongs to the null.
    """

    def __init__(self, model: MoLoRAModel, domains: Sequence[str]) -> None:
        assert isinstance(model.router, Router)
        self.domains = list(domains)
        self.rows: dict[str, list[int]] = {}  # layer -> its rows in the router
        self.targets: dict[str, torch.Tensor] = {}  # layer -> [domains] position in those rows
        at = {name: index for index, name in enumerate(model.router.rows)}
        for layer in model.stack.layers:
            taught = [domain for domain in domains if domain in layer.adapters]
            if not taught or layer.keyed:
                continue
            names = ["*"] if layer.shared else list(layer.adapters)
            names.append("none")
            self.rows[layer.name] = [at[f"{layer.name}/{name}"] for name in names]
            own = ["*" if layer.shared and domain in taught else domain for domain in domains]
            found = [names.index(name) if name in names and domain in taught else len(names) - 1
                     for name, domain in zip(own, domains, strict=True)]  # fmt: skip
            self.targets[layer.name] = torch.tensor(found)
        if not self.rows:
            raise DataError(
                f"None of the domains {', '.join(domains)} is an adapter of the stack ({', '.join(model.stack.names)})."
            )

    def selection(self, model: MoLoRAModel) -> dict[str, Any]:
        """ "auto" in the layers that are taught and can be left to the router, off in the others."""
        return {
            layer.name: "auto" if layer.name in self.rows and not layer.shared else None for layer in model.stack.layers
        }


class RouterHold(Protocol):
    """What holds a router back while it learns; it must not wait for the device. old: rows that have no text here."""

    old: list[str]

    def prepare(self, router: Router) -> None:
        """Sees the router before the first step, and may freeze a part of it."""

    def penalty(self) -> torch.Tensor:
        """What is added to the loss of a step; a scalar."""


class _Reached(Exception):
    """The layer at which the router reads: the rest of the forward is not needed."""


class RouterObjective(nn.Module):
    """The losses of a batch. Only the router has trainable parameters.

    Nothing in it waits for the device, and its tensors have the same shapes for all batches of one shape. Where several
    processes do a step together, a process's terms are its part of the step's: their sum over the processes is what one
    process would find. The balance is, where it is learnt; else it is the mean of the processes' own, for the curves.
    """

    def __init__(
        self,
        model: MoLoRAModel,
        labels: Labels,
        weights: LossWeights,
        class_weights: dict[str, Any],
        null_start: int = 0,
        answer_weights: torch.Tensor | None = None,
        hold: RouterHold | None = None,
        processes: Processes | None = None,
    ) -> None:
        """null_start: tokens at the start of a text that are the null's, in every layer that is taught.
        answer_weights: [domains], of the next-token loss at a domain's answer tokens; None: all weigh the same.
        processes: that do a step together; before each one ``shares`` has to see its :meth:`sizes`."""
        super().__init__()
        self.hold = hold
        self.null_start = null_start
        self.model = model
        self.labels = labels
        self.weights = weights
        device = next(model.router.parameters()).device  # type: ignore[union-attr]
        self.class_weights = {layer: weight.to(device) for layer, weight in class_weights.items()}  # [rows of a layer]
        self.answer_weights = None if answer_weights is None else answer_weights.to(device)
        self.targets = {layer: target.to(device) for layer, target in labels.targets.items()}
        self.rows = {layer: torch.tensor(rows, device=device) for layer, rows in labels.rows.items()}
        self.selection = KeptSelections(model, labels.selection(model))  # what is left to the router
        self.token_losses = TokenLosses(model.base)
        self.teacher = Teacher(model, labels.rows) if weights.distil else None
        sizes = ["once", "tokens", "answers", "lm", *self.rows]
        self.shares = Shares(sizes, processes) if processes is not None and processes.count > 1 else None

    def sizes(self, batch: Batch) -> torch.Tensor:
        """[names of ``shares``] float32: by what the terms of a batch are means."""
        real = batch.attention_mask.bool()
        labels, weights = self._answers(batch)
        found = [real.new_ones(()), real.sum(), (labels != IGNORED).sum(), weights.sum()]
        for layer, weight in self.class_weights.items():
            target = self._target(layer, batch, real)
            found.append((weight[target.clamp_min(0)] * (target != IGNORED)).sum())
        return torch.stack([size.float() for size in found])

    def forward(self, batch: Batch) -> dict[str, torch.Tensor]:
        """Scalars: loss and its terms, and for each part and layer the share of tokens routed right."""
        taught = self.teacher(batch) if self.teacher else {}
        self.model.routing.forget()  # before this forward, or its gradients would go through nodes of the last one's
        real = batch.attention_mask.bool()
        terms: dict[str, torch.Tensor] = {}
        all_logits: Sequence[torch.Tensor | None]
        if self.weights.lm:
            with self.model.routing.active(lambda: self.selection(len(real))):
                terms["lm"] = self._next_token(batch)
                all_logits = self.model.routing.logits
        else:
            all_logits = self._logits(batch, real)
        parts = [self._part(one, batch, real, taught) for one in all_logits if one is not None]
        for name in parts[0]:
            terms[name] = torch.stack([part[name] for part in parts]).mean()
        for index, part in enumerate(parts):
            terms |= {f"{name}.{index}": value for name, value in part.items() if name.startswith("right/")}
        names = [name for name in ("lm", "label", "distil", *_SIDE) if name in terms]
        weighted = [getattr(self.weights, name) * terms[name] for name in names]
        if self.hold is not None:
            terms["kept"] = self._part_of(self.hold.penalty(), "once")
            weighted.append(terms["kept"])
        terms["loss"] = torch.stack(weighted).sum()
        return terms

    def _next_token(self, batch: Batch) -> torch.Tensor:
        labels, weights = self._answers(batch)
        each = self.token_losses(
            lambda: self.model.base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False), labels
        )
        if self.answer_weights is None:
            mean = each.sum() / weights.sum()
        else:
            mean = (weights * each).sum() / weights.sum().clamp_min(torch.finfo(torch.float32).tiny)
        return self._part_of(mean, "lm")

    def _answers(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """What each position is to predict [B, T], and what its loss weighs: 0 where that is nothing."""
        labels = nn.functional.pad(batch.labels[:, 1:], (0, 1), value=IGNORED)
        if self.answer_weights is None:
            return labels, labels != IGNORED
        domains = nn.functional.pad(batch.domain_ids[:, 1:], (0, 1)).clamp_min(0)  # of the tokens that are predicted
        return labels, self.answer_weights[domains].masked_fill(labels == IGNORED, 0.0)

    def _target(self, layer: str, batch: Batch, real: torch.Tensor) -> torch.Tensor:
        """[B, T]: the position, in the layer's rows, of what is right for each token; IGNORED at padding."""
        target = self.targets[layer][batch.domain_ids.clamp_min(0)]
        target[:, : self.null_start] = len(self.rows[layer]) - 1
        return target.masked_fill(~real, IGNORED)

    def _part(
        self, logits: torch.Tensor, batch: Batch, real: torch.Tensor, taught: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """label, distil, balance, z and entropy terms and the share of right tokens, of one part's logits [B, T, rows].

        taught: by layer, as :class:`Teacher` gives it.
        """
        terms: dict[str, Any] = {"label": 0.0, **dict.fromkeys(_SIDE, 0.0)}
        for layer, rows in self.rows.items():
            own = logits.index_select(-1, rows)
            target = self._target(layer, batch, real)
            label = nn.functional.cross_entropy(
                own.flatten(0, 1), target.flatten(), weight=self.class_weights[layer], ignore_index=IGNORED
            )
            terms["label"] = terms["label"] + self._part_of(label, layer)
            if layer in taught:
                each = -(taught[layer] * own.log_softmax(-1)).sum(-1)
                distil = each.sum() / taught[layer].sum().clamp_min(1)
                terms["distil"] = terms.get("distil", 0.0) + self._part_of(distil, "answers")
            for name, side in _SIDE.items():
                found = self._balance(own, real) if name == "balance" else side(own, real)
                terms[name] = terms[name] + self._part_of(found, "tokens")
            terms[f"right/{layer}"] = self._part_of((own.argmax(-1) == target).sum() / real.sum(), "tokens")
        return terms

    def _balance(self, logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        if self.shares is None or not self.weights.balance:
            return balance_loss(logits, real)
        share = self.shares.total(self._part_of(chosen_share(logits, real), "tokens"))  # it is no mean over tokens
        return balance_loss(logits, real, share)

    def _part_of(self, mean: torch.Tensor, size: str) -> torch.Tensor:
        """Of a mean over this batch, what it adds to that over the step."""
        return mean if self.shares is None else self.shares.of(mean, size)

    def _logits(self, batch: Batch, real: torch.Tensor) -> list[torch.Tensor]:
        """Each part's logits without a forward of more layers than the parts read."""
        router: Any = self.model.router
        inputs = reading_inputs(self.model, batch, self.selection(len(real)))
        return [part(part.features(part.read(x), real, None)) for part, x in zip(router.parts, inputs, strict=True)]


@torch.no_grad()
def reading_inputs(model: MoLoRAModel, batch: Batch, selection: ResolvedSelection) -> list[torch.Tensor]:
    """What each part of the router reads of a batch: embeddings or hidden states [B, T, hidden]."""
    router: Any = model.router
    found = [model.base.get_input_embeddings()(batch.input_ids)] if router.points[0] == 0 else []
    deepest = max(router.points)
    if deepest == 0:
        return found

    def reach(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(args[0] if args else kwargs["hidden_states"])
        raise _Reached

    layer = decoder_layers(model.base)[1][deepest]
    hook = layer.register_forward_pre_hook(reach, with_kwargs=True, prepend=True)
    try:
        with model.routing.active(lambda: selection):
            model.base(batch.input_ids, attention_mask=batch.attention_mask, use_cache=False)
    except _Reached:
        pass
    finally:
        hook.remove()
    return found
