"""A tiny model with a tokenizer whose tokens are bytes, for what takes or gives text."""

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedTokenizerFast

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from tests.conftest import SMALL, write_adapter

SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte level, without merges: a character of n bytes is n tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def make_spoken(folder: Path, domains: tuple[str, ...] = ("math", "code"), **config: Any) -> MoLoRAModel:
    """A routed model over bytes, with the given adapters in its domain layer and ``law`` beside them on disk."""
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": 261}))
    base.generation_config.pad_token_id = 0
    base.generation_config.eos_token_id = None
    for seed, name in enumerate(("math", "code", "law"), 1):
        write_adapter(base, folder / name, seed)
    stack = Stack(
        [StackLayer("domain", {name: folder / name for name in domains}), StackLayer("user", {}, shared=True)]
    )
    settings = RouterConfig(width=8, hidden=16, **config)
    model = MoLoRAModel.from_base(base, stack, settings, tokenizer=make_tokenizer())
    for part in model.router.parts:  # type: ignore[union-attr]
        part.std.fill_(0.05)
        torch.nn.init.normal_(part.output.weight, std=4.0)
    return balance(model.eval(), torch.arange(5, 261).view(1, -1))


def save_spoken(model: MoLoRAModel, folder: Path) -> Path:
    """Saves the model with its base beside it."""
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")  # type: ignore[union-attr]
    model.base_name = str(folder / "base")
    model.save_pretrained(folder / "model")
    return folder / "model"


def teachable(folder: Path) -> Path:
    """A base's folder in ``folder`` that can learn by an adapter to be sure of a text, and ``blank`` beside it."""
    from molora_training.continual.growth import blank

    model = make_spoken(folder / "adapters")
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    save_spoken(model, folder)
    blank(str(folder / "base"), 8, folder / "blank")
    return folder / "base"


@torch.no_grad()
def balance(model: MoLoRAModel, ids: torch.Tensor) -> MoLoRAModel:
    """Shifts a random router's biases so that over ``ids`` no candidate wins everywhere."""
    assert model.router is not None
    for index, part in enumerate(model.router.parts):
        choice = {layer.name: list(layer.adapters) for layer in model.stack.layers}
        logits = model(ids, selection=choice, output_routes=True).routes.logits[index]
        if logits is not None:  # None: the stack has no adapters
            part.output.bias -= logits.mean((0, 1))
    return model


class Say(LogitsProcessor):
    """Makes generation say the given tokens."""

    def __init__(self, prompt: int, tokens: list[int]) -> None:
        self.prompt = prompt
        self.tokens = tokens

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        said = torch.full_like(scores, -1e9)
        said[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0
        return said


def say(model: MoLoRAModel, prompt: torch.Tensor, tokens: list[int]) -> dict[str, Any]:
    """Settings of ``generate`` and ``stream`` under which they say ``tokens``."""
    processor = LogitsProcessorList([Say(prompt.shape[1], tokens)])
    return {"max_new_tokens": len(tokens), "do_sample": False, "logits_processor": processor}
