"""Conversations that an adapter makes up itself, to be replayed where no text may be kept.

It writes a question after nothing but a user turn's opening (as arXiv 2406.08464 has an instructed model write its
instructions), and answers it. What it has learnt colours both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel, Stack, StackLayer
from molora.chat import render
from molora.errors import BaseModelError

_LAYER = "served"
_MARK = "\u241e"  # in no template
Row = Mapping[str, Any]


@torch.no_grad()
def invent(
    base: str, served: Path, count: int, dtype: torch.dtype, seed: int = 0, question: int = 64, answer: int = 192
) -> list[Row]:
    """Up to ``count`` different conversations of one question and one answer.

    Args:
        base: of the adapter.
        served: the adapter.
        count: how many are tried at once; what is empty or comes twice does not count.
        dtype: of the base.
        seed: of the questions, which are sampled; answers are the likeliest.
        question, answer: tokens at most; what does not end before is cut.

    Raises:
        BaseModelError: the base's chat format has no opening of a user turn.
    """
    model = MoLoRAModel.from_base(base, Stack([StackLayer(_LAYER, {"it": served}, default="it")]), dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
    tokenizer = model.tokenizer
    opening, _, closing = render(tokenizer, [{"role": "user", "content": _MARK}]).partition(_MARK)
    stop = tokenizer(closing.lstrip(), add_special_tokens=False).input_ids[:1]
    if not opening or not stop:
        raise BaseModelError("This base's chat format does not mark where a user's turn begins and ends.")
    tokenizer.padding_side = "left"
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        asked = _written(model, [opening] * count, stop[0], question, do_sample=True, top_p=0.95, temperature=1.0)
    asked = list(dict.fromkeys(text for text in asked if text))
    if not asked:
        return []
    turns = [[{"role": "user", "content": text}] for text in asked]
    prompts = [render(tokenizer, turn, add_generation_prompt=True) for turn in turns]
    answers = _written(model, prompts, stop[0], answer, do_sample=False)
    found = zip(turns, answers, strict=True)
    return [{"messages": [*turn, {"role": "assistant", "content": said}]} for turn, said in found if said]


def _written(model: MoLoRAModel, prompts: list[str], stop: int, tokens: int, **how: Any) -> list[str]:
    """What comes after each prompt, up to the end of the turn."""
    tokenizer: Any = model.tokenizer
    given = tokenizer(prompts, add_special_tokens=False, return_tensors="pt", padding=True).to(model.device)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else stop
    ids: Any = model.generate(
        input_ids=given.input_ids, attention_mask=given.attention_mask, max_new_tokens=tokens, eos_token_id=stop,
        pad_token_id=pad, **how,
    )  # fmt: skip
    new = ids[:, given.input_ids.shape[1] :]
    return [str(text).strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]
