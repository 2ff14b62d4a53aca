"""Training of the network from a text to an adapter, on a tiny random model: it tells groups apart by their texts."""

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from molora.adapter import Adapter
from molora.base import load_base
from molora.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, DataError, NonFiniteError
from molora.personalize.from_text import adapters_from_texts
from molora.personalize.generated import generated
from molora.personalize.text_net import WEIGHTS_FILE, TextNet
from molora_training.data import IGNORED
from molora_training.hypernet import text as trainer
from molora_training.hypernet.loop import LoopSettings
from molora_training.hypernet.text import train
from molora_training.hypernet.text_groups import Group, draw, judged, read_groups
from molora_training.hypernet.text_settings import GroupFiles, NetShape, TextHypernetSettings
from molora_training.processes import Processes
from molora_training.settings import load_settings
from tests.conftest import write_adapter
from tests.unit.spoken import make_spoken

SIZE = 8
GROUPS = {"ann": "agrees", "bob": "refuses", "cy": "agrees", "dee": "refuses"}
SAYS = {"agrees": "yes", "refuses": "no"}


def encoder(texts: list[str]) -> torch.Tensor:
    """Two far directions for what the texts say, and a little of their own."""
    found = []
    for text in texts:
        own = torch.randn(SIZE, generator=torch.Generator().manual_seed(sum(text.encode()))) * 0.1
        own[0] += 1.0 if "agrees" in text else -1.0
        found.append(own)
    return torch.nn.functional.normalize(torch.stack(found), dim=1)


def write_group(folder: Path, name: str, answer: str, texts: list[str], count: int = 6) -> None:
    for split, numbers in (("train", range(count)), ("validation", range(count, count + 3))):
        rows = [
            {
                "id": f"{name}-{number}",
                "domain": name,
                "split": split,
                "messages": [
                    {"role": "user", "content": f"{number}?"},
                    {"role": "assistant", "content": answer},
                ],
            }
            for number in numbers
        ]
        (folder / f"{name}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / f"{name}.texts.json").write_text(json.dumps(texts))


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TextHypernetSettings:
    monkeypatch.chdir(tmp_path)
    return make_settings(tmp_path)


def make_settings(folder: Path) -> TextHypernetSettings:
    """Four people, of whom two agree to everything and two refuse; one of each is held out."""
    model = make_spoken(folder / "adapters")
    # A random head is so small that no hidden state makes a token likely.
    torch.nn.init.normal_(model.base.get_output_embeddings().weight, std=0.5)
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")  # type: ignore[union-attr]
    data = folder / "data"
    data.mkdir()
    for name, manner in GROUPS.items():
        write_group(data, name, SAYS[manner], [f"{name} {manner}", f"{manner}, {name} does"])
    return TextHypernetSettings(
        out=folder / "nets" / "out",
        data=GroupFiles(folder=data, held_out=("cy", "dee"), source="made here", licence="CC0-1.0"),
        loop=LoopSettings(steps=6, learning_rate=1e-2, checkpoint_every=3),
        net=NetShape(width=16, rank=4, targets="all-linear", dropout=0.1),
        base=str(folder / "base"),
        encoder="made here",
        groups=4,
        conversations=2,
        dtype="float32",
    )


def longer(settings: TextHypernetSettings, steps: int, **changes: Any) -> TextHypernetSettings:
    return dataclasses.replace(
        settings, loop=dataclasses.replace(settings.loop, steps=steps, checkpoint_every=steps), **changes
    )


@pytest.mark.parametrize("head", ["L", "M"])
def test_it_learns_what_a_text_means(settings: TextHypernetSettings, head: Any) -> None:
    settings = longer(settings, 60, net=dataclasses.replace(settings.net, head=head))
    before = load_file(Path(settings.base) / "model.safetensors")
    metrics = train(settings, command="molora train hypernet text", encoder=encoder)
    found = metrics["validation"]
    for name in ("trained", "held_out"):  # new people too, by what their texts say
        assert found[f"{name}/right"] < found[f"{name}/shuffled"] - 1.0
        assert found[f"{name}/right"] < found[f"{name}/random"] - 0.2
        assert found[f"{name}/right"] < found[f"{name}/none"] - 2.0
    kept = json.loads((settings.out / "metrics.json").read_text())
    assert kept["validation"] == found and kept["settings"]["data"]["folder"] == "data"
    assert (kept["trained_groups"], kept["held_out_groups"], kept["train_conversations"]) == (2, 2, 12)
    card = (settings.out / "README.md").read_text()
    assert "CC0-1.0" in card and "molora train hypernet text" in card and f"{found['held_out/right']:.4f}" in card
    assert str(settings.out.parent) not in card + json.dumps(kept["settings"] | {"base": ""})
    with safe_open(settings.out / WEIGHTS_FILE, "pt") as weights:
        kinds = {name: weights.get_tensor(name).dtype for name in weights.keys()}
    assert {kinds.pop(name) for name in ("mean", "spread")} == {torch.float32}
    assert set(kinds.values()) == {torch.bfloat16}
    assert sorted(path.name for path in settings.out.parent.iterdir()) == ["out"]
    assert not list(settings.work.glob("*.safetensors"))
    base = AutoModelForCausalLM.from_pretrained(settings.base)
    net = TextNet.load(settings.out, base, settings.base)
    assert all(torch.equal(value, base.state_dict()[name]) for name, value in before.items())
    folders = [settings.out.parent / "users" / name for name in ("new", "other")]
    adapters_from_texts(net, encoder, ["eve agrees", "fay refuses"], folders, settings.base)
    Adapter.load(folders[0])


def test_resumed_equals_uninterrupted(settings: TextHypernetSettings) -> None:
    whole = train(dataclasses.replace(settings, out=settings.out.with_name("whole")), encoder=encoder)

    def interrupt(step: int, loss: float) -> None:
        if step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_step=interrupt, encoder=encoder)
    assert not settings.out.exists()
    seen: list[int] = []
    resumed = train(settings, on_step=lambda step, loss: seen.append(step), encoder=encoder)
    assert seen == [4, 5, 6]  # the last checkpoint was at step 3
    assert resumed["train_losses"] == whole["train_losses"] and resumed["validations"] == whole["validations"]
    ours, theirs = (load_file(folder / WEIGHTS_FILE) for folder in (settings.out, settings.out.with_name("whole")))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("held_out", [("cy", "dee"), ()], ids=["some held out", "nobody"])
def test_what_those_held_out_say_decides_where_there_are_some(
    settings: TextHypernetSettings, held_out: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = iter((0.0, 1.0))  # of those held out; what is learnt from gets better
    figures = {"held_out/shuffled": 0.0, "trained/shuffled": 0.0}
    monkeypatch.setattr(
        trainer._Run,
        "validate",
        lambda _: {**figures, "held_out/right": (value := next(worse)), "trained/right": 1.0 - value},
    )
    data = dataclasses.replace(settings.data, held_out=held_out)
    found = train(dataclasses.replace(settings, data=data), encoder=encoder)
    assert found["best_step"] == (3 if held_out else 6)


def test_the_loss_is_a_mean_over_all_answer_tokens_of_a_step(settings: TextHypernetSettings) -> None:
    write_group(settings.data.folder, "bob", "a much longer refusal than that", ["bob refuses", "he refuses"])
    settings = dataclasses.replace(settings, net=dataclasses.replace(settings.net, dropout=0.0))
    base, tokenizer = load_base(settings.base, dtype=torch.float32)
    base.requires_grad_(False)
    groups = read_groups(settings.data, tokenizer, encoder)
    run = trainer._Run(settings, base, 0, groups, Processes())
    for parameter in (*run.net.heads.values(), *run.net.bias_B.values()):
        torch.nn.init.normal_(parameter, std=0.1)
    found = run.loss(0)["loss"]
    drawn = draw(groups.trained, settings.groups, settings.conversations, random.Random("0/0"))
    total, count = torch.zeros(()), 0
    for group, embedding, rows in drawn:
        assert any(torch.equal(embedding, one) for one in group.embeddings)
        with torch.no_grad(), generated(base, run.net(embedding[None])):
            for row in rows:
                wanted = row.labels[1:]
                logits = base(row.input_ids[None]).logits[0, :-1]
                total = total + torch.nn.functional.cross_entropy(logits, wanted, reduction="sum")
                count += int((wanted != IGNORED).sum())
    torch.testing.assert_close(found, total / count, rtol=1e-4, atol=1e-5)


def test_a_base_in_bfloat16(settings: TextHypernetSettings) -> None:
    metrics = train(longer(settings, 20, dtype="bfloat16"), encoder=encoder)
    found = metrics["validation"]
    assert found["held_out/right"] < found["held_out/shuffled"] - 1.0


def test_a_checkpoint_of_other_settings_is_refused(settings: TextHypernetSettings) -> None:
    def interrupt(step: int, loss: float) -> None:
        if step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_step=interrupt, encoder=encoder)
    write_group(settings.data.folder, "ann", "never", ["ann agrees"])
    with pytest.raises(ConfigError, match="other settings or data"):
        train(settings, encoder=encoder)
    assert train(settings, resume=False, encoder=encoder)["steps"] == 6


def test_a_loss_that_is_not_finite_stops(settings: TextHypernetSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = trainer._Run.loss

    def broken(self: Any, step: int) -> dict[str, torch.Tensor]:
        terms = honest(self, step)
        return {"loss": terms["loss"] * (math.nan if step == 4 else 1)}

    monkeypatch.setattr(trainer._Run, "loss", broken)
    with pytest.raises(NonFiniteError, match="became nan at step 5"):
        train(settings, encoder=encoder)
    assert not settings.out.exists()
    state = load_file(settings.work / "state.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())
    monkeypatch.undo()
    monkeypatch.chdir(settings.out.parents[1])
    assert train(settings, encoder=encoder)["steps"] == 6


def test_it_reconstructs_adapters(settings: TextHypernetSettings, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(settings.base)
    for seed, name in enumerate(("ann", "bob")):
        write_adapter(base, tmp_path / "given" / name, seed, r=4, lora_alpha=6)
    settings = longer(
        settings, 300, way="reconstruct", adapters=tmp_path / "given",
        net=dataclasses.replace(settings.net, dropout=0.0),
    )  # fmt: skip
    metrics = train(settings, encoder=encoder)
    assert metrics["train_losses"][-1] < 0.1 * metrics["train_losses"][0]
    net = TextNet.load(settings.out)
    factors = net(encoder(["ann agrees", "bob refuses"]))
    for n, name in enumerate(("ann", "bob")):
        for module, given in Adapter.load(tmp_path / "given" / name).modules.items():
            A, B = factors[module]
            assert (B[n] - given.B * given.scale).norm() < 0.5 * (B[1 - n] - given.B * given.scale).norm()
            assert (A[n] - given.A).norm() < 0.5 * given.A.norm()
    with pytest.raises(AdapterMismatchError, match=r"ann cannot be reconstructed"):
        train(dataclasses.replace(settings, net=NetShape(width=16, rank=2)), resume=False, encoder=encoder)
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        train(dataclasses.replace(settings, adapters=tmp_path / "nowhere"), resume=False, encoder=encoder)
    with pytest.raises(ConfigError, match="give both, or neither"):
        dataclasses.replace(settings, way="learn")


def test_groups_are_drawn_by_the_root_of_their_size() -> None:
    sizes = {"small": 1, "large": 9}
    groups: list[Any] = [Group(name, [name] * size, [], torch.eye(2)) for name, size in sizes.items()]  # type: ignore
    found = [entry for seed in range(400) for entry in draw(groups, 5, 4, random.Random(seed))]
    share = sum(group.name == "large" for group, _, _ in found) / len(found)
    assert share == pytest.approx(3 / 4, abs=0.03)
    assert {len(rows) for group, _, rows in found if group.name == "large"} == {4}
    assert {len(rows) for group, _, rows in found if group.name == "small"} == {1}
    assert {tuple(embedding.tolist()) for _, embedding, _ in found} == {(1.0, 0.0), (0.0, 1.0)}


def test_controls_have_texts_that_are_wrong(settings: TextHypernetSettings) -> None:
    tokenizer = make_spoken(settings.data.folder.parent / "again").tokenizer
    groups = read_groups(dataclasses.replace(settings.data, validate=2), tokenizer, encoder)
    found = judged(groups, groups.held_out, seed=0)
    assert [group.name for group in groups.held_out] == ["cy", "dee"] and len(found.rows) == 4
    right, shuffled, noise = (found.embeddings[name] for name in ("right", "shuffled", "random"))
    assert right is not None and shuffled is not None and noise is not None
    assert torch.equal(right.sign()[:, 0], torch.tensor([1.0, 1, -1, -1]))
    assert torch.equal(shuffled.sign()[:, 0], torch.tensor([-1.0, -1, 1, 1]))
    # Each text of a group in turn.
    assert torch.equal(right, torch.cat([group.embeddings for group in groups.held_out]))
    torch.testing.assert_close(noise.norm(dim=1), torch.ones(4))
    assert torch.cosine_similarity(noise, right).abs().max() < 0.95
    assert found.embeddings["none"] is None
    alone = read_groups(dataclasses.replace(settings.data, held_out=("cy",)), tokenizer, encoder)
    assert [group.name for group in alone.others(alone.held_out[0])] == ["ann", "bob", "dee"]
    share = read_groups(dataclasses.replace(settings.data, held_out=0.5), tokenizer, encoder)
    assert share.held_out and all(not group.train for group in share.held_out)


def test_held_out_groups_need_no_training_file(settings: TextHypernetSettings) -> None:
    (settings.data.folder / "cy.train.jsonl").write_text("not read")
    (settings.data.folder / "dee.train.jsonl").unlink()
    assert train(longer(settings, 1), encoder=encoder)["held_out_groups"] == 2


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("ann.texts.json", "[", r"ann\.texts\.json is not readable JSON"),
        ("ann.texts.json", "[]", r"ann\.texts\.json must hold a list"),
        ("ann.texts.json", '["agrees", " "]', r"ann\.texts\.json must hold a list"),
        ("ann.texts.json", '{"a": 1}', r"ann\.texts\.json must hold a list"),
        ("ann.train.jsonl", "{}", r"ann\.train\.jsonl line 1"),
        ("ann.train.jsonl", None, r"ann\.train\.jsonl is not there"),
        ("dee.validation.jsonl", None, r"dee\.validation\.jsonl is not there"),
        ("dee.validation.jsonl", "", r"dee\.validation\.jsonl holds no conversation"),
        ("cy.texts.json", None, "cy is to be held out"),
    ],
)
def test_bad_files_are_named(settings: TextHypernetSettings, file: str, content: str | None, told: str) -> None:
    path = settings.data.folder / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    with pytest.raises(DataError, match=told):
        train(settings, encoder=encoder)
    assert not settings.out.exists()


def test_there_must_be_something_to_learn_from(settings: TextHypernetSettings) -> None:
    everyone = dataclasses.replace(settings.data, held_out=tuple(GROUPS))
    with pytest.raises(DataError, match="4 groups .* of which 4 are held out"):
        train(dataclasses.replace(settings, data=everyone), encoder=encoder)
    with pytest.raises(DataError, match="nowhere holds 0 groups"):
        nowhere = dataclasses.replace(settings.data, folder=settings.data.folder / "nowhere", held_out=0.0)
        train(dataclasses.replace(settings, data=nowhere), encoder=encoder)


def test_bad_settings(settings: TextHypernetSettings) -> None:
    with pytest.raises(ConfigError, match="held_out must be"):
        dataclasses.replace(settings.data, held_out=1.0)
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        dataclasses.replace(settings.data, max_length=1)
    with pytest.raises(ConfigError, match="groups and conversations"):
        dataclasses.replace(settings, groups=0)
    with pytest.raises(ConfigError, match="no linear module 'query'"):
        train(dataclasses.replace(settings, net=NetShape(targets=("query",))), encoder=encoder)
    values = ["out=net", "data.folder=data", "data.held_out=[cy, dee]", "loop.steps=3", "net.targets=all-linear"]
    read = load_settings(TextHypernetSettings, None, values)
    assert read.data.held_out == ("cy", "dee") and read.loop.steps == 3 and read.net.head == "L"
    with pytest.raises(ConfigError, match=r"Unknown setting net\.depth"):
        load_settings(TextHypernetSettings, None, [*values, "net.depth=3"])
