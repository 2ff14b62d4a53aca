"""Text-to-LoRA and Profile-to-PEFT (arXiv 2510.16282): a network that turns the embedding of one text into an adapter.

- in: a sentence embedding of a description or of a user's profile, the kind of module and the depth of its layer
- a mixer and two residual blocks, shared by all modules; a head for each kind of module
- what is learnt for all texts alike lies in the heads' biases, an ordinary LoRA: the heads' weights add what differs
- an untrained network makes adapters that change nothing
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from molora.atomic import new_folder
from molora.base import same_base
from molora.checks import linear_sizes
from molora.errors import ConfigError, HypernetError
from molora.routing import decoder_layers

CONFIG_FILE, WEIGHTS_FILE = "hypernet.json", "hypernet.safetensors"
KIND = "text"
ALL_LINEAR = "all-linear"
_WIDER = 4  # times the width: the inside of the mixer and the blocks, and what the heads read
_BLOCKS = 2


@dataclass(frozen=True)
class TextNetConfig:
    """What the network reads and writes.

    Args:
        base: the model that it is for, as its users name it.
        prefix: name of that model's list of decoder layers. layers: how many there are.
        modules: what is adapted in each layer: the module's name within it -> its (in, out).
        embedding: size of a text's embedding.
        encoder: what makes the embeddings, as its users name it.
        width: of the inner vectors, a multiple of 4.
        rank: of the adapters. alpha: theirs, 0 for twice the rank; the scale is alpha / sqrt(rank), as of rsLoRA.
        head: "L" (heads of their own for A and B) or "M" (one for both, told apart by a learned vector).
        dropout: inside the mixer and the blocks, in training.
    """

    base: str
    prefix: str
    layers: int
    modules: Mapping[str, tuple[int, int]]
    embedding: int
    encoder: str = ""
    width: int = 128
    rank: int = 8
    alpha: float = 0.0
    head: Literal["L", "M"] = "L"
    dropout: float = 0.05

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", {name: (int(i), int(o)) for name, (i, o) in self.modules.items()})
        for name in ("layers", "embedding", "width", "rank"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number from 1, not {value!r}.")
        if self.width % 4:
            raise ConfigError(f"width must be a multiple of 4, not {self.width}.")
        if self.head not in ("L", "M"):
            raise ConfigError(f"head must be 'L' or 'M', not {self.head!r}.")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must lie in [0, 1), not {self.dropout}.")
        object.__setattr__(self, "alpha", float(self.alpha) or 2.0 * self.rank)
        if not 0 < self.alpha < float("inf"):
            raise ConfigError(f"alpha must be above 0, or 0 for twice the rank, not {self.alpha}.")
        if not self.modules or min(size for sizes in self.modules.values() for size in sizes) < 1:
            raise ConfigError(f"modules must name what is adapted, with sizes from 1, not {dict(self.modules)}.")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank**0.5

    @classmethod
    def for_base(
        cls,
        base: Any,
        name: str,
        embedding: int,
        targets: str | Sequence[str] = ("q_proj", "v_proj"),
        **settings: Any,
    ) -> "TextNetConfig":
        """For a model of `transformers`.

        Args:
            base: the model.
            name: as its users name it.
            embedding: size of a text's embedding.
            targets: ends of the names of linear modules, or "all-linear" for all of the decoder layers.
            settings: the other fields.

        Raises:
            ConfigError: a target is in none of the decoder layers, or its size differs between them.
        """
        prefix, layers = decoder_layers(base)
        sizes = linear_sizes(base)
        start = f"{prefix}.0."
        there = [module.removeprefix(start) for module in sizes if module.startswith(start)]
        found = []
        for target in [targets] if isinstance(targets, str) else targets:
            own = [inner for inner in there if target == ALL_LINEAR or f".{inner}".endswith(f".{target}")]
            if not own:
                ends = ", ".join(inner.rpartition(".")[2] for inner in there)
                raise ConfigError(f"The decoder layers of {name} have no linear module {target!r}; there are: {ends}.")
            found += own
        modules = {inner: sizes[start + inner] for inner in found}
        for inner, size in modules.items():
            others = {sizes.get(f"{prefix}.{number}.{inner}") for number in range(len(layers))}
            if others != {size}:
                raise ConfigError(f"{inner} is not in every decoder layer of {name} with the same size: leave it out.")
        return cls(name, prefix, len(layers), modules, embedding, **settings)


class TextNet(nn.Module):
    """Embeddings of texts -> low-rank factors. N texts, K kinds of module, L layers, w width, r rank."""

    def __init__(self, config: TextNetConfig) -> None:
        super().__init__()
        self.config = config
        c, w, inner = config, config.width, _WIDER * config.width
        self.mean = nn.Buffer(torch.zeros(c.embedding))
        self.spread = nn.Buffer(torch.ones(()))
        self.text, self.norm_text = nn.Linear(c.embedding, w // 2), nn.LayerNorm(w // 2)
        self.kind, self.norm_kind = nn.Parameter(torch.randn(len(c.modules), w // 4)), nn.LayerNorm(w // 4)
        self.depth, self.norm_depth = nn.Parameter(torch.randn(c.layers, w // 4)), nn.LayerNorm(w // 4)
        self.mixer = nn.Sequential(
            nn.Linear(w, inner), nn.SiLU(), nn.Dropout(c.dropout), nn.Linear(inner, w), nn.SiLU(), nn.Dropout(c.dropout)
        )
        self.blocks = nn.ModuleList(_block(w, c.dropout) for _ in range(_BLOCKS))
        self.norm, self.widen = nn.LayerNorm(w), nn.Linear(w, inner)
        self.bias_A, self.bias_B = nn.ParameterDict(), nn.ParameterDict()
        self.heads = nn.ParameterDict()
        self.side = nn.Parameter(torch.randn(2, w)) if c.head == "M" else None  # A, B
        for name, (inside, outside) in c.modules.items():
            key = _key(name)
            rows = inside + outside if c.head == "L" else max(inside, outside)
            self.heads[key] = nn.Parameter(torch.zeros(rows * c.rank, inner))
            self.bias_A[key] = nn.Parameter(torch.empty(c.layers, c.rank, inside).uniform_(-1, 1) * inside**-0.5)
            self.bias_B[key] = nn.Parameter(torch.zeros(c.layers, outside, c.rank))

    @torch.no_grad()
    def standardise(self, embeddings: Tensor) -> None:
        """Keeps the mean and the spread of embeddings [N, E]: what all texts have in common tells nothing of one."""
        self.mean.copy_(embeddings.mean(0))
        spread = float((embeddings - embeddings.mean(0)).square().mean().sqrt())
        self.spread.fill_(spread if spread > 0 else 1.0)

    def forward(self, embeddings: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """The adapters of N texts.

        Args:
            embeddings: [N, E].

        Returns:
            By the base's module name A [N, r, in] and B [N, out, r], the scale in B, in the network's dtype.
        """
        c = self.config
        features = self._features(embeddings)  # [N, K, L, w]
        if self.side is None:
            read_A = read_B = self._read(features)
        else:
            read_A, read_B = self._read(features + self.side[0]), self._read(features + self.side[1])
        factors = {}
        for number, (name, (inside, outside)) in enumerate(c.modules.items()):
            key = _key(name)
            head = self.heads[key]
            own_A, own_B = (head, head) if c.head == "M" else head.split((inside * c.rank, outside * c.rank))
            A = F.linear(read_A[:, number], own_A[: inside * c.rank]).unflatten(-1, (c.rank, inside))
            B = F.linear(read_B[:, number], own_B[: outside * c.rank]).unflatten(-1, (outside, c.rank))
            A, B = A + self.bias_A[key], (B + self.bias_B[key]) * c.scale  # [N, L, r, in], [N, L, out, r]
            for layer in range(c.layers):
                factors[f"{c.prefix}.{layer}.{name}"] = (A[:, layer], B[:, layer])
        return factors

    def _features(self, embeddings: Tensor) -> Tensor:
        """[N, K, L, w], with mean 0 and variance 1 but for a learned gain."""
        x = (embeddings.to(self.mean) - self.mean) / self.spread
        text = self.norm_text(self.text(x))[:, None, None]
        kind, depth = self.norm_kind(self.kind)[None, :, None], self.norm_depth(self.depth)[None, None]
        sizes = (len(x), len(self.kind), len(self.depth), -1)
        mixed = self.mixer(torch.cat([part.expand(*sizes) for part in (text, kind, depth)], -1))
        for block in self.blocks:
            mixed = mixed + block(mixed)
        found: Tensor = self.norm(mixed)
        return found

    def _read(self, features: Tensor) -> Tensor:
        """What the heads read: [N, K, L, 4 w].

        It is divided by its size, so that a step of AdamW, which moves each weight as far, moves a factor as far at any
        width, and about as far as the same step moves the bias.
        """
        wide = F.silu(self.widen(features))
        return F.layer_norm(wide, wide.shape[-1:]) / wide.shape[-1]

    @property
    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def check(self, base: Any, name: str | None = None) -> None:
        """Whether it was made for ``base``, which is called ``name`` (None: the name is not looked at).

        Raises:
            HypernetError: it was not; the message names what differs.
        """
        c = self.config
        if name is not None:
            self.check_name(name)
        sizes = linear_sizes(base)
        layers = len(decoder_layers(base)[1])
        called = name or "this base"
        if layers != c.layers:
            raise HypernetError(
                f"This hypernetwork was trained for {c.base} of {c.layers} layers, and {called} has {layers}: take one "
                f"that was trained for it."
            )
        for module in (f"{c.prefix}.{layer}.{inner}" for layer in range(layers) for inner in c.modules):
            found, wanted = sizes.get(module), c.modules[module.removeprefix(f"{c.prefix}.").partition(".")[2]]
            if found != wanted:
                there = "has no such linear module" if found is None else f"maps {found[0]} to {found[1]} there"
                raise HypernetError(
                    f"This hypernetwork was trained for {c.base}, where {module} maps {wanted[0]} to {wanted[1]} "
                    f"features; {called} {there}. Take one that was trained for it."
                )

    def check_name(self, name: str) -> None:
        """Raises HypernetError where a base called ``name`` is another one. Where it lies does not matter."""
        if not same_base(name, self.config.base):
            raise HypernetError(
                f"This hypernetwork was trained for {self.config.base}, not for {name}: take one that was."
            )

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Writes hypernet.json and hypernet.safetensors, its weights as ``dtype``; there must be no such folder yet."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        weights = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in self.named_parameters()}
        weights |= {name: tensor.cpu().contiguous() for name, tensor in self.named_buffers()}
        with new_folder(folder) as made:
            save_file(weights, made / WEIGHTS_FILE, metadata={"format": "pt"})
            about = {"kind": KIND, **asdict(self.config)}
            (made / CONFIG_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path, base: Any = None, name: str | None = None) -> "TextNet":
        """What :meth:`save` wrote, in float32 and evaluation mode.

        Args:
            folder: where it lies.
            base: what it is to be used with, to be checked; name: as its users name it.

        Raises:
            HypernetError: there is none, it is damaged or of another kind, or it was made for another base.
        """
        folder = Path(folder)
        try:
            about = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
            kind = about.pop("kind")
            if kind != KIND:
                raise HypernetError(f"The hypernetwork at {folder} makes adapters of a {kind}, not of a short text.")
            # Nothing is allocated by what the settings say: sizes are compared first.
            with torch.device("meta"):
                net = cls(TextNetConfig(**about))
            weights = load_file(folder / WEIGHTS_FILE)
            net.load_state_dict(weights, assign=True)
        except HypernetError:
            raise
        except FileNotFoundError as error:
            raise HypernetError(
                f"There is no hypernetwork at {folder}: it lacks {CONFIG_FILE} or {WEIGHTS_FILE}. Train one "
                f"with `molora train hypernet profile` or `molora train hypernet text`."
            ) from error
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OSError) as error:
            raise HypernetError(f"The hypernetwork at {folder} is damaged ({error}).") from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in weights.values()):
            raise HypernetError(f"The hypernetwork at {folder} holds NaN or infinite values.")
        if base is not None:
            net.check(base, name)
        return net.float().eval()


def _block(width: int, dropout: float) -> nn.Sequential:
    """What a residual block adds."""
    inner = _WIDER * width
    return nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, inner), nn.SiLU(), nn.Dropout(dropout), nn.Linear(inner, width)
    )


def _key(name: str) -> str:
    return name.replace(".", "_")
