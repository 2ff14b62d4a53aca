"""Training of a router by 1, 2, 4, ... processes, a GPU each, at an equal step: samples a second, and the losses.

    python -m benchmarks.several --out several.json                                  # all GPUs of this machine
    python -m benchmarks.several --out several.json model=my-molora data=data        # a model and data of one's own
    python -m benchmarks.several --shape tiny --processes 1 2 --out several.json     # does it run? (CPUs)

Without a model, a base of random weights with four adapters learns from made-up text of four domains; the loss on next
tokens goes through the whole base, which is the work that is shared. What stands after the options are settings of
`molora train router`. Timed is the second half of the steps, when graphs are captured; the losses are of all of them,
and ``difference`` is the largest one to those of the first number of processes, relative to them.
"""

import argparse
import json
import os
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora import Stack, StackLayer
from molora.commands.training import join_processes
from molora_training.data import Example, write_examples
from molora_training.processes import Processes
from molora_training.report import heading, write_report
from molora_training.router import train
from molora_training.router_settings import RouterTrainSettings
from molora_training.settings import load_settings

SHAPES: dict[str, dict[str, int]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
             "num_key_value_heads": 3, "vocab_size": 49152},  # SmolLM2-135M's
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 300},
}  # fmt: skip
DOMAINS = {"digits": "0123456789 ", "letters": "abcdefgh ", "capitals": "ABCDEFGH ", "signs": "+-*/=()[] "}
EQUAL = ["loss.lm=1", "documents=0", "in_a_turn=0", "asides=0", "epochs=1", "checkpoint_every=1000000"]
SIZES = {"tiny": ["mixed=48", "batch_tokens=1024", "dtype=float32"]}
LARGE = ["mixed=4000", "batch_tokens=32768"]


def make(folder: Path, shape: str) -> list[str]:
    """Writes a base, adapters and data; the settings that name them."""
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokens = [*marks, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=marks[1], eos_token=marks[2], pad_token=marks[0]
    )
    tokenizer.save_pretrained(folder / "base")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPES[shape], tie_word_embeddings=True)).save_pretrained(folder / "base")
    for name in DOMAINS:
        base = LlamaForCausalLM.from_pretrained(folder / "base")
        peft = get_peft_model(base, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
        for parameter in (p for p in peft.parameters() if p.requires_grad):
            torch.nn.init.normal_(parameter, std=0.02)
        peft.save_pretrained(folder / name)
        for split, count in (("train", 64), ("validation", 16)):
            write_examples(folder / "data" / f"{name}.{split}.jsonl", [example(name, split, n) for n in range(count)])
    Stack([StackLayer("domain", {name: folder / name for name in DOMAINS})]).save(folder / "stack.yaml")
    return [f"model={folder / 'stack.yaml'}", f"data={folder / 'data'}", f"base={folder / 'base'}"]


def example(domain: str, split: Any, number: int) -> Example:
    chance = random.Random(f"{domain}/{split}/{number}")
    asked, answer = ("".join(chance.choices(DOMAINS[domain], k=chance.randint(20, 120))) for _ in range(2))
    turns = ({"role": "user", "content": asked}, {"role": "assistant", "content": answer})
    return Example(f"{domain}-{split}-{number}", domain, split, turns)


def launch(processes: int, settings: Sequence[str], folder: Path) -> dict[str, Any]:
    """What so many processes find."""
    found = folder / f"{processes}.json"
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    own = [*settings, f"out={folder / f'out-{processes}'}"]
    subprocess.run([*start, "-m", "benchmarks.several", "--worker", "--out", str(found), *own], check=True)
    row: dict[str, Any] = json.loads(found.read_text())
    return row


def work(settings: RouterTrainSettings, out: Path) -> None:
    """One of the processes: trains, and the first one writes what it took."""
    join_processes()
    times, losses = [], []

    def on_step(step: int, loss: float) -> None:
        times.append(time.monotonic())
        losses.append(loss)

    metrics = train(settings, resume=False, on_step=on_step)
    first, last = len(times) // 2, len(times) - 2  # the last one's time has the validation in it
    if last <= first:
        sys.exit("Too few steps to time: give more text (mixed=...), or a smaller batch_tokens.")
    seconds = (times[last] - times[first]) / (last - first)
    samples = metrics["train_conversations"] / metrics["steps"] / seconds
    row = {"processes": metrics["processes"], "steps": metrics["steps"], "batch_tokens": settings.batch_tokens,
           "seconds_a_step": seconds, "samples_a_second": samples, "losses": losses}  # fmt: skip
    if Processes().is_main:
        write_report(row, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", help="default: 1, 2, 4, ... up to the number of GPUs")
    parser.add_argument("--shape", choices=list(SHAPES), default="135M", help="of the made-up base; tiny for CPUs")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="of molora train router")
    asked = parser.parse_args()
    settings: list[str] = asked.settings
    if asked.worker:
        work(load_settings(RouterTrainSettings, None, settings), asked.out)
        return
    gpus = torch.cuda.device_count()
    counts = asked.processes or [1 << power for power in range(gpus.bit_length())]
    if not counts or (gpus and max(counts) > gpus):
        sys.exit(f"There are {gpus} GPUs here: give --processes of them, or --shape tiny --processes 1 2 for CPUs.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as work_folder:
        folder = Path(work_folder)
        given = any(one.startswith("model=") for one in settings)
        made = [] if given else [*make(folder, asked.shape), *SIZES.get(asked.shape, LARGE)]
        rows = [launch(count, [*EQUAL, *made, *settings], folder) for count in counts]
    for row in rows:
        pairs = zip(row["losses"], rows[0]["losses"], strict=True)
        row["difference"] = max(abs(own - other) / abs(other) for own, other in pairs)
        row["faster"] = row["samples_a_second"] / rows[0]["samples_a_second"]
        print({name: value for name, value in row.items() if name != "losses"}, flush=True)
    command = shlex.join(["python", "-m", "benchmarks.several", *sys.argv[1:]])
    about = "made up" if not given else "as the settings say"
    write_report({**heading(command, about), "gpus": gpus, "settings": settings, "rows": rows}, asked.out)


if __name__ == "__main__":
    main()
