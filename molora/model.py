"""The wrapped model: one frozen base, a stack of adapters, a router."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from molora import live, saved
from molora.adapted import AdaptedModules
from molora.adapter import Adapter
from molora.captured import CapturedSteps
from molora.chat import encode
from molora.checks import check_fits, check_router
from molora.errors import BaseModelError, SelectionError
from molora.keys import StackKeys
from molora.loading import as_folders, load_adapter
from molora.outputs import MoLoRAOutput, StreamedToken
from molora.packed import Packed
from molora.router import Router, RouterConfig
from molora.routing import RoutingState
from molora.selection import Selection, candidates, resolve, router_rows
from molora.spread import device_of
from molora.stack import SlotTable, Stack
from molora.streaming import Worker, stream
from molora.vocabulary import VocabularyRouter

if TYPE_CHECKING:
    from molora.compose.merge import MergeReport


class MoLoRAModel(nn.Module):
    """A causal LM of ``transformers`` with a routed stack of PEFT adapters.

    Made by :meth:`from_base` or :meth:`from_pretrained`. The base is frozen and in evaluation mode; ``router`` is the
    only part with trainable parameters.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        tokenizer: Any = None,
        base_name: str | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.base_name = base_name or base.config.name_or_path
        self.router: Router | VocabularyRouter | None = None
        self.stack: Stack
        self.slots = SlotTable()
        self.adapters: dict[str, Adapter] = {}
        self.routing = RoutingState(base)
        self.adapted = AdaptedModules(base, self.routing, backend)
        self.keys = StackKeys(base)
        self.documents: Any = None  # what has been internalised
        self.steps = CapturedSteps(base, self.routing, self.adapted.groups, backend)
        self._worker = Worker()  # of streams

    @classmethod
    def from_base(
        cls,
        base: str | Path | PreTrainedModel,
        stack: Stack | str | Path,
        router: Router | VocabularyRouter | RouterConfig | None = None,
        *,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
        backend: str | None = None,
    ) -> "MoLoRAModel":
        """Wraps ``base``.

        Args:
            base: a folder, a Hub id, or a loaded causal LM (whose linear modules are replaced in place).
            stack: a :class:`Stack` or the path of its YAML file.
            router: a router for this stack, the settings of a new untrained one, or None (names only, no "auto").
            tokenizer: of a loaded base; otherwise it comes with the base.
            dtype, device_map: as in ``transformers``, for a base that is loaded here (bfloat16 by default).
            backend: "triton" (kernels), "torch", or "megablocks" (optional, docs/kernels.md); by device if left out.

        Raises:
            AdapterError: an adapter cannot be used. RouterError: the router is for another stack or base.
                The base is left as it was.
        """
        stack = copy.deepcopy(stack) if isinstance(stack, Stack) else Stack.load(stack)
        adapters = {
            f"{layer.name}/{name}": load_adapter(path)
            for layer in stack.layers
            for name, path in layer.adapters.items()
        }
        name = None
        if not isinstance(base, PreTrainedModel):
            from molora.base import load_base

            name = str(base)
            base, tokenizer = load_base(name, dtype=dtype or torch.bfloat16, device_map=device_map)
        name = name or str(base.config.name_or_path or "this base")
        for adapter in adapters.values():
            check_fits(adapter, base, name, backend)
        if isinstance(router, RouterConfig):
            router = Router(router, router_rows(stack), base.config.get_text_config().hidden_size)
        if router is not None:
            check_router(router, stack, base)
        model = cls(base, tokenizer, name, backend)  # from here on nothing is refused
        model.stack = stack
        for label, adapter in adapters.items():
            model._put(label, model.adapted.pack(adapter))
        model.set_router(router)
        return model

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        base: str | Path | PreTrainedModel | None = None,
        tokenizer: Any = None,
        dtype: torch.dtype | None = None,
        device_map: Any = None,
    ) -> "MoLoRAModel":
        """A saved MoLoRA: a local folder or a Hub id. ``base`` replaces the base that it names.

        Raises:
            StackError, RouterError, AdapterError: the folder is not a saved MoLoRA, or a part of it is damaged.
        """
        parts = saved.load(folder)
        return cls.from_base(
            base if base is not None else parts.base,
            parts.stack,
            parts.router,
            tokenizer=tokenizer,
            dtype=dtype,
            device_map=device_map,
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes molora.json, the router and the adapters to ``folder``, whole or not at all; they take the place of
        what was saved there before, and what else lies there stays."""
        keyed = [f"{layer.name}/{name}" for layer in self.stack.layers if layer.keyed for name in layer.adapters]
        keys = {label: key for label in keyed if (key := self.keys.of(*label.split("/"))) is not None}
        with as_folders(self.adapters, str(self.base_name)) as sources:
            saved.save(folder, str(self.base_name), self.stack, self.router, sources, keys)

    def push_to_hub(self, repo_id: str, *, private: bool = False, token: str | None = None) -> str:
        """Uploads what :meth:`save_pretrained` writes; returns the address of the commit."""
        return saved.push(self.save_pretrained, repo_id, private=private, token=token)

    # What a user of transformers looks for on a model.
    @property
    def config(self) -> Any:
        return self.base.config

    @property
    def generation_config(self) -> Any:
        return self.base.generation_config

    @property
    def device(self) -> torch.device:
        return self.base.device

    @property
    def dtype(self) -> torch.dtype:
        return self.base.dtype

    def train(self, mode: bool = True) -> "MoLoRAModel":
        """Puts the router into training mode; the frozen base stays in evaluation mode."""
        self.training = mode
        if self.router is not None:
            self.router.train(mode)
        return self

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        *,
        selection: Selection | Sequence[Selection] | None = None,
        output_routes: bool = False,
        **kwargs: Any,
    ) -> MoLoRAOutput | Any:
        """A forward of the base under ``selection`` (one for all sequences, or one for each).

        Args:
            input_ids: [batch, tokens] int64.
            attention_mask: [batch, past + tokens], 0 at padding.
            selection: layer -> "auto", a list of names, a name, names with weights or None; a layer left out has its
                default. What a keyed layer is told by is all that comes before the first label.
            output_routes: add ``routes`` to the output.
            kwargs: for the base: ``labels``, ``past_key_values``, ``inputs_embeds``, ...

        Raises:
            SelectionError: the selection does not fit the stack or the batch.
        """
        inputs = {**kwargs, "input_ids": input_ids, "attention_mask": attention_mask}
        with self.routing.active(lambda: self._resolve(selection, inputs)):
            output = self.base(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
            routes = self.routing.routes(self.slots.names) if output_routes else None
        if isinstance(output, tuple):  # return_dict=False
            return (*output, routes) if output_routes else output
        return MoLoRAOutput(**output, routes=routes)

    def generate(
        self, *args: Any, selection: Selection | Sequence[Selection] | None = None, **kwargs: Any
    ) -> torch.Tensor | Any:
        """``transformers``' own generate, under ``selection``; every option of it works as on the base."""
        inputs = {"input_ids": args[0] if args else kwargs.get("inputs"), **kwargs}
        with self.routing.active(lambda: self._resolve(selection, inputs)), self.steps.serve(args, kwargs) as options:
            return self.base.generate(*args, **options)

    def stream(
        self,
        prompt: Sequence[Mapping[str, str]] | str | torch.Tensor,
        selection: Selection | None = None,
        **kwargs: Any,
    ) -> Iterator[StreamedToken]:
        """Generates for one prompt and yields each token with its route. Closing the iterator stops it.

        Args:
            prompt: chat messages, a text that is continued, or token ids [1, tokens].
            selection: as in :meth:`forward`.
            kwargs: for ``generate``; without a length there or in the model's generation_config, up to 256 tokens.

        Raises:
            SelectionError: the selection does not fit the stack, or there are several prompts.
        """
        self._resolve(selection)  # refused here rather than in the thread
        inputs = {**self.encode(prompt), **kwargs}
        if inputs["input_ids"].shape[0] != 1:
            raise SelectionError("A stream has one prompt; for several at once use generate.")
        config = kwargs.get("generation_config", self.base.generation_config)
        if not {"max_new_tokens", "max_length"} & set(kwargs) and config.max_new_tokens is None:
            inputs["max_new_tokens"] = 256

        def generate(**inputs: Any) -> None:
            with self.routing.active(lambda: self._resolve(selection, inputs)), self.steps.serve((), inputs) as options:
                self.base.generate(**options)

        return stream(
            self._worker, generate, lambda at: self.routing.route_at(at, self.slots.names), self.tokenizer, inputs
        )

    def find(
        self, prompt: Sequence[Mapping[str, str]] | str | torch.Tensor, selection: Selection | None = None
    ) -> Selection:
        """``selection`` with the adapter that a prompt belongs to in each keyed layer that it leaves to the question.

        Args:
            prompt: as for :meth:`stream`.
            selection: as in :meth:`forward`.

        Raises:
            SelectionError: an adapter that it names has no key, or there are several prompts.
        """
        if not any(layer.keyed for layer in self.stack.layers):
            return selection or {}
        inputs = self.encode(prompt)
        if len(inputs["input_ids"]) != 1:
            raise SelectionError("One prompt is told at a time.")
        with self.routing.lock, self.routing.off():
            found = self.keys.choose(selection, self.stack, inputs)
        return found if isinstance(found, Mapping) else dict((found or [{}])[0])

    def encode(self, prompt: Sequence[Mapping[str, str]] | str | torch.Tensor) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [1, tokens] of chat messages, a text or token ids, on the model's device."""
        if isinstance(prompt, torch.Tensor):
            return {"input_ids": prompt.to(self.device), "attention_mask": torch.ones_like(prompt).to(self.device)}
        if self.tokenizer is None:
            raise BaseModelError("This model has no tokenizer: pass one to from_base, or give token ids.")
        ids = encode(self.tokenizer, prompt)
        return {name: ids[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def add_adapter(
        self, layer: str, name: str, path: str | Path | Adapter | Packed, *, examples: Sequence[str] | None = None
    ) -> None:
        """Adds an adapter to a layer of the live stack.

        Args:
            layer, name: where, and as what.
            path: a PEFT folder or a Hub id, or the adapter that was read there, packed or not.
            examples: a few texts of its data: its row of the router is computed from them, so that "auto" can choose
                it; of a keyed layer questions that are its own. Without them it acts when it is named, or by the key
                that lies beside it.

        Raises:
            StackError: the name is taken or no name. AdapterError: it cannot be used. Nothing has changed then.
        """
        live.add(self, layer, name, path, examples)

    def remove_adapter(self, layer: str, name: str) -> None:
        """Takes an adapter, and its row of the router, out of the live stack."""
        live.remove(self, layer, name)

    def replace_adapter(self, layer: str, name: str, path: str | Path) -> None:
        """Swaps an adapter for another version; a generation under way ends with the old one first."""
        live.replace(self, layer, name, path)

    def fit_row(self, layer: str, name: str, examples: Sequence[str]) -> None:
        """Computes what an adapter is found by from a few texts of its data, so that "auto" can choose it: its row of
        the router, or in a keyed layer its key, of questions. Those of others stay.

        Raises:
            SelectionError: there is no learned router, or no text. StackError: no such adapter, or a layer whose
                adapters share a row.
        """
        live.fit(self, layer, name, examples)

    def merge(
        self,
        layer: str,
        names: Sequence[str],
        into: str,
        out: str | Path,
        *,
        examples: Sequence[str] | None = None,
        **settings: Any,
    ) -> "MergeReport":
        """Merges adapters of a layer into one more of it, on the live stack. The merged ones stay.

        Args:
            layer, names: which. into: the name of the new one.
            out: the folder that it is written to; there must be none.
            examples: as for :meth:`add_adapter`.
            settings: ``method``, ``weights``, ``density``, ``rank``, ``seed`` and ``dtype`` of
                :func:`molora.compose.merge.merge`.

        Raises:
            StackError: there is no such adapter, or the new name is taken or no name. ConfigError, AdapterError: they
                cannot be merged so. Nothing has changed then.
        """
        return live.merge(self, layer, names, into, Path(out), examples, settings)

    def internalize(
        self,
        document: str | Path,
        *,
        hypernet: str | Path | None = None,
        name: str = "document",
        layer: str = "document",
        most_rank: int | None = None,
    ) -> None:
        """Makes a document an adapter of the live stack, by a trained network (arXiv 2602.15902), in one reading.

        Args:
            document: a file (.txt, .md, .html, .pdf), or the text itself.
            hypernet: folder of the network, from ``molora train hypernet doc``; None: the one that is shipped for the
                starter stack's base.
            name, layer: what it becomes. A layer that the stack does not have is made; where there is a router, and
                the layer is left to it, the document's own sentences say which tokens are for it.
            most_rank: see :func:`molora.personalize.internalize.factors_of`.

        Raises:
            DocumentError: it cannot be read. HypernetError: the network is none of this base, or none is shipped.
                StackError: the name is taken. Nothing has changed then.
        """
        from molora.personalize.live import internalize

        internalize(self, document, hypernet, layer, name, most_rank)

    def reset(self) -> None:
        """Takes away what :meth:`internalize` has added."""
        from molora.personalize.live import reset

        reset(self)

    def set_router(self, router: Router | VocabularyRouter | None) -> None:
        """Gives the stack another router, made for its rows."""
        if router is not None:
            check_router(router, self.stack, self.base)
            device = device_of(self.base.get_input_embeddings())
            router.to(device).train(self.training and self.router is router)
        self.router = router
        self.routing.set_router(router)
        self._refresh()

    def _refresh(self) -> None:
        self.routing.layers = candidates(self.stack, self.slots)

    def _resolve(
        self, selection: Selection | Sequence[Selection] | None, inputs: Mapping[str, Any] | None = None
    ) -> Any:
        """inputs: of the forward; without them what keyed layers are left to stays open."""
        if inputs is not None:
            with self.routing.off():
                selection = self.keys.choose(selection, self.stack, inputs)
        return resolve(selection, self.stack, self.routing.layers, self.router is not None)

    def _apply(self, fn: Any, recurse: bool = True) -> "MoLoRAModel":
        """``.to()`` and the like."""
        super()._apply(fn, recurse)
        self.adapted.moved({self.slots[label]: adapter for label, adapter in self.adapters.items()})
        return self

    def _put(self, label: str, packed: Packed) -> None:
        self.adapters[label] = packed.adapter
        layer, _, name = label.partition("/")
        if self.stack[layer].keyed:
            self.keys.put(layer, name, packed.adapter.key)
        self.adapted.put(self.slots.take(label), packed)

    def _drop(self, label: str) -> None:
        self.keys.drop(*label.split("/"))
        self.adapted.drop(self.slots.free(label), self.adapters.pop(label))
