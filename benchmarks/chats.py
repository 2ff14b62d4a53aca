"""Chats at once through the engine, beside ``generate`` on the same prompts in one batch: tokens a second, in turns.

    python -m benchmarks.chats --chats 8

``generate`` knows all prompts beforehand and that all answers are equally long; the engine learns of each as it comes.
"""

import argparse
import json
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.made import watched
from molora import MoLoRAModel
from molora.bench import full_selection
from molora.serve.engine import Engine
from molora.serve.requests import Event, Finished, Request, Sampling
from molora.serve.warm import warm
from molora.starter import starter_folder
from molora_training.report import heading, line

QUESTIONS = (
    "How many minutes are there in three and a half days?",
    "Write a Python function that counts the vowels of a word.",
    "What does a fever of 39 degrees mean for a child of two?",
    "May my landlord enter my flat without telling me first?",
    "Розкажи коротко про Дніпро.",
    "What is 17 times 23, and how do you get there?",
    "Sort a list of dates in Python, the latest first.",
    "Which vitamin helps the body to take in calcium?",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chats", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64, help="of each answer")
    parser.add_argument("--times", type=int, default=5, help="of which the median counts")
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    device_map = "cuda" if torch.cuda.is_available() else None
    model = MoLoRAModel.from_pretrained(starter_folder(), dtype=torch.bfloat16, device_map=device_map)
    selection = full_selection(model)
    chats = [[{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}] for n in range(given.chats)]
    rows = [model.encode(chat)["input_ids"][0].tolist() for chat in chats]
    engine = Engine(model, rows=given.chats, longest=512)
    engine.start()
    warm(engine)
    kinds: dict[str, Any] = {
        "generate": lambda: batched(model, rows, selection, given.tokens),
        "engine": lambda: served(engine, rows, selection, given.tokens),
    }
    paces: dict[str, list[float]] = {name: [] for name in kinds}
    made: dict[str, list[dict[str, int]]] = {name: [] for name in kinds}
    for turn in range(given.times + 1):
        for name, run in kinds.items():
            with watched() as while_it_ran:
                begun = time.perf_counter()
                tokens = run()
                took = time.perf_counter() - begun
            if turn:
                paces[name].append(tokens / took)
                made[name].append(dict(while_it_ran))
    engine.close()
    median = {name: round(statistics.median(values), 2) for name, values in paces.items()}
    ratio = round(median["engine"] / median["generate"], 4)
    must = [line("tokens/s of the engine over batched generate's", ratio, 0.85, "higher")]
    found = {"tokens a second": median, "runs": paces, "made": made, "ratio": ratio, "must": must}
    print(json.dumps(found))
    if given.out:
        command = f"python -m benchmarks.chats --chats {given.chats} --tokens {given.tokens} --times {given.times}"
        about = heading(command, f"{given.chats} chats, answers of {given.tokens} tokens, the starter's stack")
        given.out.write_text(json.dumps({**about, "threads": torch.get_num_threads(), **found}, indent=1) + "\n")


def batched(model: MoLoRAModel, rows: list[list[int]], selection: Any, tokens: int) -> int:
    """Left-padded, as ``generate`` wants it."""
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=model.device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=model.device)
    found = model.generate(
        input_ids=ids, attention_mask=mask, selection=selection, max_new_tokens=tokens, min_new_tokens=tokens,
        do_sample=False,
    )  # fmt: skip
    return int((found.shape[1] - longest) * len(rows))


def served(engine: Engine, rows: list[list[int]], selection: Any, tokens: int) -> int:
    heard: queue.Queue[Event] = queue.Queue()
    for row in rows:
        engine.submit(Request(row, selection, Sampling(temperature=0, max_tokens=tokens), ends=False), heard.put)
    count, left = 0, len(rows)
    while left:
        event = heard.get()
        left -= isinstance(event, Finished)
        count += not isinstance(event, Finished)
    return count


if __name__ == "__main__":
    main()
