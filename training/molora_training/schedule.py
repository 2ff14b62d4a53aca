"""The learning rate of a step."""

import math


def warm_cosine(step: int, total: int, warmup: float, peak: float) -> float:
    """Linear warm-up over the share ``warmup`` of ``total`` steps, then half a cosine down to zero after the last."""
    warm = math.ceil(warmup * total)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm)))
