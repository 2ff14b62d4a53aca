"""Train one LoRA adapter on a frozen base.

- the loss is the mean over answer tokens, across all processes of `accelerate launch`
- batches of similar length under a token budget, cosine schedule with warm-up, gradients clipped
- on one GPU forward and backward are CUDA graphs, one for each shape of batch (not with dropout)
- every `checkpoint_every` steps a validation and a checkpoint; the best validated adapter is what comes out
- an interrupted training goes on from its checkpoint as if nothing had happened
- a loss that is not finite ends the training with a sentence; the last checkpoint stays
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel
from molora.adapter import Adapter
from molora.base import load_base
from molora.checks import check_fits
from molora.errors import DataError, UnsupportedAdapterError
from molora_training.adapter_run import Hold, Run, answer_count
from molora_training.adapter_settings import AdapterTrainSettings, LoraShape
from molora_training.attention import attend_causally
from molora_training.batches import plan_steps, rounded
from molora_training.data import Encoded, encode_within, read_conversations
from molora_training.on_stack import OnStack
from molora_training.processes import Processes


def train(
    settings: AdapterTrainSettings,
    resume: bool = True,
    command: str | None = None,
    on_step: Callable[[int, float], None] | None = None,
    hold: Hold | None = None,
) -> dict[str, Any]:
    """Train and write the adapter to `settings.out`; checkpoints and curves lie in `settings.work`.

    Args:
        settings: what to train.
        resume: go on from the checkpoint of the same settings if there is one; False starts anew.
        command: the command line to name in the model card.
        on_step: called after each step with the number of finished steps and the step's loss.
        hold: what holds the adapter back; the losses that are told are without it.

    Returns:
        The metrics, as in `metrics.json` of the adapter.

    Raises:
        ConfigError: settings that do not fit, or a checkpoint of other settings.
        AdapterError: the adapter to go on from cannot be read, or is not the base's.
        DataError: no usable examples.
        NonFiniteError: the loss or the gradient is not finite.
    """
    processes = Processes()
    if settings.start is not None:
        settings = replace(settings, lora=_shape_of(settings.start, settings.lora))
    # The main process fetches the base first; the others then find it in the cache.
    with processes.main_first():
        model, tokenizer = _load(settings)
    unmasked = attend_causally(getattr(model, "base", model), rounded(settings.data.max_length))
    rows = _read_rows(settings.data.train, tokenizer, settings.data.max_length)
    held_out = _read_rows(settings.data.validation, tokenizer, settings.data.max_length)
    lengths = [row.input_ids.numel() for row in rows]
    steps = plan_steps(lengths, settings.batch_tokens, settings.epochs, settings.seed)
    adapted = _with_lora(model, settings, processes.device).to(processes.device)
    if hold is not None:
        hold.prepare(adapted)
    run = Run(
        settings=settings,
        processes=processes,
        model=adapted,
        rows=rows,
        held_out=held_out,
        steps=steps[: settings.max_steps],
        pad_id=tokenizer.pad_token_id,
        capturable=unmasked,
        hold=hold,
    )
    started = time.monotonic()
    run.start(resume)
    run.train(on_step)
    return run.finish(time.monotonic() - started, command)


def _load(settings: AdapterTrainSettings) -> tuple[Any, Any]:
    """The base, or the MoLoRA on top of which is trained, and the tokenizer."""
    dtype = getattr(torch, settings.dtype)
    if settings.stack is None:
        return load_base(settings.base, dtype=dtype)
    model = MoLoRAModel.from_pretrained(settings.stack, base=settings.base, dtype=dtype)
    return model, model.tokenizer


def _shape_of(folder: Path, asked: LoraShape) -> LoraShape:
    """The shape of a saved adapter, with the dropouts that are asked for."""
    config = Adapter.load(folder).config
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UnsupportedAdapterError(f"The adapter at {folder} has ranks that differ by module: start anew.")
    targets = config["target_modules"]
    return replace(
        asked,
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        targets=targets if isinstance(targets, str) else tuple(targets),
    )


def _with_lora(model: Any, settings: AdapterTrainSettings, device: torch.device) -> Any:
    """The base with a fresh adapter, or the one to go on from: base frozen in its dtype, adapter in float32."""
    from peft import LoraConfig, PeftModel, get_peft_model

    shape = settings.lora
    if settings.start is not None:
        check_fits(Adapter.load(settings.start), model, settings.base)
        config = LoraConfig.from_pretrained(settings.start)
        config.lora_dropout, config.inference_mode = shape.dropout, False
        going_on = PeftModel.from_pretrained(model, settings.start, is_trainable=True, config=config)
        return going_on
    torch.manual_seed(settings.seed)
    config = LoraConfig(
        r=shape.rank,
        lora_alpha=shape.alpha,
        use_rslora=shape.rslora,
        target_modules=shape.targets if isinstance(shape.targets, str) else list(shape.targets),
        lora_dropout=shape.dropout,
        task_type="CAUSAL_LM",
    )
    if isinstance(model, MoLoRAModel):
        model.to(device)  # where the kernels serve it, and before PEFT looks at its modules
        found: Any = OnStack(model, config)
    else:
        found = get_peft_model(model, config)
    return found


def _read_rows(file: Path, tokenizer: Any, max_length: int) -> list[Encoded]:
    """The encoded examples of a file that fit into `max_length` tokens and have an answer."""
    examples = read_conversations(file)
    names = sorted({domain for example in examples for domain in example.domains})
    fitting = encode_within(examples, tokenizer, max_length, names)
    rows = [row for row in fitting if answer_count(row)]
    if not rows:
        raise DataError(f"{file} holds no example with an answer within {max_length} tokens; check data.max_length.")
    return rows
