"""All ways to an adapter in one layer: a document, a profile, pieces, anchors, a description and what was talked about
stand side by side, and the router decides by token which of them acts."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer
from molora.adapter import Adapter
from molora.cli import app
from molora.personalize import embeddings
from molora.personalize.text_net import TextNet, TextNetConfig
from molora_training import pieces
from tests.conftest import write_adapter
from tests.training.test_pieces_trainer import PEOPLE, by_colour
from tests.unit.spoken import balance, make_spoken, save_spoken
from tests.unit.test_internalize import make_net

MADE = ("report", "ada", "zoe", "max", "pirate", "talk")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    spoken = make_spoken(tmp_path / "adapters")
    save_spoken(spoken, tmp_path)
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    plain = MoLoRAModel.from_base(
        str(tmp_path / "base"),
        Stack(
            [
                StackLayer("domain", {"math": tmp_path / "adapters/math"}),
                StackLayer("user", {"talk": write_adapter(base, tmp_path / "talk", 7, target_modules=["q_proj"])}),
            ]
        ),
        RouterConfig(width=8, hidden=16),
        tokenizer=spoken.tokenizer,
    )
    plain.base_name = str(tmp_path / "base")
    plain.save_pretrained(tmp_path / "stacked")
    documents = make_net(base)
    object.__setattr__(documents.config, "base", str(tmp_path / "base"))
    documents.save(tmp_path / "documents")
    texts = TextNet(TextNetConfig.for_base(base, str(tmp_path / "base"), 2, width=16, rank=2))
    for parameter in texts.parameters():
        nn.init.normal_(parameter, std=0.2)
    texts.save(tmp_path / "texts")
    monkeypatch.setattr(pieces, "read_people", lambda name, folder: PEOPLE)
    pool = pieces.PiecesSettings(
        out=tmp_path / "pool", people="any", data=tmp_path, base=str(tmp_path / "base"), sharers=2, rank=2,
        targets=("q_proj", "o_proj"), learning_rate=1e-1, dtype="float32",
    )  # fmt: skip
    pieces.train(pool, by_colour, encoder_name="colours")
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name, *_: SimpleNamespace(encode=by_colour, name=name))
    return tmp_path / "stacked"


def said(folder: Path, user: str) -> str:
    turns = [
        {"role": "user", "content": "Which colour has the garden gate?"},
        {"role": "assistant", "content": "The garden gate is blue, and the fence beside it too."},
    ]
    file = folder / f"{user}.jsonl"
    file.write_text(json.dumps({"messages": turns, "user": user}) + "\n")
    return str(file)


def fill(place: Path, tmp_path: Path) -> None:
    """Every command once, into the layer "user"."""
    (tmp_path / "report.md").write_text("The lamp is green. It stands in the hall. " * 4)
    model, net = ["--model", str(place)], ["--hypernet", str(tmp_path / "texts")]
    pool = ["--pool", str(tmp_path / "pool")]
    for line in (
        ["internalize", str(tmp_path / "report.md"), "--as", "user/report", "--hypernet", str(tmp_path / "documents")],
        ["profile", "user", "ada", "--history", said(tmp_path, "ada"), *net],
        ["assemble", "user", "zoe", "--history", said(tmp_path, "zoe"), *pool],
        ["assemble", "user", "max", "--history", said(tmp_path, "max"), *pool, "--way", "anchors", "--on-top", "1"],
        ["describe", "talks like a blue pirate", "--as", "user/pirate", *net],
        ["learn", "user", "talk", "--conversation", said(tmp_path, "talk")],
    ):
        app([*line, *model], standalone_mode=False)


def by_hand(model: MoLoRAModel, folder: Path, ids: torch.Tensor, routes: Any) -> torch.Tensor:
    """The logits of the base alone with each token's adapters added in the plainest way."""
    base = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def add(shares: dict[str, torch.Tensor], name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
            for label, share in shares.items():
                weights = Adapter.load(model.adapters[label].path).modules.get(name)
                if weights is not None:
                    delta = weights.scale * inputs[0] @ weights.A.float().T @ weights.B.float().T
                    y = y + share[None, :, None] * delta
            return y

        return hook

    shares: dict[str, torch.Tensor] = {}
    for row in routes.dropna().itertuples():
        shares.setdefault(f"{row.layer}/{row.adapter}", torch.zeros(ids.shape[1]))[row.token] = row.weight
    for name, module in base.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(add(shares, name))
    logits: torch.Tensor = base(ids).logits
    return logits


def test_they_act_together_token_by_token(place: Path, tmp_path: Path) -> None:
    fill(place, tmp_path)
    with torch.no_grad():
        check(place, tmp_path)


def check(place: Path, tmp_path: Path) -> None:
    model = MoLoRAModel.from_pretrained(place, dtype=torch.float32).eval()
    assert set(model.stack["user"].adapters) == set(MADE)
    for part in model.router.parts:  # type: ignore[union-attr]
        part.std.fill_(0.05)
        nn.init.normal_(part.output.weight, std=4.0)
    ids = torch.arange(5, 261).view(1, -1)
    balance(model, ids)
    selection = {"domain": "math", "user": list(MADE)}
    out = model(ids, selection=selection, output_routes=True)
    routes = out.routes.to_frame()
    assert set(routes[routes.layer == "domain"].adapter) == {"math"}
    assert set(routes[routes.layer == "user"].adapter.dropna()) == set(MADE)  # each for some tokens
    wanted = by_hand(model, tmp_path / "base", ids, routes)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-4, atol=1e-4)
    prompt = ids[:, :40]
    written = model.generate(prompt, max_new_tokens=6, do_sample=False, selection=selection)
    again = model(written[:, :-1], selection=selection).logits[0, 39:].argmax(-1)
    assert again.tolist() == written[0, 40:].tolist()
