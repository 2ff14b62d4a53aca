"""A folder that holds, in miniature, all that the commands of the pages name: the base, adapters, a saved MoLoRA, data.

The base lies under the name that it has on the Hub, so that a command which says nothing about a base finds this one.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.base import DEFAULT_BASE
from molora.personalize.document_net import DocumentNet, DocumentNetConfig
from molora.personalize.pieces import PiecePool, PoolConfig
from molora.personalize.text_net import TextNet, TextNetConfig
from molora.serve.store import AdapterStore
from molora_training.continual.update import UpdateSettings, update
from molora_training.router import train as train_router
from molora_training.router_settings import RouterTrainSettings
from tests.conftest import SMALL, write_adapter

ROOT = Path(__file__).resolve().parents[2]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = {
    "math": "12 + 34 = 46, and 78 * 9 = 702.",
    "code": "def f(x): return x",
    "law": "Whereas the party of the first part",
    "shared": "first 1 + 2, then f(x)",
    "ada": "What about my knee?",
}
ROLES = ("user", "assistant")
LAYERS = 6  # the default router reads what enters the fifth


def build(folder: Path) -> None:
    """Writes all of it. The working folder has to be ``folder``: the base is found from there."""
    base = _base(folder)
    for seed, name in enumerate(("sage", "poet", "math", "code", "law", "ada", "shared", "law-v2")):
        write_adapter(base, folder / "adapters" / name, seed, r=2)
    for name in ("math", "code", "law"):
        shutil.copytree(folder / "adapters" / name, folder / name)
        shutil.copytree(folder / "adapters" / name, folder / "adapters" / "domain" / name)
        shutil.copytree(folder / "adapters" / name, folder / "domains" / name)
    shutil.copytree(folder / "adapters" / "ada", folder / "runs" / "ada-in-may")
    shutil.copytree(folder / "adapters" / "law-v2", folder / "more" / "law-2")
    _texts(folder)
    stack = Stack(
        [
            StackLayer("personality", {name: f"adapters/{name}" for name in ("sage", "poet")}, default=None),
            StackLayer("domain", {name: f"adapters/{name}" for name in ("math", "code")}),
            StackLayer("user", {"ada": "adapters/ada"}, shared=True, default=None),
        ]
    )
    stack.save(folder / "stack.yaml")
    Stack([StackLayer("domain", {"math": "adapters/math", "code": "adapters/code"})]).save(folder / "eight.yaml")
    torch.manual_seed(1)
    router = RouterConfig(reads=0, width=8, hidden=16)
    model = MoLoRAModel.from_base(DEFAULT_BASE, stack, router)
    model.save_pretrained(folder / "starter")
    few = {"mixed": 8, "documents": 0, "in_a_turn": 0, "asides": 0, "epochs": 1}
    train_router(
        RouterTrainSettings(folder / "starter", folder / "my-molora", data=folder / "data", router=router, **few)
    )
    shutil.copytree(folder / "my-molora", folder / "my-molora-2")  # before there are versions
    # Ada's adapter has learnt once, so there is a version to go back to, and something to forget.
    update(UpdateSettings(folder / "my-molora", "user", "ada", folder / "chats_of_may.jsonl", epochs=1))
    keyed = Stack([StackLayer("task", {}, keyed=True)])
    MoLoRAModel.from_base(DEFAULT_BASE, keyed).save_pretrained(folder / "my-tasks")
    _store(folder)
    sizes: dict[str, Any] = {"rank": 2, "width": 16, "latents": 3, "blocks": 2, "heads": 2, "chunk": 64}
    config = DocumentNetConfig.for_base(base, DEFAULT_BASE, modules=("down_proj", "q_proj"), **sizes)
    for name in ("document-net", "starter/hypernets/document"):
        DocumentNet(config).save(folder / name)
    for name in ("text-net", "profile-net", "starter/hypernets/profile"):
        TextNet(TextNetConfig.for_base(base, DEFAULT_BASE, 3, width=16, rank=2, encoder="words")).save(folder / name)
    _pool(base).save(folder / "pieces")
    configs = Path("training") / "molora_training" / "configs"
    shutil.copytree(ROOT / configs, folder / configs)


def encoder(name: str) -> Any:
    """Sentence embeddings that know three letters, in place of MiniLM's, which is a download."""
    return SimpleNamespace(
        name=name, encode=lambda texts: torch.tensor([[float(text.count(one)) for one in "abc"] for text in texts])
    )


def _base(folder: Path) -> Any:
    """A random Llama of six narrow layers, which reads bytes and knows ChatML's marks."""
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder / DEFAULT_BASE)
    sizes = {"vocab_size": 2048, "num_hidden_layers": LAYERS, "max_position_embeddings": 4096}
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, **sizes}, tie_word_embeddings=True)).eval()
    base.save_pretrained(folder / DEFAULT_BASE)
    return base


def _rows(name: str, file: str, split: str, count: int, user: str = "ada") -> str:
    """Conversations of an adapter's; no two files have one in common."""
    text = TEXTS[name]
    rows = []
    for number in range(count):
        turned = text[number % 7 :] + text[: number % 7]
        said = [{"role": "user", "content": f"{number:02} of {file}: {turned}"}, {"role": "assistant", "content": text}]
        about = {"id": f"{name}-{split}-{number}", "domain": name, "split": split, "user": user}
        rows.append(json.dumps({**about, "messages": said}))
    return "".join(row + "\n" for row in rows)


def _texts(folder: Path) -> None:
    """Conversations under every name that a page gives them, a question, a text, and documents."""
    (folder / "data").mkdir()
    for name in ("math", "code", "law"):
        for split in ("train", "validation", "test"):
            (folder / "data" / f"{name}.{split}.jsonl").write_text(_rows(name, "data", split, 12))
    shutil.copytree(folder / "data", folder / "cache" / "data")
    for name, file in {
        "ada": "new new-held-out new_chats chats_of_may chats ada", "law": "tariffs law", "math": "math general",
        "shared": "both held-out",
    }.items():  # fmt: skip
        for one in file.split():
            (folder / f"{one}.jsonl").write_text(_rows(name, one, "train", 24))
    talk = [("How do I prune my apple tree?", "Prune an apple tree in late winter. Cut dead branches first.")]
    turns = [{"role": role, "content": text} for pair in talk for role, text in zip(ROLES, pair, strict=True)]
    (folder / "chat.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (folder / "question.txt").write_text("What is 17 * 3?\n")
    (folder / "text.txt").write_text("First some algebra. Then a function.\n")
    (folder / "notes.md").write_text("# Notes\n\nThe lamp is green. It stands in the hall.\n")
    _pdf(folder / "report.pdf", "The lamp is green. It stands in the hall by the door.")
    for place in (folder, folder / "docs" / "results"):
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "docs" / "results" / "costs.json", place)


def _pdf(path: Path, line: str) -> None:
    writer = PdfWriter()
    page = writer.add_blank_page(width=300, height=300)
    font = DictionaryObject(
        {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
         NameObject("/BaseFont"): NameObject("/Helvetica")}
    )  # fmt: skip
    fonts = DictionaryObject({NameObject("/F1"): writer._add_object(font)})
    page[NameObject("/Resources")] = DictionaryObject({NameObject("/Font"): fonts})
    stream = DecodedStreamObject()
    stream.set_data(f"BT /F1 12 Tf 20 250 Td ({line}) Tj ET".encode())
    page[NameObject("/Contents")] = writer._add_object(stream)
    writer.write(path)


def _store(folder: Path) -> None:
    """A store in which two versions of Ada's adapter lie, and a router; the last one put serves."""
    store = AdapterStore(str(folder / "bucket" / "adapters"))
    store.put("user", "ada", folder / "adapters" / "sage")
    store.put("user", "ada", folder / "adapters" / "ada")
    store.put_router("main", folder / "my-molora")
    store.close()


def _pool(base: Any) -> PiecePool:
    modules = tuple(f"model.layers.{n}.self_attn.{name}" for n in range(LAYERS) for name in ("q_proj", "v_proj"))
    A, B, gates = {}, {}, {}
    for name in modules:
        linear = base.get_submodule(name)
        A[name] = torch.randn(3, 2, linear.in_features)
        B[name] = torch.randn(3, linear.out_features, 2)
        gates[name] = torch.randn(3, linear.in_features)
    return PiecePool(PoolConfig(DEFAULT_BASE, modules, 3, 2), A, B, gates)
