"""Attention of right-padded conversations needs no mask: a token never sees the padding, which comes after it."""

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

CAUSAL = "molora_causal"
# Without a function that makes masks `transformers` makes none, and this attention is then the causal one.
AttentionInterface.register(CAUSAL, sdpa_attention_forward)


def attend_causally(base: PreTrainedModel, tokens: int) -> bool:
    """Lets ``base`` attend without masks from here on; whether it can, for sequences of up to ``tokens``.

    A mask is made for each batch that has padding, takes attention off its fastest kernels, and asks the device whether
    there is padding at all, which no CUDA graph can hold.
    """
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if config._attn_implementation == CAUSAL:
        return True
    if config._attn_implementation != "sdpa" or (window is not None and window < tokens):
        return False
    base.set_attn_implementation(CAUSAL)
    return True


@contextmanager
def attending_causally(base: PreTrainedModel, tokens: int) -> Iterator[bool]:
    """As :func:`attend_causally`, for a while."""
    config = base.config.get_text_config()
    before = config._attn_implementation
    able = attend_causally(base, tokens)
    try:
        yield able
    finally:
        if able:
            base.set_attn_implementation(before)
