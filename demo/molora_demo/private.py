"""Private adapters in the live model, in such a way that nobody's answers depend on what another browser taught.

An adapter of a routed layer gets a row of the router. It is fitted beside the public rows and those of the same owner,
and may act only where a selection names it; which ones a selection may name is :mod:`molora_demo.lessons`' to say.
"""

import hashlib
import weakref
from collections import Counter, OrderedDict
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from molora.adapter import WEIGHTS_FILE
from molora.errors import MoLoRAError
from molora.examples import encode_examples, features_of
from molora.router import NEVER, Router
from molora.stack import StackLayer
from molora_demo.shelf import row_file

_MADE_FOR = "router"  # in the metadata of a row's file


class Private:
    """Those that are in the model; of more than ``most`` the least recently used ones leave it.

    Args:
        model: a `MoLoRAModel`.
        most: how many at once.

    ``counts``, since the start: "hits", asked for and in the model; "misses", brought into it; "evictions", that left
    it to make room.
    """

    def __init__(self, model: Any, most: int) -> None:
        self.model, self.most = model, most
        self.counts: Counter[str] = Counter()
        self._there: OrderedDict[str, tuple[Path, int, int]] = OrderedDict()  # label -> the version, by its folder
        self._labels: set[str] = set()  # of all that ever were: who reads it while one leaves must not see it as public
        self._watched: weakref.WeakSet[Any] = weakref.WeakSet()
        self._print: tuple[Any, list[str], str] | None = None

    def __len__(self) -> int:
        return len(self._there)

    def __contains__(self, label: str) -> bool:
        return label in self._there

    def under(self, folder: Path) -> list[str]:
        """Labels of those whose files lie in a folder."""
        return [label for label, own in list(self._there.items()) if own[0].is_relative_to(folder)]

    def public(self, layer: StackLayer) -> list[str]:
        """The layer's adapters that are everybody's."""
        return [name for name in list(layer.adapters) if f"{layer.name}/{name}" not in self._labels]

    def bring(self, layer: str, name: str, folder: Path) -> None:
        """Has the version in ``folder`` act in the model when it is selected.

        Raises:
            MoLoRAError: it cannot be used. What was there stays.
        """
        label = f"{layer}/{name}"
        stamp = _stamp(folder)
        if self._there.get(label) == stamp:
            self._there.move_to_end(label)
            self.counts["hits"] += 1
            return
        with self.model.routing.lock:
            if label in self._there:
                self.model.replace_adapter(layer, name, folder)
            else:
                while len(self._there) >= self.most:
                    self.drop(*next(iter(self._there)).split("/"))
                    self.counts["evictions"] += 1
                self._labels.add(label)
                self.model.add_adapter(layer, name, folder)
                if self.model.stack[layer].keyed:  # the spread of all keys decides on each
                    self.model.keys.drop(layer, name)
            self._there[label] = stamp
            self.counts["misses"] += 1
            self._there.move_to_end(label)
            self._put_row(label, self._read_row(row_file(folder)))
            self._watch()

    def afresh(self) -> None:
        """Has the next answer come out, to the last bit, as if nobody had asked anything before."""
        adapted = getattr(self.model, "adapted", None)  # a stand-in of the tests has none
        if adapted is not None:
            with self.model.routing.lock:
                adapted.afresh()

    def drop(self, layer: str, name: str) -> None:
        """Takes it out of the model, if it is there."""
        with self.model.routing.lock:
            if self._there.pop(f"{layer}/{name}", None) is not None and name in self.model.stack[layer].adapters:
                self.model.remove_adapter(layer, name)

    @torch.no_grad()
    def fit(self, layer: str, name: str, examples: Sequence[str], own: Collection[str]) -> None:
        """Computes the row that an adapter in the model is found by, and keeps it beside its version.

        Args:
            layer, name: which.
            examples: texts that are its own.
            own: labels of its owner's adapters.
        """
        label = f"{layer}/{name}"
        with self.model.routing.lock:
            router = self.model.router
            if not isinstance(router, Router) or label not in router.rows:
                return
            self.afresh()
            encoded = encode_examples(self.model, examples, False)
            choices = self._choices(own)
            tensors: dict[str, torch.Tensor] = {}
            for index in range(len(router.parts)):  # what a deeper part reads depends on what the first one chooses
                q = features_of(self.model, encoded, index, choices)
                view = self._without(router, self._labels - set(own))
                with torch.random.fork_rng():  # samples are drawn
                    torch.manual_seed(index)
                    view.set_row(label, index, q)
                part, place = view.parts[index], view.rows.index(label)
                found: Any = part
                tensors |= {
                    f"{index}.weight": found.output.weight[place].clone(),
                    f"{index}.bias": found.output.bias[place].clone(),
                    f"{index}.samples": found.samples.features[found.samples.rows == place].clone(),
                }
                self._put_row(label, tensors)
            about = {_MADE_FOR: self._fingerprint(router)}
            file = row_file(self._there[label][0])
            draft = file.with_name(f".partial-{file.name}")
            save_file({one: tensor.cpu().contiguous() for one, tensor in tensors.items()}, draft, metadata=about)
            draft.replace(file)

    def _watch(self) -> None:
        """Has the router compute the rows that are everybody's apart, which otherwise are rounded otherwise."""
        if isinstance(self.model.router, Router):
            for part in self.model.router.parts:
                if part not in self._watched:
                    self._watched.add(part)
                    part.register_forward_hook(partial(self._steady, weakref.ref(self.model.router)))

    def _steady(self, router: Any, part: Any, args: tuple[Any, ...], logits: torch.Tensor) -> torch.Tensor | None:
        rows = router().rows
        places = [place for place, row in enumerate(rows) if row not in self._labels]
        if len(places) == len(rows):
            return None
        found = logits.clone()
        found[..., places] = F.linear(args[0], part.output.weight[places], part.output.bias[places])
        return found

    def _choices(self, own: Collection[str]) -> dict[str, list[str] | None]:
        """What its owner's router may choose."""
        found: dict[str, list[str] | None] = {}
        for layer in self.model.stack.layers:
            if layer.keyed:
                found[layer.name] = None
            elif layer.routed:
                mine = [name for name in layer.adapters if f"{layer.name}/{name}" in own]
                found[layer.name] = [*self.public(layer), *mine]
        return found

    def _put_row(self, label: str, tensors: Mapping[str, torch.Tensor] | None) -> None:
        """Gives a row its weights; without any it is never chosen."""
        router = self.model.router
        if not isinstance(router, Router) or label not in router.rows:
            return
        own = router.rows.index(label)
        with torch.no_grad():
            for index, part in enumerate(router.parts):
                found: Any = part
                weight, bias, samples = found.output.weight, found.output.bias, found.samples
                others = samples.rows != own
                samples.set(samples.features[others], samples.rows[others])
                if tensors is None or f"{index}.weight" not in tensors:
                    weight[own], bias[own] = 0.0, NEVER
                else:
                    weight[own] = tensors[f"{index}.weight"].to(weight)
                    bias[own] = tensors[f"{index}.bias"].to(bias)
                    samples.add(tensors[f"{index}.samples"].to(samples.features), own)

    def _read_row(self, file: Path) -> dict[str, torch.Tensor] | None:
        """A row that was kept, if the router is still the one that it was fitted to."""
        router = self.model.router
        if not isinstance(router, Router) or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as source:
                if (source.metadata() or {}).get(_MADE_FOR) != self._fingerprint(router):
                    return None
                return {name: source.get_tensor(name) for name in source.keys()}
        except (SafetensorError, OSError, ValueError) as error:
            raise MoLoRAError(f"What the router knows of an adapter is damaged ({error}): teach it again.") from None

    def _fingerprint(self, router: Router) -> str:
        """Of the router as all browsers have it; it is made once."""
        rows = [row for row in router.rows if row not in self._labels]
        if self._print is not None and self._print[0] is router and self._print[1] == rows:
            return self._print[2]
        view, digest = self._without(router, self._labels), hashlib.sha256()
        digest.update("\n".join(view.rows).encode())
        for name, tensor in sorted(view.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().float().cpu().numpy().tobytes())
        self._print = (router, rows, digest.hexdigest())
        return self._print[2]

    def _without(self, router: Router, labels: Collection[str]) -> Router:
        """A copy that has no row of any of these."""
        view = Router(router.config, router.rows, router.hidden_size).to(next(router.parameters()).device).eval()
        view.load_state_dict(router.state_dict())
        for row in labels:
            if row in view.rows:
                view.remove_row(row)
        return view


def _stamp(folder: Path) -> tuple[Path, int, int]:
    """A number may come again after a roll back, for other weights.

    Raises:
        MoLoRAError: its files are gone.
    """
    try:
        about = (folder / WEIGHTS_FILE).stat()
    except OSError:
        raise MoLoRAError("Its files are gone or damaged: forget it, and teach it again.") from None
    return folder, about.st_mtime_ns, about.st_ino
