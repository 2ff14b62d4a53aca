"""A MoLoRA under EleutherAI's lm-evaluation-harness: the model class ``molora``, and a call that runs our task files.

Where this module is imported, the harness's own command knows it too: ``lm_eval --model molora --model_args
pretrained=starter --include_path TASKS --tasks molora_sciq --apply_chat_template``.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_hf import stop_sequences_criteria
from lm_eval.tasks import TaskManager

from molora import MoLoRAModel
from molora.chat import render
from molora_training.data.benchmarks import PREFIX


@register_model("molora")
class MoLoRALM(HFLM):
    """Log-likelihoods and generation of a routed model, with the harness's own batching.

    Args:
        pretrained: a saved MoLoRA, or one that is loaded.
        selection: of every sequence, a mapping or its JSON; None: the stack's defaults.
        dtype: of the base, where it is loaded here.
        device: where it runs; None: a GPU if there is one.
        batch_size, and the rest: of the harness's own class.
    """

    def __init__(
        self,
        pretrained: str | Path | MoLoRAModel,
        selection: Mapping[str, Any] | str | None = None,
        dtype: str | torch.dtype = "bfloat16",
        device: str | None = None,
        batch_size: int | str = 16,
        **settings: Any,
    ) -> None:
        if not isinstance(pretrained, MoLoRAModel):
            place = device or ("cuda" if torch.cuda.is_available() else "cpu")
            kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
            pretrained = MoLoRAModel.from_pretrained(pretrained, dtype=kind).to(place)
        self.routed = pretrained.eval()
        self.selection = json.loads(selection) if isinstance(selection, str) else selection
        super().__init__(
            pretrained=self.routed.base, tokenizer=self.routed.tokenizer, batch_size=batch_size, **settings
        )

    def _model_call(
        self, inps: torch.Tensor, attn_mask: torch.Tensor | None = None, labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        # The harness pads on the right, where nothing of it reaches a token that counts.
        with torch.no_grad():
            logits = self.routed(inps, selection=self.selection, use_cache=False).logits
        assert logits is not None
        return logits

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> torch.Tensor:
        if not generation_kwargs.get("do_sample"):
            generation_kwargs |= {"do_sample": False}
            generation_kwargs.pop("temperature", None)
        criteria = stop_sequences_criteria(self.tokenizer, stop, context.shape[1], context.shape[0])
        return self.routed.generate(
            input_ids=context,
            selection=self.selection,
            max_length=max_length,
            stopping_criteria=criteria,
            pad_token_id=self.tokenizer.pad_token_id,
            **generation_kwargs,
        )

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As in training: no system message that nobody wrote."""
        return render(self.tokenizer, chat_history, add_generation_prompt)


class AskedAsOurs(HFLM):
    """Another model, asked with our prompts: in its chat format, without the system message that its template adds."""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return render(self.tokenizer, chat_history, add_generation_prompt)


def evaluate(model: LM, folder: Path, names: Sequence[str], limit: int | None = None) -> dict[str, dict[str, float]]:
    """Runs benchmarks of :func:`molora_training.data.benchmarks.write_benchmarks`.

    Args:
        model: what is measured.
        folder: of the task files.
        names: of the benchmarks.
        limit: use only so many questions of each.

    Returns:
        By benchmark: its metrics with their standard errors, and ``n``.
    """
    found, rows = _run(model, folder, names, limit), {}
    for name in names:
        row = found["results"][f"{PREFIX}{name}"]
        values = {key.split(",")[0]: float(value) for key, value in row.items() if isinstance(value, int | float)}
        rows[name] = values | {"n": float(found["n-samples"][f"{PREFIX}{name}"]["effective"])}
    return rows


def right_answers(model: LM, folder: Path, names: Sequence[str], limit: int | None = None) -> dict[str, torch.Tensor]:
    """By benchmark whose options are compared: bool [questions], which the model answers right (``acc``), in the order
    of the file."""
    samples = _run(model, folder, names, limit, log_samples=True)["samples"]
    found = {}
    for name in names:
        rows = sorted(samples[f"{PREFIX}{name}"], key=lambda row: int(row["doc_id"]))
        found[name] = torch.tensor([bool(row["acc"]) for row in rows])
    return found


def _run(model: LM, folder: Path, names: Sequence[str], limit: int | None, log_samples: bool = False) -> dict[str, Any]:
    found = simple_evaluate(
        model,
        tasks=[f"{PREFIX}{name}" for name in names],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        apply_chat_template=True,
        limit=limit,
        log_samples=log_samples,
        bootstrap_iters=1000,  # of a mean the error has a closed form
    )
    assert found is not None
    return dict(found)
