"""A server under long load: is every answer right and whole, and does anything grow?

    python -m benchmarks.soak --requests 50000

A tiny model with random weights behind the whole server (HTTP, engine, pool, store): users ask in turn with adapters of
their own, far more than are live at once; some leave before their answer has ended, some ask for who is not there. Each
answer is compared with what the model itself says with that adapter. The accelerated stand-in for a day.
"""

import argparse
import asyncio
import gc
import json
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import torch
import transformers
import uvicorn
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.checks import linear_sizes
from molora.factors import write_factors
from molora.serve.app import build_app
from molora.serve.engine import Engine
from molora.serve.pool import Pool
from molora.serve.store import AdapterStore
from molora_training.report import heading, line

PROMPTS, TOKENS, GROWTH = 8, 8, 0.02


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--users", type=int, default=64)
    parser.add_argument("--live", type=int, default=8, help="adapters at once")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--at-once", type=int, default=16, help="requests under way")
    parser.add_argument("--port", type=int, default=8391)
    parser.add_argument("--out", type=Path, help="where the figures go, too")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        model, store = make_model(), AdapterStore(Path(scratch) / "store")
        right = answers(model, store, Path(scratch), given.users)
        pool = Pool(model, "user", store.finder("user"), most=given.live)
        engine = Engine(model, rows=given.rows, longest=64, pools=[pool])
        server = uvicorn.Server(uvicorn.Config(build_app(engine, store=store), port=given.port, log_level="error"))
        thread = threading.Thread(target=server.run, daemon=True)
        engine.start()
        thread.start()
        while not server.started:
            time.sleep(0.05)
        found = asyncio.run(ask_all(given, right))
        server.should_exit = True
        thread.join()
        engine.close()
        found["swaps"] = pool.stats().host_hits
        store.close()
    found["must"] = [
        line("wrong or lost answers", found["wrong"] + found["lost"], 0, "lower"),
        line("growth of memory after the first tenth", found["memory"]["growth"], GROWTH, "lower"),
        line("file handles more than after the first tenth", found["handles"]["growth"], 0, "lower"),
    ]
    print(json.dumps(found, indent=1))
    if given.out:
        command = f"python -m benchmarks.soak --requests {given.requests} --users {given.users} --live {given.live}"
        about = heading(command, f"{given.users} random adapters, answers of {TOKENS} tokens")
        given.out.write_text(json.dumps({**about, **found}, indent=1) + "\n", encoding="utf-8")


def make_model() -> MoLoRAModel:
    """A tiny Llama over bytes with a random router over two adapters, and a layer for users."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=261, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    base = transformers.LlamaForCausalLM(config).eval()
    base.generation_config.eos_token_id = None
    special = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=words, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>")
    stack = Stack([StackLayer("user", {}, default=None, shared=True)])
    return MoLoRAModel.from_base(base, stack, RouterConfig(width=8, hidden=16), tokenizer=fast).eval()


def answers(model: MoLoRAModel, store: AdapterStore, scratch: Path, users: int) -> dict[tuple[int, int], str]:
    """By user and prompt, what the model says with the user's adapter, which is put into the store."""
    sizes = linear_sizes(model.base)
    found = {}
    for user in range(users):
        chance = torch.Generator().manual_seed(user)
        factors = {
            name: (0.4 * torch.randn(4, inside, generator=chance), 0.4 * torch.randn(outside, 4, generator=chance))
            for name, (inside, outside) in sizes.items()
            if "layers." in name
        }
        folder = scratch / f"u{user}"
        write_factors(folder, factors, "tiny")
        store.put("user", f"u{user}", folder)
        model.add_adapter("user", "now", folder)
        for prompt in range(PROMPTS):
            ids = model.encode(text(prompt))["input_ids"]
            said = model.generate(input_ids=ids, selection={"user": "now"}, max_new_tokens=TOKENS, do_sample=False)
            found[user, prompt] = str(model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True))
        model.remove_adapter("user", "now")
    return found


def text(prompt: int) -> str:
    return "abcdefgh"[prompt] * (3 + 2 * prompt)


async def ask_all(given: Any, right: dict[tuple[int, int], str]) -> dict[str, Any]:
    """Asks, and looks at memory and file handles on the way."""
    chance, process = random.Random(0), psutil.Process()
    counts = {"right": 0, "wrong": 0, "lost": 0, "left": 0, "refused": 0}
    looked: list[tuple[int, int, int]] = []
    begun, done = time.perf_counter(), 0
    url = f"http://127.0.0.1:{given.port}/v1/completions"
    work = iter(range(given.requests))

    async def one(client: httpx.AsyncClient) -> str:
        user, prompt, kind = chance.randrange(given.users), chance.randrange(PROMPTS), chance.random()
        asked: dict[str, Any] = {"prompt": text(prompt), "max_tokens": TOKENS, "temperature": 0}
        if kind < 0.02:
            refused = await client.post(url, json={**asked, "model": "base+user/nobody"})
            return "refused" if refused.status_code == 404 else "lost"
        asked["model"] = f"base+user/u{user}"
        if kind < 0.07:  # leaves after the first chunk
            async with client.stream("POST", url, json={**asked, "stream": True}) as stream:
                async for _ in stream.aiter_lines():
                    break
            return "left"
        answer = await client.post(url, json=asked)
        if answer.status_code != 200:
            return "lost"
        return "right" if answer.json()["choices"][0]["text"] == right[user, prompt] else "wrong"

    async def asker() -> None:
        nonlocal done
        async with httpx.AsyncClient(timeout=120) as client:
            for _ in work:
                counts[await one(client)] += 1
                done += 1
                if done % max(1, given.requests // 50) == 0:
                    gc.collect()
                    looked.append((done, process.memory_info().rss, process.num_fds()))
                    print(done, looked[-1][1] >> 20, "MiB", looked[-1][2], "handles", flush=True)

    await asyncio.gather(*(asker() for _ in range(given.at_once)))
    early = [one for one in looked if one[0] >= given.requests / 10]
    half = len(early) // 2
    first, last = max(one[1] for one in early[:half]), max(one[1] for one in early[half:])
    return {
        "requests": given.requests,
        "seconds": round(time.perf_counter() - begun, 1),
        **counts,
        "memory": {"MiB": [one[1] >> 20 for one in looked], "growth": round(max(0.0, last / first - 1), 4)},
        "handles": {
            "count": [one[2] for one in looked],
            "growth": max(one[2] for one in early[half:]) - max(one[2] for one in early[:half]),
        },
    }


if __name__ == "__main__":
    main()
