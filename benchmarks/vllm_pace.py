"""vLLM with a routed stack beside vLLM with one LoRA, and whether the stack says there what it says here.

    python -m benchmarks.vllm_pace --out vllm_pace.json
    python -m benchmarks.vllm_pace --tensor-parallel 2 --out vllm_pace.json
    python -m benchmarks.vllm_pace --shape tiny --modes eager --batch 1 4 --out vllm_pace.json    # does it run? (CPUs)

A base of random weights, 8 random adapters of rank 16 on all linear modules, and a router of random weights that reads
token ids, top 1 and top 2. Each kind of engine is a process of its own: one whose largest rank is one adapter's, for
vLLM's own LoRA of that rank, and one whose largest rank is that of all, for the stacks, vLLM's own LoRA of that rank,
and the base. The ratios are to vLLM's own of either rank. Then all kinds in one batch: the tokens and their
log-probabilities beside those of MoLoRAModel in float32, tokens with and without tensor parallelism, and whether the
prefix cache keeps kinds apart. vLLM runs this in float32 on CPUs; on a GPU, where its kernels for LoRA take bfloat16 at
most, a stack may be twice as far from MoLoRAModel as vLLM's own LoRA is.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from benchmarks.common import random_base, random_router
from benchmarks.several import SHAPES as SMALL
from molora import MoLoRAModel, Stack, StackLayer
from molora.factors import write_factors
from molora.vllm.export import export
from molora_training.report import heading, line, write_report

LLAMAS = {"tiny": {**SMALL["tiny"], "hidden_size": 64, "num_attention_heads": 2}, "135M": SMALL["135M"]}
TOP = {"top 1": 1, "top 2": 2}
SELECTIONS: dict[str, Any] = {"base": {"domain": None}, "one": {"domain": "a0"}, "top 1": {}, "top 2": {}}
CHECKED = {"prompt": 200, "answer": 32}
NEAR = 0.02  # between log-probabilities in float32


def make_base(shape: str, device: torch.device) -> Any:
    if shape not in LLAMAS:
        return random_base(shape, device, torch.bfloat16)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**LLAMAS[shape], tie_word_embeddings=True)).bfloat16().eval()


def write_adapter(base: Any, folder: Path, rank: int, seed: int) -> Path:
    """A random LoRA of all linear modules, which changes what they say by some tenths."""
    chance = torch.Generator().manual_seed(seed)
    factors = {}
    for name, module in base.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            A = torch.randn(rank, module.in_features, generator=chance) / module.in_features**0.5
            factors[name] = A, 0.2 / rank**0.5 * torch.randn(module.out_features, rank, generator=chance)
    write_factors(folder, factors, "base", dtype=torch.float32)
    return folder


def make(folder: Path, shape: str, adapters: int, rank: int, device: torch.device) -> dict[str, Path]:
    """Writes the base, the adapters, and the stacks as we save them and as vLLM reads them; where they are."""
    base = make_base(shape, device)
    base.save_pretrained(folder / "base")
    base = base.cpu().float()
    words = Tokenizer(models.WordLevel({"word": 0}, "word"))  # no text is read; a base has a tokenizer
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder / "base")
    own = {f"a{n}": write_adapter(base, folder / f"a{n}", rank, n) for n in range(adapters)}
    made = {"base": folder / "base", "one": own["a0"]}
    made["all"] = write_adapter(base, folder / "all", rank * adapters, adapters)
    for kind, top in TOP.items():
        stack = Stack([StackLayer("domain", own, top_k=top, default="auto")])
        model = MoLoRAModel.from_base(str(made["base"]), stack, random_router(stack, base))
        made[f"saved {kind}"] = folder / "saved" / kind.replace(" ", "-")
        model.save_pretrained(made[f"saved {kind}"])
        made[kind] = export(made[f"saved {kind}"], folder / "exported", base=base)
    return made


def run(job: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What an engine finds. Stops where it fails."""
    asked, found = folder / "job.json", folder / "found.json"
    asked.write_text(json.dumps(job))
    settings = {"VLLM_USE_V2_MODEL_RUNNER": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_WORKER_MULTIPROC_METHOD": "spawn", "VLLM_USE_FLASHINFER_SAMPLER": "0"}  # fmt: skip
    command = [sys.executable, "-m", "benchmarks.vllm_engine", str(asked), str(found)]
    subprocess.run(command, check=True, env={**os.environ, **settings})
    read: dict[str, Any] = json.loads(found.read_text())
    return read


def compare(answers: list[dict[str, Any]], made: Mapping[str, Path], device: torch.device) -> list[dict[str, Any]]:
    """By kind: how far log-probabilities are from those of MoLoRAModel over the same tokens, the share of tokens that
    it too finds most probable, and, for scale, how far the base's log-probabilities are from its own."""
    rows = []
    for stack in TOP:
        model = MoLoRAModel.from_pretrained(made[f"saved {stack}"], dtype=torch.float32, device_map=device)
        for kind in (stack,) if rows else ("base", "one", stack):
            found = [one for one in answers if one["kind"] == kind]
            far, same, effect = 0.0, [], 0.0
            for one in found:
                own, best = scored(model, one, SELECTIONS[kind], device)
                other, _ = scored(model, one, SELECTIONS["base"], device)
                said = torch.tensor(one["logprobs"])
                far = max(far, float((own - said).abs().max()))
                effect = max(effect, float((own - other).abs().max()))
                same += (best == torch.tensor(one["tokens"])).tolist()
            rows.append({"kind": kind, "log-probabilities apart": far, "same tokens": sum(same) / len(same)})
            rows[-1]["apart from the base"] = effect
            print(json.dumps(rows[-1]), flush=True)
        del model
    return rows


@torch.no_grad()
def scored(model: MoLoRAModel, answer: Mapping[str, Any], selection: Any, device: torch.device) -> Any:
    """Log-probabilities of the answer's tokens, and the most probable ones in their places."""
    ids = torch.tensor([answer["prompt"] + answer["tokens"]], device=device)
    out = model(input_ids=ids, attention_mask=torch.ones_like(ids), selection=selection)
    log = out.logits[0, len(answer["prompt"]) - 1 : -1].float().log_softmax(-1).cpu()
    return log.gather(1, torch.tensor(answer["tokens"]).unsqueeze(1)).squeeze(1), log.argmax(-1)


def paces(found: Mapping[str, list[dict[str, Any]]], mode: str) -> list[dict[str, Any]]:
    """Rows of a mode, with ratios to vLLM's own LoRAs at the same batch."""
    at = {(own["kind"], own["batch"]): own["tokens a second"] for rows in found.values() for own in rows}
    rows = []
    for kind, batch in at:
        one, dense = at["one", batch], at["all", batch]
        row = {"mode": mode, "kind": kind, "batch": batch, "tokens a second": at[kind, batch]}
        rows.append({**row, "of one LoRA": at[kind, batch] / one, "of one LoRA of all ranks": at[kind, batch] / dense})
    return rows


def show(rows: list[dict[str, Any]], mode: str) -> None:
    print(f"{mode}: tokens a second, of one LoRA, of one LoRA of all ranks")
    for row in (row for row in rows if row["mode"] == mode):
        ratios = f"{row['of one LoRA']:8.2f} {row['of one LoRA of all ranks']:8.2f}"
        print(f"{row['kind']:6} {row['batch']:4} {row['tokens a second']:10.0f} {ratios}", flush=True)


def judged(rows: list[dict[str, Any]], checks: Mapping[str, Any]) -> list[dict[str, Any]]:
    must = []
    for mode in dict.fromkeys(row["mode"] for row in rows):
        for kind in TOP:
            for against in ("of one LoRA", "of one LoRA of all ranks"):
                worst = min(row[against] for row in rows if (row["mode"], row["kind"]) == (mode, kind))
                must.append(line(f"pace, {kind}, {mode}, {against}", worst, 0.9, "higher", "the lowest over batches"))
    apart = {row["kind"]: row["log-probabilities apart"] for row in checks["ours"]}
    exact = checks["dtype"] == "float32"
    for row in checks["ours"] if exact else [row for row in checks["ours"] if row["kind"] in TOP]:
        name, yard = f"{row['kind']}: log-probabilities apart from ours", row["apart from the base"]
        bar = NEAR if exact else 2 * apart["one"]
        must.append(line(name, apart[row["kind"]], bar, "lower", f"{checks['dtype']}; the base's are {yard:.2g} apart"))
    must.append(line("tokens that another kind left in the prefix cache", max(checks["shared"]["first"]), 0, "lower"))
    must.append(line("tokens that the same kind left there", min(checks["shared"]["again"]), 1, "higher"))
    if "same tokens" in checks:
        must.append(line("same tokens with tensor parallelism", checks["same tokens"], 1.0, "higher"))
    return must


def equal(one: list[dict[str, Any]], other: list[dict[str, Any]]) -> float:
    """The share of tokens that are equal."""
    pairs = [pair for a, b in zip(one, other, strict=True) for pair in zip(a["tokens"], b["tokens"], strict=True)]
    return sum(a == b for a, b in pairs) / len(pairs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=["tiny", "135M", "1.7B", "8B"], default="1.7B", help="tiny: for a CPU")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens")
    parser.add_argument("--answer", type=int, default=128, help="tokens")
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts")
    parser.add_argument("--modes", nargs="+", choices=["graphs", "eager"], default=["graphs", "eager"])
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    gpu = torch.cuda.is_available()
    if not gpu and given.shape != "tiny":
        sys.exit("No GPU is here: a CPU takes --shape tiny alone.")
    device = torch.device("cuda" if gpu else "cpu")
    report: dict[str, Any] = heading(
        shlex.join(["python", "-m", "benchmarks.vllm_pace", *sys.argv[1:]]),
        f"random weights in the shape {given.shape}, {given.adapters} random adapters of rank {given.rank}; prompts of "
        f"{given.prompt} tokens, answers of {given.answer}",
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        made = make(folder, given.shape, given.adapters, given.rank, device)
        vocabulary = json.loads((made["base"] / "config.json").read_text())["vocab_size"]
        common = {"base": str(made["base"]), "rows": max(given.batch), "tensor_parallel": given.tensor_parallel,
                  "cpu": not gpu, "dtype": "bfloat16" if gpu else "float32", "vocabulary": vocabulary,
                  "longest": max(given.prompt + given.answer, sum(CHECKED.values()))}  # fmt: skip
        ranks = {given.rank: ["one"], given.rank * given.adapters: ["base", "all", *TOP]}
        speed = {"batches": given.batch, "prompt": given.prompt, "answer": given.answer, "rounds": given.rounds}
        report["rows"] = []
        for mode in given.modes:
            found = {}
            for rank, kinds in ranks.items():
                job = {**common, "eager": mode == "eager", "rank": rank}
                job["loras"] = {kind: str(made[kind]) for kind in kinds if kind != "base"}
                found[str(rank)] = run({**job, "measure": {"pace": {"kinds": kinds, **speed}}}, folder)["pace"]
            report["rows"] += paces(found, mode)
            show(report["rows"], mode)
            write_report(report, given.out)
        kinds = ["one", *TOP]
        checked = {**common, "eager": True, "rank": max(ranks), "rows": 32,
                   "loras": {kind: str(made[kind]) for kind in kinds}}  # fmt: skip
        checked["measure"] = {"answers": {**CHECKED, "each": 4}, "shared": {"prompt": CHECKED["prompt"]}}
        checks = {"dtype": common["dtype"], **run({**checked, "tensor_parallel": 1}, folder)}
        if given.tensor_parallel > 1:
            spread = run(checked, folder)
            checks["same tokens"] = equal(checks["answers"], spread["answers"])
        checks["ours"] = compare(checks.pop("answers"), made, device)
    report["checks"] = checks
    report["must"] = judged(report["rows"], checks)
    for entry in report["must"]:
        print(f"{'reached' if entry['holds'] else 'missed '}  {entry['name']}: {entry['value']:.4g} ({entry['bar']})")
    write_report(report, given.out)


if __name__ == "__main__":
    main()
