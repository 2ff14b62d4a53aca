"""A tiny random Llama, adapters that PEFT wrote, two routed stacks of them, and what our own generate says."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1")

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from peft import LoraConfig, get_peft_model

from molora import MoLoRAModel, Router, RouterConfig, Stack, StackLayer
from molora.selection import router_rows
from molora.vllm.export import export
from molora.vllm.folder import request

# The others run in the environment of `make vllm` alone.
if find_spec("vllm") is None:
    collect_ignore = [
        "test_pace.py",
        "test_plugin.py",
        "test_prefix.py",
        "test_serving.py",
        "test_engines.py",
        "test_server.py",
        "test_starter.py",
        "test_wrapper.py",
    ]
torch.set_num_threads(1)
TOKENS = 12
TOLERANCE = 1e-3
ADAPTERS: dict[str, dict[str, Any]] = {  # of different ranks, scales and modules
    "math": {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"},
    "code": {"r": 3, "lora_alpha": 6, "use_rslora": True, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "law": {"r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2}, "target_modules": ["q_proj", "o_proj", "up_proj"]},
    "ada": {"r": 2, "lora_alpha": 4, "target_modules": ["v_proj", "gate_proj"]},
    "bob": {"r": 2, "lora_alpha": 4, "target_modules": ["k_proj", "gate_proj"]},
}
ROUTERS = {
    "averages": RouterConfig(width=8, hidden=16, decays=(0.9, 0.98)),
    "gated": RouterConfig(width=8, hidden=16, units=12, weights="softmax"),
    "twice": RouterConfig(reads=(0, 1), width=8, hidden=16, decays=(0.9, 0.98)),  # the embedding and a hidden state
    "deep": RouterConfig(reads=2, width=8, hidden=16, units=12, weights="softmax"),
}
TOP = {"averages": 1, "gated": 2, "twice": 1, "deep": 2}


@dataclass
class Answer:
    """Greedy tokens, and the log-probability of each and of the five most probable."""

    tokens: list[int]
    logprobs: list[float]
    top: list[dict[int, float]]


SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 512, "initializer_range": 0.2,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "qwen3": lambda: transformers.Qwen3Config(**{**SMALL, "vocab_size": 97}, head_dim=32, tie_word_embeddings=True),
    "gemma3": lambda: transformers.Gemma3TextConfig(**{**SMALL, "hidden_size": 48}, head_dim=32, sliding_window=32),
    "granite": lambda: transformers.GraniteConfig(
        **{**SMALL, "vocab_size": 97}, embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0
    ),
}


def make_base(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    config = FAMILIES[family]()
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({f"w{n}": n for n in range(config.vocab_size)}, "w0"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"), "llama")


def load_base(base: Path) -> transformers.PreTrainedModel:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model.generation_config.eos_token_id = None  # every answer has as many tokens
    return model


def write_adapter(base: Path, folder: Path, seed: int, settings: Mapping[str, Any]) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(copy.deepcopy(load_base(base)), LoraConfig(task_type="CAUSAL_LM", **settings))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(folder)
    return folder


def make_adapters(base: Path, place: Path) -> dict[str, Path]:
    return {
        name: write_adapter(base, place / name, seed, settings)
        for seed, (name, settings) in enumerate(ADAPTERS.items(), 1)
    }


@pytest.fixture(scope="session")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_adapters(base, tmp_path_factory.mktemp("adapters"))


def decided(config: RouterConfig, stack: Stack, base: transformers.PreTrainedModel) -> Router:
    """A random router whose routes change from token to token."""
    with torch.no_grad():
        ids = torch.tensor([prompt_of(500, 6, base.config.vocab_size)])
        states = base(input_ids=ids, output_hidden_states=True).hidden_states
    torch.manual_seed(7)
    router = Router(config, router_rows(stack), base.config.hidden_size)
    for part in router.parts:
        read = base.get_input_embeddings().weight.detach() if part.reads == 0 else states[part.reads][0]
        part.mean.copy_(read.mean(0))
        part.std.copy_(read.std(0))
        for weight in (part.input.weight, part.output.weight, *(gate.weight for gate in part.gates)):
            torch.nn.init.normal_(weight, std=3 / weight.shape[1] ** 0.5)
        with torch.no_grad():
            part.input.weight[:, config.width :] *= 6  # what it remembers must weigh as much as what it reads
        for gate in part.gates:
            torch.nn.init.zeros_(gate.bias)
    return router.eval()


def make_models(base: Path, adapters: Mapping[str, Path]) -> dict[str, MoLoRAModel]:
    found = {}
    for kind, config in ROUTERS.items():
        stack = Stack(
            [
                StackLayer("personality", {"law": adapters["law"]}, default=None),
                StackLayer("domain", {name: adapters[name] for name in ("math", "code")}, top_k=TOP[kind]),
                StackLayer("user", {name: adapters[name] for name in ("ada", "bob")}, shared=True),
            ]
        )
        own = load_base(base)
        found[kind] = MoLoRAModel.from_base(own, stack, decided(config, stack, own))
    return found


@pytest.fixture(scope="session")
def models(base: Path, adapters: dict[str, Path]) -> dict[str, MoLoRAModel]:
    return make_models(base, adapters)


def make_folders(models: Mapping[str, MoLoRAModel], place: Path) -> dict[str, Path]:
    """The stacks for vLLM; "forced": the first with a personality at every token."""
    for kind, model in models.items():
        model.save_pretrained(place / "saved" / kind)
    found = {kind: export(place / "saved" / kind, place) for kind in models}
    found["forced"] = export(place / "saved" / "averages", place, SELECTIONS["forced"])
    return found


@pytest.fixture(scope="session")
def folders(models: dict[str, MoLoRAModel], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return make_folders(models, tmp_path_factory.mktemp("exported"))


SELECTIONS: dict[str, Any] = {
    "averages": {},
    "gated": {},
    "twice": {},
    "deep": {},
    "forced": {"personality": "law"},
    "code": {"domain": "code"},
    "base": {"domain": None},
}


class Served:
    """vLLM with what it may be asked: the kinds of SELECTIONS."""

    def __init__(self, base: Path, folders: Mapping[str, Path], adapters: Mapping[str, Path], **options: Any) -> None:
        from vllm import LLM
        from vllm.lora.request import LoRARequest

        defaults: dict[str, Any] = dict(  # noqa: C408
            model=str(base), skip_tokenizer_init=True, dtype="float32", enforce_eager=True, enable_lora=True,
            max_lora_rank=32, max_loras=6, max_cpu_loras=6, max_model_len=400, max_num_seqs=8, block_size=32,
            num_gpu_blocks_override=200, seed=0, disable_log_stats=True,
        )  # fmt: skip
        self.llm = LLM(**{**defaults, **options})
        self.requests: dict[str, Any] = {kind: request(folder) for kind, folder in folders.items()}
        self.requests["code"] = LoRARequest("code", 1, str(adapters["code"]))
        self.requests["base"] = None

    def ask(
        self, kinds: Sequence[str], prompts: Sequence[Sequence[int]], selections: Sequence[Any] | None = None
    ) -> tuple[list[Answer], list[int]]:
        """Answers, and how many tokens of each prompt came from the prefix cache."""
        from vllm import SamplingParams

        outputs = self.llm.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [
                SamplingParams(
                    temperature=0,
                    max_tokens=TOKENS,
                    logprobs=5,
                    ignore_eos=True,
                    detokenize=False,
                    extra_args=None if own is None else {"molora": own},
                )
                for own in selections or [None] * len(prompts)
            ],
            lora_request=[self.requests[kind] for kind in kinds],
            use_tqdm=False,
        )
        answers = []
        for output in outputs:
            own = output.outputs[0]
            top = [{token: entry.logprob for token, entry in place.items()} for place in own.logprobs]
            tokens = list(own.token_ids)
            answers.append(Answer(tokens, [place[token] for place, token in zip(top, tokens, strict=True)], top))
        return answers, [output.num_cached_tokens or 0 for output in outputs]


@pytest.fixture(scope="session")
def served(base: Path, folders: dict[str, Path], adapters: dict[str, Path]) -> Served:
    """With the prefix cache, and prompts that are read 48 tokens at a time."""
    return Served(base, folders, adapters, enable_prefix_caching=True, max_num_batched_tokens=48)


def expected(models: Mapping[str, MoLoRAModel], kind: str, prompt: Sequence[int], selection: Any = None) -> Answer:
    """What our own generate says."""
    model = models.get(kind) or next(iter(models.values()))
    selection = SELECTIONS.get(kind, {}) if selection is None else selection
    ids = torch.tensor([list(prompt)])
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), selection=selection, max_new_tokens=TOKENS,
        do_sample=False, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    tokens = out.sequences[0, len(prompt) :].tolist()
    log = [logits[0].float().log_softmax(0) for logits in out.logits]
    top = [{int(token): float(place[token]) for token in place.topk(5).indices} for place in log]
    return Answer(tokens, [float(place[token]) for place, token in zip(log, tokens, strict=True)], top)


def check(answer: Answer, wanted: Answer) -> float:
    """Equal tokens, near log-probabilities; the largest difference."""
    assert answer.tokens == wanted.tokens
    differences = [abs(a - b) for a, b in zip(answer.logprobs, wanted.logprobs, strict=True)]
    for here, there in zip(answer.top, wanted.top, strict=True):
        differences += [abs(here[token] - value) for token, value in there.items()]
    assert max(differences) < TOLERANCE
    return max(differences)


def prompt_of(length: int, seed: int, vocabulary: int = 128) -> list[int]:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
