"""Personalized Pieces (Per-Pcs, EMNLP 2024): a user's adapter put together from pieces of others', module by module.

A piece is what one sharer's adapter has in one module, with a gate: a vector that says for which inputs it was made. A
user keeps places and weights alone; the pool of pieces is everybody's. The weighted sum is one of products, exactly:
ranks side by side, where averages of A and of B apart would have cross terms.

The same pool is a bank of anchors (Merge-then-Adapt, arXiv 2511.20072): of the sharers whose histories are nearest to a
user's, the whole adapters, merged.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from molora.adapter import WEIGHTS_FILE as ADAPTER_FILE
from molora.atomic import new_folder
from molora.chat import pieces as cut_at_answers
from molora.errors import AdapterNotFoundError, DataError, HypernetError
from molora.factors import Factors

POOL_FILE, WEIGHTS_FILE = "pool.json", "pool.safetensors"
TOP = 3
ANCHORS = 2
_BATCH_TOKENS = 8192  # padded ones of histories in one forward


@dataclass(frozen=True)
class PoolConfig:
    """base: the model, as its users name it. modules: names in it. sharers: how many there are. rank: of a piece.
    encoder: what histories were embedded by, "" where they were not. beneath: the digest of the adapter that acted
    beneath the sharers', "" where none did."""

    base: str
    modules: tuple[str, ...]
    sharers: int
    rank: int
    encoder: str = ""
    beneath: str = ""


@dataclass(frozen=True)
class Assembled:
    """What a user keeps. places: int16 [modules, top], sharers by number. weights: float16 [modules, top]."""

    places: Tensor
    weights: Tensor

    def to_bytes(self) -> bytes:
        """A safetensors file; under 2 KiB for the 120 attention modules of the starter's base."""
        return save({"places": self.places, "weights": self.weights})

    @classmethod
    def load(cls, path: str | Path) -> "Assembled":
        """Raises:
        DataError: there is no such file, or it is none of this kind.
        """
        try:
            found = load_file(path)
            return cls(found["places"], found["weights"])
        except (OSError, SafetensorError, KeyError) as error:
            raise DataError(f"{path} holds no assembled adapter: {error}") from error


class PiecePool:
    """All sharers' pieces.

    Args:
        config: what there is.
        A, B: by module [sharers, rank, in] and [sharers, out, rank], the scale in B.
        gates: by module [sharers, in].
        embeddings: [sharers, width], the mean over each one's history; None where there are none.
    """

    def __init__(
        self,
        config: PoolConfig,
        A: Mapping[str, Tensor],
        B: Mapping[str, Tensor],
        gates: Mapping[str, Tensor],
        embeddings: Tensor | None = None,
    ) -> None:
        self.config, self.A, self.B, self.gates, self.embeddings = config, dict(A), dict(B), dict(gates), embeddings

    def assemble(
        self, base: Any, tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]], top: int = TOP
    ) -> Assembled:
        """Chooses a user's pieces, in one forward pass over the user's history.

        A piece's score is the mean over answer tokens of LN(x) . LN(gate) / sqrt(d); of the ``top`` best of a module
        the softmax are the weights. What acted beneath the sharers' adapters has to act in ``base`` here.

        Raises:
            DataError: the history has no answer. HypernetError: the pool is for another base.
        """
        self.check(base)
        top = min(top, self.config.sharers)
        inputs = mean_inputs(base, tokenizer, conversations, self.config.modules)
        places, weights = [], []
        for name in self.config.modules:
            gates = self.gates[name].to(inputs[name])
            scores = F.layer_norm(gates, gates.shape[-1:]) @ inputs[name] / gates.shape[-1] ** 0.5  # [sharers]
            best = scores.topk(top)
            places.append(best.indices.to("cpu", torch.int16))
            weights.append(best.values.softmax(-1).to("cpu", torch.float16))
        return Assembled(torch.stack(places), torch.stack(weights))

    def nearest(self, embedding: Tensor, top: int = ANCHORS) -> Assembled:
        """The sharers whose histories are nearest, with their cosines, normalised, as weights: the same in each module.

        Args:
            embedding: [width], the mean over a user's history. top: how many.

        Raises:
            HypernetError: the pool has no embeddings, or another encoder's.
        """
        if self.embeddings is None or self.embeddings.shape[1:] != embedding.shape:
            raise HypernetError(
                f"The pool's histories were embedded by {self.config.encoder or 'nothing'}, and this one in "
                f"{len(embedding)} numbers: take that encoder, or train the pool with one."
            )
        cosines = F.cosine_similarity(self.embeddings.float(), embedding.float(), dim=-1)
        best = cosines.topk(min(top, self.config.sharers))
        weights = best.values.clamp_min(1e-4)
        modules = len(self.config.modules)
        return Assembled(
            best.indices.to(torch.int16).expand(modules, -1).clone(),
            (weights / weights.sum()).to(torch.float16).expand(modules, -1).clone(),
        )

    def factors(self, assembled: Assembled) -> Factors:
        """The adapter that a user's choice stands for: the sum over pieces of w B A.

        Raises:
            DataError: it was chosen from another pool, or is damaged.
        """
        places, weights = assembled.places, assembled.weights
        fits = places.shape == weights.shape and places.dim() == 2 and len(places) == len(self.config.modules)
        if not (fits and places.numel() and int(places.min()) >= 0 and int(places.max()) < self.config.sharers):
            raise DataError("This assembled adapter was made from another pool of pieces, or is damaged.")
        found = {}
        for name, of, parts in zip(self.config.modules, places.long(), weights, strict=True):
            A, B = self.A[name][of], self.B[name][of]  # [top, r, in], [top, out, r]
            scaled = B * parts.to(B)[:, None, None]
            found[name] = (A.flatten(0, 1), scaled.permute(1, 0, 2).flatten(1))
        return found

    def check(self, base: Any) -> None:
        """Raises:
        HypernetError: it was made for another base.
        """
        modules = dict(base.named_modules())
        for name in self.config.modules:
            linear = getattr(modules.get(name), "base_layer", modules.get(name))
            wanted = (self.A[name].shape[2], self.B[name].shape[1])
            found = (linear.in_features, linear.out_features) if isinstance(linear, nn.Linear) else None
            if found != wanted:
                raise HypernetError(
                    f"These pieces were made for {self.config.base}, where {name} maps {wanted[0]} to {wanted[1]} "
                    f"features; this base has {'no such module' if found is None else f'{found[0]} to {found[1]}'}."
                )

    def save(self, folder: Path) -> None:
        """Writes pool.json and pool.safetensors (bfloat16) to ``folder``, of which there must be none."""
        tensors: dict[str, Tensor] = {}
        for part, own in (("A", self.A), ("B", self.B), ("gate", self.gates)):
            tensors |= {f"{part}/{name}": tensor.to("cpu", torch.bfloat16).contiguous() for name, tensor in own.items()}
        if self.embeddings is not None:
            tensors["embeddings"] = self.embeddings.float().cpu().contiguous()
        folder.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(folder) as made:
            save_file(tensors, made / WEIGHTS_FILE, metadata={"format": "pt"})
            (made / POOL_FILE).write_text(json.dumps(asdict(self.config), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> "PiecePool":
        """What :meth:`save` wrote, in float32.

        Raises:
            HypernetError: there is none, or it is damaged.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / POOL_FILE).read_text(encoding="utf-8"))
            config = PoolConfig(**{**about, "modules": tuple(about["modules"])})
            tensors = {name: tensor.float() for name, tensor in load_file(folder / WEIGHTS_FILE).items()}
            A, B, gates = ({name: tensors[f"{part}/{name}"] for name in config.modules} for part in ("A", "B", "gate"))
        except FileNotFoundError as error:
            raise HypernetError(
                f"There is no pool of pieces at {folder}: it holds no {Path(error.filename or '').name}. Make one with "
                f"`molora train pieces`."
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            raise HypernetError(f"The pool of pieces at {folder} is damaged: {error}") from error
        return cls(config, A, B, gates, tensors.get("embeddings"))


def weights_digest(folder: str | Path) -> str:
    """Of a PEFT folder's weights.

    Raises:
        AdapterNotFoundError: there are none.
    """
    file = Path(folder) / ADAPTER_FILE
    if not file.is_file():
        raise AdapterNotFoundError(f"There is no adapter in {folder}: {ADAPTER_FILE} is missing.")
    return hashlib.sha256(file.read_bytes()).hexdigest()


@torch.no_grad()
def mean_inputs(
    base: Any, tokenizer: Any, conversations: Sequence[Sequence[Mapping[str, str]]], modules: Sequence[str]
) -> dict[str, Tensor]:
    """The mean over all answer tokens of LN(x), x being what enters a module: by module [in], float32.

    Raises:
        DataError: no conversation has an answer.
    """
    rows = [row for messages in conversations if bool((row := _tokens(tokenizer, messages))[1].any())]
    if not rows:
        raise DataError("The history holds no answer to choose pieces by.")
    count = sum(int(answer.sum()) for _, answer in rows)
    rows.sort(key=lambda row: len(row[0]))  # a batch is padded to its longest
    sums: dict[str, Tensor] = {}
    places = torch.zeros(0, dtype=torch.int64)

    def see(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].flatten(0, 1)[places].float()
            total = F.layer_norm(x, x.shape[-1:]).sum(0)
            sums[name] = sums[name] + total if name in sums else total

        return hook

    hooks = [base.get_submodule(name).register_forward_pre_hook(see(name)) for name in modules]
    try:
        while rows:
            some = [rows.pop()]
            while rows and (len(some) + 1) * len(some[0][0]) <= _BATCH_TOKENS:
                some.append(rows.pop())
            ids, answers = (nn.utils.rnn.pad_sequence(list(part), batch_first=True) for part in zip(*some, strict=True))
            lengths = torch.tensor([len(own) for own, _ in some])
            mask = (torch.arange(ids.shape[1]) < lengths.unsqueeze(1)).long()
            places = answers.flatten().nonzero().squeeze(1).to(base.device)
            base.base_model(ids.to(base.device), attention_mask=mask.to(base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: total / count for name, total in sums.items()}


def _tokens(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> tuple[Tensor, Tensor]:
    """A conversation's tokens, and those from which an answer's are predicted."""
    parts = [
        (torch.tensor(tokenizer(piece.text, add_special_tokens=False)["input_ids"]), piece.answer)
        for piece in cut_at_answers(tokenizer, messages)
    ]
    written = torch.cat([torch.full((len(tokens),), is_answer) for tokens, is_answer in parts])
    return torch.cat([tokens for tokens, _ in parts]), F.pad(written[1:], (0, 1))
