"""Doc-to-LoRA (arXiv 2602.15902): a network that reads what the frozen base thinks of a text and writes an adapter.

- features: what enters each decoder layer of the base while it reads a chunk of the text; no second encoder
- a Perceiver, shared by all layers, turns a chunk's tokens into a few latents, and those into one vector for each rank
- an own MLP and an own head of each layer turn the vectors into the rows of A and the columns of B
- chunks become ranks side by side, with one learned adapter that every text has; a gate, ours, takes out of a layer
  what a chunk has not to say, so that the noise of many does not drown the one that matters
- what all chunks of a long text have in common, ours too, counts as often as in the longest of training

Smaller than the paper's: narrow, with a cheap projection of the tokens, since the base is small.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from molora.atomic import new_folder
from molora.errors import ConfigError, HypernetError
from molora.factors import Factors
from molora.routing import decoder_layers

CONFIG_FILE, WEIGHTS_FILE = "hypernet.json", "hypernet.safetensors"
KIND = "document"
SCALE = 4.0  # of B A, so that a learned scaler of order 1 makes a delta that matters


@dataclass(frozen=True)
class DocumentNetConfig:
    """What the network reads and writes.

    Args:
        base: the model that it is for, as its users name it.
        hidden: of the base. layers: how many decoder layers it has.
        modules: what is adapted in each layer: the end of the module's name -> its (in, out).
        rank: of a chunk's adapter in each module.
        width: of all inner vectors. latents: of a chunk. blocks: of cross-attention. heads: of each.
        exit: decoder layers that the base is run up to; the layers above read what the last of these read.
        chunk: the most tokens of a text that are read at once, those of the chat format not counted.
        together: chunks of the longest texts in training; 0: not known.
    """

    base: str
    hidden: int
    layers: int
    modules: Mapping[str, tuple[int, int]]
    rank: int = 8
    width: int = 128
    latents: int = 8
    blocks: int = 4
    heads: int = 8
    exit: int = 0
    chunk: int = 256
    together: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", {name: (int(i), int(o)) for name, (i, o) in self.modules.items()})
        object.__setattr__(self, "exit", self.exit or self.layers)
        least = {"layers": 1, "rank": 1, "latents": 1, "blocks": 1, "heads": 1, "chunk": 8, "together": 0}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise ConfigError(f"{name} must be a whole number from {bound}, not {getattr(self, name)}.")
        if self.width % self.heads:
            raise ConfigError(f"width {self.width} is not a multiple of heads {self.heads}.")
        if not 1 <= self.exit <= self.layers:
            raise ConfigError(f"exit must be from 1 to the base's {self.layers} layers, not {self.exit}.")
        if not self.modules:
            raise ConfigError("modules names nothing that is to be adapted.")

    @classmethod
    def for_base(
        cls, base: Any, name: str, modules: Sequence[str] = ("down_proj",), **settings: Any
    ) -> "DocumentNetConfig":
        """For a model of `transformers`.

        Raises:
            ConfigError: a module is in none of its decoder layers.
        """
        _, layers = decoder_layers(base)
        found = {}
        for suffix in modules:
            linear = _linear(layers[0], suffix)
            if linear is None:
                raise ConfigError(f"The base's decoder layers have no linear module {suffix!r}.")
            found[suffix] = (linear.in_features, linear.out_features)
        return cls(name, base.config.get_text_config().hidden_size, len(layers), found, **settings)


class DocumentNet(nn.Module):
    """Hidden states of a text's chunks -> low-rank factors. Only it learns; the base is asked for states alone."""

    def __init__(self, config: DocumentNetConfig) -> None:
        super().__init__()
        self.config = config
        c, w = config, config.width
        queries = len(c.modules) * c.rank
        self.norm = nn.LayerNorm(c.hidden, elementwise_affine=False)
        self.project = _Gated(c.hidden, 2 * w, w)
        self.latents = nn.Parameter(torch.randn(c.latents, w) / w**0.5)
        self.layer = nn.Parameter(torch.zeros(c.layers, w))
        self.blocks = nn.ModuleList([_Block(w, c.heads) for _ in range(c.blocks)])
        self.queries = nn.Parameter(torch.randn(queries, w) / w**0.5)
        self.decode = _Block(w, c.heads)
        self.up = nn.Parameter(torch.randn(c.layers, w, 4 * w) / w**0.5)
        self.down = nn.Parameter(torch.zeros(c.layers, 4 * w, w))
        self.gate = nn.Parameter(torch.zeros(c.layers, w))  # at first all are open
        self.heads_A, self.heads_B = nn.ParameterDict(), nn.ParameterDict()
        self.scale_A, self.scale_B = nn.ParameterDict(), nn.ParameterDict()
        self.bias_A, self.bias_B = nn.ParameterDict(), nn.ParameterDict()
        for name, (inside, outside) in c.modules.items():
            key = _key(name)
            self.heads_A[key] = nn.Parameter(torch.randn(c.layers, w, inside) * inside**-0.5)
            self.heads_B[key] = nn.Parameter(torch.randn(c.layers, w, outside) * c.rank**-0.5)
            self.scale_A[key] = nn.Parameter(torch.ones(c.layers, c.rank, 1))
            self.scale_B[key] = nn.Parameter(torch.zeros(c.layers, c.rank, 1))  # at first an adapter changes nothing
            self.bias_A[key] = nn.Parameter(torch.randn(c.layers, c.rank, inside) * (inside * c.rank) ** -0.5)
            self.bias_B[key] = nn.Parameter(torch.zeros(c.layers, outside, c.rank))

    def forward(self, states: Tensor, mask: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapter of each chunk, without the learned one.

        Args:
            states: [C, exit, N, hidden], what enters the base's decoder layers.
            mask: bool [C, N], False at padding.

        Returns:
            By the end of a module's name A [C, layers, rank, in] and B [C, layers, out, rank], the scale in B.
        """
        c, chunks = self.config, len(states)
        x = self.project(self.norm(states.to(self.latents.dtype)))  # [C, exit, N, w]
        beyond = c.layers - c.exit
        x = torch.cat([x, x[:, -1:].expand(-1, beyond, -1, -1)], 1) if beyond else x
        x = x.flatten(0, 1)  # [C L, N, w]
        seen = mask.repeat_interleave(c.layers, 0)[:, None, None]  # [C L, 1, 1, N]
        latents = (self.latents + self.layer.unsqueeze(1)).repeat(chunks, 1, 1)  # [C L, latents, w]
        for block in self.blocks:
            latents = block(latents, x, seen)
        found = self.decode(self.queries.expand(len(latents), -1, -1), latents)
        found = found.unflatten(0, (chunks, c.layers))  # [C, L, queries, w]
        # Exactly 0 from somewhere on: what is merely small adds up over the chunks of a long text.
        gate = F.relu(1 + torch.einsum("clw,lw->cl", found.mean(2), self.gate) / c.width**0.5)[..., None, None]
        inner = F.silu(torch.einsum("clqw,lwh->clqh", found, self.up))
        found = F.normalize(found + torch.einsum("clqh,lhw->clqw", inner, self.down), dim=-1)
        factors = {}
        for name, e in zip(c.modules, found.split(c.rank, 2), strict=True):  # e: [C, L, r, w]
            key = _key(name)
            A = torch.einsum("clrw,lwi->clri", e, self.heads_A[key]) * self.scale_A[key]
            B = torch.einsum("clrw,lwo->clro", e, self.heads_B[key]) * (gate * self.scale_B[key] * SCALE)
            factors[name] = (A, B.transpose(2, 3))
        return factors

    def balanced(self, chunks: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
        """The chunks of one text, and one more if there are over ``config.together``: it takes away what is too much.

        Even a chunk that says nothing has an adapter, nearly the same one as others: the median of each number of the
        factors, which no single chunk moves. In a text longer than those of training the sum of so many of it drowns
        the chunk that matters.

        Args:
            chunks: what :meth:`forward` gives of the text's chunks.
        """
        over = len(next(iter(chunks.values()))[0]) - self.config.together
        if over <= 0 or not self.config.together:
            return dict(chunks)
        balanced = {}
        for name, (A, B) in chunks.items():
            common_A, common_B = A.median(0, keepdim=True).values, B.median(0, keepdim=True).values
            balanced[name] = torch.cat([A, common_A]), torch.cat([B, -over * common_B])
        return balanced

    def learned(self) -> dict[str, tuple[Tensor, Tensor]]:
        """What every text has, by the end of a module's name: A [layers, rank, in] and B [layers, out, rank]."""
        return {n: (self.bias_A[_key(n)], self.bias_B[_key(n)] * SCALE) for n in self.config.modules}

    def joined(self, chunks: Mapping[str, tuple[Tensor, Tensor]], owners: Tensor, texts: int) -> dict[str, Any]:
        """The adapters of whole texts: their chunks' ranks side by side, and the learned one.

        Args:
            chunks: what :meth:`forward` gives of all texts' chunks.
            owners: int64 [C], the text that each chunk belongs to, in ascending order.
            texts: how many there are.

        Returns:
            By the end of a module's name A [texts, layers, R, in] and B [texts, layers, out, R]; texts of fewer chunks
            than others have ranks of zeros.
        """
        place = torch.arange(len(owners), device=owners.device) - torch.searchsorted(owners, owners)
        most = int(place.max()) + 1
        joined = {}
        for name, (bias_A, bias_B) in self.learned().items():
            A, B = chunks[name]
            spread_A = A.new_zeros(texts, most, *A.shape[1:]).index_put((owners, place), A)  # [T, K, L, r, in]
            spread_B = B.new_zeros(texts, most, *B.shape[1:]).index_put((owners, place), B)  # [T, K, L, out, r]
            joined[name] = (
                torch.cat([bias_A.expand(texts, -1, -1, -1), spread_A.transpose(1, 2).flatten(2, 3)], 2),
                torch.cat([bias_B.expand(texts, -1, -1, -1), spread_B.permute(0, 2, 3, 1, 4).flatten(3, 4)], 3),
            )
        return joined

    def check(self, base: Any, name: str) -> None:
        """Whether it was made for ``base``.

        Raises:
            HypernetError: it was not; the message names what differs.
        """
        c, (_, layers) = self.config, decoder_layers(base)
        hidden = base.config.get_text_config().hidden_size
        if (len(layers), hidden) != (c.layers, c.hidden):
            raise HypernetError(
                f"This hypernetwork was trained for {c.base} ({c.layers} layers of {c.hidden}), and {name} has "
                f"{len(layers)} layers of {hidden}: take one that was trained for {name}."
            )
        for suffix, sizes in c.modules.items():
            linear = _linear(layers[0], suffix)
            found = None if linear is None else (linear.in_features, linear.out_features)
            if found != sizes:
                raise HypernetError(
                    f"This hypernetwork was trained for {c.base}, where {suffix} maps {sizes[0]} to {sizes[1]} "
                    f"features; in {name} it maps {found and found[0]} to {found and found[1]}."
                )

    def save(self, folder: Path) -> None:
        """Writes hypernet.json and hypernet.safetensors (bfloat16) to ``folder``, of which there must be none."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights = {n: t.detach().to("cpu", torch.bfloat16).contiguous() for n, t in self.state_dict().items()}
        with new_folder(folder) as made:
            save_file(weights, made / WEIGHTS_FILE, metadata={"format": "pt"})
            about = {"kind": KIND, **asdict(self.config)}
            (made / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, dtype: torch.dtype = torch.float32) -> "DocumentNet":
        """What :meth:`save` wrote.

        Raises:
            HypernetError: there is none, or it is damaged or of another kind, or holds NaN or infinite values.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            kind = about.pop("kind")
            if kind != KIND:
                raise HypernetError(f"The hypernetwork at {folder} makes adapters of a {kind}, not of a document.")
            # Nothing is allocated by what the settings say: sizes are compared first.
            with torch.device("meta"):
                net = cls(DocumentNetConfig(**about))
            weights = load_file(folder / WEIGHTS_FILE)
            net.load_state_dict(weights, assign=True)
        except FileNotFoundError as error:
            raise HypernetError(
                f"There is no hypernetwork at {folder}: it holds no {Path(error.filename or '').name}. "
                f"Train one with `molora train hypernet doc`."
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
            if isinstance(error, HypernetError):
                raise
            raise HypernetError(f"The hypernetwork at {folder} is damaged: {error}") from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise HypernetError(f"The hypernetwork at {folder} holds NaN or infinite values.")
        return net.to(dtype).eval()


def by_module(base: Any, joined: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Factors by the base's own module names: A [..., R, in] and B [..., out, R], of layers at dimension 1."""
    prefix, layers = decoder_layers(base)
    found = {}
    for suffix, (A, B) in joined.items():
        for number, layer in enumerate(layers):
            inner = next(name for name, _ in layer.named_modules() if _ends(name, suffix))
            found[f"{prefix}.{number}.{inner}"] = (A[:, number], B[:, number])
    return found


def of_text(base: Any, joined: Mapping[str, tuple[Tensor, Tensor]], text: int) -> Factors:
    """The factors of one of the texts."""
    return {name: (A[text], B[text]) for name, (A, B) in by_module(base, joined).items()}


class _Gated(nn.Module):
    def __init__(self, inside: int, inner: int, outside: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(inside, inner, bias=False), nn.Linear(inside, inner, bias=False)
        self.down = nn.Linear(inner, outside, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return found


class _Block(nn.Module):
    """Cross-attention of a few vectors to many, and an MLP; both residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_q, self.norm_x, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)
        self.q, self.kv = nn.Linear(width, width, bias=False), nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp = _Gated(width, 2 * width, width)

    def forward(self, queries: Tensor, x: Tensor, seen: Tensor | None = None) -> Tensor:
        """queries [B, Q, w], x [B, N, w], seen bool [B, 1, 1, N] -> [B, Q, w]."""
        q = self.q(self.norm_q(queries)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv(self.norm_x(x)).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        queries = queries + self.out(found.transpose(1, 2).flatten(2))
        return queries + self.mlp(self.norm(queries))


def _key(name: str) -> str:
    return name.replace(".", "_")


def _ends(name: str, suffix: str) -> bool:
    return name == suffix or name.endswith(f".{suffix}")


def _linear(layer: nn.Module, suffix: str) -> Any:
    """The linear module of a decoder layer, also where a stack's adapters lie around it."""
    for name, module in layer.named_modules():
        if _ends(name, suffix):
            inner = getattr(module, "base_layer", module)
            return inner if isinstance(inner, nn.Linear) else None
    return None
