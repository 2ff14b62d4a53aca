"""One engine of vLLM in a process of its own, for benchmarks.vllm_pace: what it is asked to measure comes as JSON.

python -m benchmarks.vllm_engine job.json found.json
"""

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch  # whose CUDA stays untouched here: workers may be forked
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from molora.vllm.folder import MANIFEST, request


class Engine:
    """vLLM under a job: base (folder), dtype, eager, tensor_parallel, rank (the largest), loras (folders by name),
    vocabulary, rows (at once), longest (of a sequence in tokens), cpu (whether it runs on one)."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        cpu = {"block_size": 32, "num_gpu_blocks_override": 400} if job["cpu"] else {}
        self.llm = LLM(
            model=job["base"], skip_tokenizer_init=True, dtype=job["dtype"], enforce_eager=job["eager"],
            enable_lora=True, max_lora_rank=job["rank"], max_loras=len(job["loras"]), max_cpu_loras=len(job["loras"]),
            tensor_parallel_size=job["tensor_parallel"], max_model_len=job["longest"], max_num_seqs=job["rows"],
            enable_prefix_caching=True, gpu_memory_utilization=0.6, seed=0, disable_log_stats=True, **cpu,
        )  # fmt: skip
        self.requests: dict[str, Any] = {"base": None}
        for number, (name, folder) in enumerate(job["loras"].items(), 1):
            routed = (Path(folder) / MANIFEST).is_file()
            self.requests[name] = request(folder) if routed else LoRARequest(name, number, folder)
            self.llm.llm_engine.add_lora(self.requests[name])

    def ask(self, kinds: list[str], prompts: list[list[int]], tokens: int, logprobs: int | None = None) -> list[Any]:
        """Greedy answers of so many ``tokens``."""
        params = SamplingParams(temperature=0, max_tokens=tokens, logprobs=logprobs, ignore_eos=True, detokenize=False)
        given = [{"prompt_token_ids": prompt} for prompt in prompts]
        return self.llm.generate(given, params, lora_request=[self.requests[kind] for kind in kinds], use_tqdm=False)

    def pace(self, kinds: list[str], batches: list[int], prompt: int, answer: int, rounds: int) -> list[dict[str, Any]]:
        """Tokens of answers a second, prompts read within, the kinds taken in turn; no prompt comes twice, so that the
        prefix cache has none. The first round is not counted."""
        rows = []
        for batch in batches:
            seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in range(rounds + 1):
                for place, kind in enumerate(kinds):
                    asked = prompts_of(batch, prompt, self.job["vocabulary"], (batch, turn, place))
                    start = time.perf_counter()
                    self.ask([kind] * batch, asked, answer)
                    if turn:
                        seconds[kind].append(time.perf_counter() - start)
            for kind, found in seconds.items():
                paces = sorted(batch * answer / one for one in found)
                rows.append({"kind": kind, "batch": batch, "tokens a second": statistics.median(paces), "all": paces})
                print(json.dumps(rows[-1]), flush=True)
        return rows

    def answers(self, prompt: int, answer: int, each: int) -> list[dict[str, Any]]:
        """Of ``each`` prompts for every kind, all in one batch: the tokens and their log-probabilities."""
        kinds = [kind for kind in self.requests for _ in range(each)]
        asked = prompts_of(each, prompt, self.job["vocabulary"], (1,)) * len(self.requests)
        found = []
        for kind, ids, output in zip(kinds, asked, self.ask(kinds, asked, answer, logprobs=0), strict=True):
            own = output.outputs[0]
            tokens = list(own.token_ids)
            logs = [place[token].logprob for place, token in zip(own.logprobs, tokens, strict=True)]
            found.append({"kind": kind, "prompt": ids, "tokens": tokens, "logprobs": logs})
        return found

    def shared(self, prompt: int) -> dict[str, list[int]]:
        """Tokens that each kind finds in the prefix cache when all are asked one prompt, and when they are again."""
        (ids,) = prompts_of(1, prompt, self.job["vocabulary"], (2,))
        return {
            when: [self.ask([kind], [ids], 1)[0].num_cached_tokens or 0 for kind in self.requests]
            for when in ("first", "again")
        }


def prompts_of(count: int, length: int, vocabulary: int, seed: tuple[int, ...]) -> list[list[int]]:
    number = sum(part * 1000**place for place, part in enumerate(seed, 1))
    chance = torch.Generator().manual_seed(number)
    found: list[list[int]] = torch.randint(3, vocabulary, (count, length), generator=chance).tolist()
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    engine = Engine(job)
    found = {name: getattr(engine, name)(**asked) for name, asked in job["measure"].items()}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
