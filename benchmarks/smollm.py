"""The real SmolLM2-135M-Instruct with the starter stack: the same tokens on a GPU as on a CPU, and tokens a second.

    python -m benchmarks.smollm --base FOLDER --reference FILE     # on a CPU: writes what the plain path says
    python -m benchmarks.smollm --base FOLDER --compare FILE       # on a GPU: compares with it, then measures

Eight prompts of different domains, of which every other one has a forced personality beside the routed domain: greedy
tokens in float32, one prompt at a time and all in one batch with left padding. On the GPU that is done by the captured
step and by transformers' own loop with the kernels in the modules, and everything must be equal, token for token.
FILE also holds how clear each choice was: the logit of the chosen token above the second best. Then, in bf16, tokens/s
after the first, of the routed stack by the captured step and of the bare base in transformers' generate.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from molora import MoLoRAModel
from molora.base import load_base
from molora.bench import _pace, machine_name
from molora.provenance import commit
from molora.starter import starter_folder

PROMPTS = (
    "A pen costs 3 coins. What do 7 pens cost?",
    "Write a Python function that reverses a string.",
    "What does a contract need to be valid?",
    "What are the symptoms of iron deficiency?",
    "Яке місто є столицею України?",
    "Name three rivers of Europe and say where each of them ends.",
    "First compute 12 * 7. Then print the result in Python.",
    "Explain in two sentences why the sky is blue.",
)
SPEED_TOKENS = {"cuda": 128, "cpu": 8}


class Spoken:
    """The prompts, encoded for a model, and their selections."""

    def __init__(self, model: MoLoRAModel) -> None:
        self.model = model
        encoded = [model.encode([{"role": "user", "content": prompt}])["input_ids"][0] for prompt in PROMPTS]
        self.ids = [one.tolist() for one in encoded]
        personality = next(iter(model.stack["personality"].adapters))
        self.selections = [
            {"personality": personality if index % 2 else None, "domain": "auto", "user": None}
            for index in range(len(PROMPTS))
        ]

    def inputs(self, which: slice = slice(None)) -> dict[str, torch.Tensor]:
        """input_ids and attention_mask [prompts, longest], padded on the left."""
        ids = self.ids[which]
        longest, pad = max(map(len, ids)), int(self.model.tokenizer.pad_token_id)
        rows = [[pad] * (longest - len(row)) + row for row in ids]
        mask = [[0] * (longest - len(row)) + [1] * len(row) for row in ids]
        device = self.model.device
        return {"input_ids": torch.tensor(rows, device=device), "attention_mask": torch.tensor(mask, device=device)}

    @torch.no_grad()
    def generate(self, which: slice, tokens: int, **options: Any) -> list[list[int]]:
        """Greedy tokens of the prompts, together."""
        inputs = self.inputs(which)
        out = self.model.generate(
            **inputs, selection=self.selections[which], do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens,
            **options,
        )  # fmt: skip
        if "disable_compile" not in options and out.is_cuda and not common.took_steps(self.model):
            sys.exit("generate did not take the captured step. Nothing is printed.")
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    def both_ways(self, tokens: int, **options: Any) -> dict[str, list[list[int]]]:
        alone = [self.generate(slice(i, i + 1), tokens, **options)[0] for i in range(len(PROMPTS))]
        return {"one at a time": alone, "one batch": self.generate(slice(None), tokens, **options)}

    @torch.no_grad()
    def margins(self, answers: list[list[int]]) -> list[list[float]]:
        """By prompt and token: the logit of the best token above that of the second best."""
        found = []
        for ids, answer, selection in zip(self.ids, answers, self.selections, strict=True):
            whole = torch.tensor([ids + answer], device=self.model.device)
            logits = self.model(whole, selection=selection, use_cache=False).logits[0, len(ids) - 1 : -1]
            logits[:, self.model.generation_config.eos_token_id] = -torch.inf  # as min_new_tokens has it
            best = logits.float().topk(2, -1).values
            found.append([round(value, 5) for value in (best[:, 0] - best[:, 1]).tolist()])
        return found


def compare(name: str, found: list[list[int]], reference: dict[str, Any]) -> list[str]:
    """What differs, in words."""
    wrong = []
    for index, (mine, theirs) in enumerate(zip(found, reference["tokens"], strict=True)):
        if mine != theirs:
            at = next(i for i, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1])
            margin = reference["margins"][index][at]
            wrong.append(f"{name}: {PROMPTS[index]!r} differs at token {at}, which the reference chose by {margin}")
    return wrong


def agreement(found: list[list[int]], expected: list[list[int]]) -> float:
    """Share of the tokens before each sequence's first difference."""
    same = 0
    for mine, theirs in zip(found, expected, strict=True):
        pairs = [a == b for a, b in zip(mine, theirs, strict=True)]
        same += pairs.index(False) if False in pairs else len(pairs)
    return same / sum(map(len, expected))


def speeds(spoken: Spoken, bare: Any, batches: list[int], tokens: int) -> list[dict[str, Any]]:
    """Tokens/s of all sequences together, after the first token: medians of five runs after a short one."""
    rows = []
    for batch in batches:
        inputs = spoken.inputs(slice(0, batch))
        pace = {}
        for name, generate in (
            ("base", bare.generate),
            ("routed", lambda **o: spoken.model.generate(selection=spoken.selections[:batch], **o)),  # noqa: B023
        ):
            _pace(generate, inputs, tokens)
            pace[name] = batch * statistics.median(_pace(generate, inputs, tokens) for _ in range(5))
        rows.append({"batch": batch, "tokens": tokens, "dtype": "bfloat16"})
        rows[-1] |= {f"{name}_tokens_per_s": value for name, value in pace.items()}
        rows[-1]["routed_over_base"] = pace["routed"] / pace["base"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="transformers folder of SmolLM2-135M-Instruct")
    parser.add_argument("--stack", type=Path, default=starter_folder(), help="a saved MoLoRA (default: the starter)")
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--reference", type=Path, help="write the tokens of this machine's CPU here")
    task.add_argument("--compare", type=Path, help="compare with the tokens in this file, then measure")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer, in the reference")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], help="of the tokens/s")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="of --compare")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu/smollm.json"))
    settings = parser.parse_args()
    if settings.reference is not None:
        write_reference(settings)
        return
    if settings.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No GPU is here: write a --reference, or try --device cpu.")
    reference = json.loads(settings.compare.read_text())
    device = torch.device(settings.device)

    def load(dtype: torch.dtype) -> Spoken:
        return Spoken(MoLoRAModel.from_pretrained(settings.stack, base=settings.base, dtype=dtype).to(device))

    spoken, wrong = load(torch.float32), []
    if spoken.ids != reference["prompts"] or spoken.selections != reference["selections"]:
        sys.exit("The reference is of other prompts, another tokenizer or another stack: write it again.")
    ways: dict[str, dict[str, Any]] = {"captured": {}, "transformers' loop": {"disable_compile": True}}
    for way, options in ways.items():
        for name, found in spoken.both_ways(reference["length"], **options).items():
            differing = compare(f"{way}, {name}", found, reference)
            print(f"float32, {way}, {name}: {len(PROMPTS) - len(differing)} of {len(PROMPTS)} answers equal the CPU's")
            wrong += differing
    if wrong:
        sys.exit("\n".join([*wrong, "The tokens are not those of the CPU. Nothing is printed."]))
    spoken = load(torch.bfloat16)
    bare, _ = load_base(settings.base, dtype=torch.bfloat16, progress=False)
    same = agreement(spoken.generate(slice(None), reference["length"]), reference["tokens"])
    print(f"bf16, captured: {same:.0%} of the tokens come before a first difference from float32 (for information)")
    rows: list[dict[str, Any]] = []
    answers = {"answers_equal": len(PROMPTS), "answers": len(PROMPTS), "bf16_agreement": same}
    for row in speeds(spoken, bare.to(device), settings.batch, SPEED_TOKENS[settings.device]):
        rows.append({**row, **answers})
        common.save(settings.out, rows, device, "none: greedy")


def write_reference(settings: argparse.Namespace) -> None:
    """The tokens of the plain path in float32 on the CPU, which must not depend on the batch."""
    spoken = Spoken(MoLoRAModel.from_pretrained(settings.stack, base=settings.base, dtype=torch.float32))
    answers = spoken.both_ways(settings.tokens)
    alone = answers["one at a time"]
    margins = spoken.margins(alone)
    reference = {
        "command": "python -m benchmarks.smollm --reference", "commit": commit(),
        "machine": machine_name() if not torch.cuda.is_available() else "CPU", "dtype": "float32",
        "length": settings.tokens, "prompts": spoken.ids, "selections": spoken.selections, "tokens": alone,
        "margins": margins,
    }  # fmt: skip
    wrong = compare("one batch", answers["one batch"], reference)
    if wrong:
        sys.exit("\n".join([*wrong, "On the CPU a batch gives other tokens. Nothing is written."]))
    settings.reference.parent.mkdir(parents=True, exist_ok=True)
    settings.reference.write_text(json.dumps(reference) + "\n", encoding="utf-8")
    for prompt, answer, margin in zip(PROMPTS, alone, margins, strict=True):
        print(f"{prompt}\n  {spoken.model.tokenizer.decode(answer)!r} (closest choice: {min(margin)})")


if __name__ == "__main__":
    main()
