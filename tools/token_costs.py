"""What one token of a decode step costs on paper: ``python -m tools.token_costs`` prints docs/how-it-works.md's table.

Operations count a multiplication and an addition as two; bytes are those that have to be read at batch 1, weights and
cache in bfloat16, the router in float32.
"""

from dataclasses import dataclass

RANK, CONTEXT = 16, 512


@dataclass(frozen=True)
class Shape:
    """Sizes of a base and of its router. inputs: numbers that the router's first layer reads."""

    name: str
    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    inputs: int
    router_hidden: int
    rows: int

    @property
    def modules(self) -> list[tuple[int, int]]:
        """(in, out) of a layer's linear modules."""
        q, kv = self.heads * self.head_width, self.kv_heads * self.head_width
        attention = [(self.hidden, q), (self.hidden, kv), (self.hidden, kv), (q, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]


SMOLLM = Shape("SmolLM2-135M", 576, 1536, 30, 9, 3, 64, 49152, 3 * 128, 256, 11)
QWEN = Shape("Qwen3-1.7B", 2048, 6144, 28, 16, 8, 128, 151936, 3 * 128, 256, 9)


def costs(shape: Shape) -> dict[str, tuple[int, int]]:
    """Operations and bytes of a token, by what they are for."""
    weights = shape.layers * sum(i * o for i, o in shape.modules) + shape.hidden * shape.vocabulary
    cache = 2 * shape.layers * shape.kv_heads * shape.head_width * CONTEXT
    attention = 4 * shape.layers * shape.heads * shape.head_width * CONTEXT
    adapter = shape.layers * RANK * sum(i + o for i, o in shape.modules)
    router = shape.inputs * shape.router_hidden + shape.router_hidden * shape.rows
    return {
        "the base's weights": (2 * weights, 2 * weights),
        f"attention to {CONTEXT} tokens": (attention, 2 * cache),
        "the router": (2 * router, 4 * (router + shape.inputs // 3)),
        f"each adapter that acts, rank {RANK} on every linear module": (2 * adapter, 2 * adapter),
    }


def table() -> str:
    """Markdown."""
    shapes = (SMOLLM, QWEN)
    found = {shape: costs(shape) for shape in shapes}
    lines = ["| | " + " | ".join(f"{one.name}, MFLOP | MB | of the base's" for one in shapes) + " |"]
    lines.append("|---|" + "---|" * (3 * len(shapes)))
    for what in found[SMOLLM]:
        cells = []
        for shape in shapes:
            operations, read = found[shape][what]
            share = operations / found[shape]["the base's weights"][0]
            cells += [f"{operations / 1e6:,.2f}", f"{read / 1e6:,.2f}", f"{share:.1%}"]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
