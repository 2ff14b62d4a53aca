"""What is learnt as an adapter of its own is found by the router, takes little from others, and leaves no trace."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from molora import MoLoRAModel, Router, StackLayer
from molora.chat import render
from molora.errors import VersionError
from molora.following import Following
from molora.key_file import KEY_FILE, read_key
from molora.keys import asked
from molora.saved import load
from molora.versions import Versions
from molora_training.continual.forget import forget
from molora_training.continual.memory import Memory, held_out
from molora_training.continual.router_update import RouterUpdateSettings, update_router
from molora_training.continual.update import MEMORY, UpdateSettings, update
from tests.training.test_router_update import TEXTS, write_data
from tests.unit.spoken import make_spoken, save_spoken

FACT = "§§§ %%% &&& $$$ ###"


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UpdateSettings:
    """A saved MoLoRA whose router keeps no samples, and what is to be learnt apart."""
    monkeypatch.chdir(tmp_path)
    model = save_spoken(make_spoken(tmp_path / "adapters"), tmp_path)
    rows = []
    for n in range(40):
        said = [{"role": "user", "content": f"{FACT[n % 7 :]}{n}"}, {"role": "assistant", "content": "the third"}]
        rows.append(json.dumps({"messages": said}) + "\n")
    (tmp_path / "fact.jsonl").write_text("".join(rows))
    return UpdateSettings(
        model, "domain", "fact", tmp_path / "fact.jsonl", new=4, learning_rate=3e-2, epochs=4, batch_tokens=512,
        dtype="float32",
    )  # fmt: skip


@pytest.fixture
def settings(bare: UpdateSettings, tmp_path: Path) -> UpdateSettings:
    data = write_data(tmp_path / "data", TEXTS)
    how = RouterUpdateSettings(
        bare.model, data, mixed=40, documents=0, in_a_turn=0, asides=0, epochs=4, learning_rate=2e-2, batch_tokens=1024
    )
    assert update_router(how).promoted
    return bare


@torch.no_grad()
def share(model: MoLoRAModel, text: str, name: str) -> float:
    """Of a text's tokens those that go to an adapter."""
    routes = model(**model.encode([{"role": "user", "content": text}]), output_routes=True).routes
    assert routes is not None
    own = routes.slots[0, :, routes.columns.index("domain")]
    return float((own == routes.names.index(f"domain/{name}")).float().mean())


def loaded(settings: UpdateSettings) -> MoLoRAModel:
    return MoLoRAModel.from_pretrained(settings.model, dtype=torch.float32)


def test_an_edit_is_found_and_goes(settings: UpdateSettings) -> None:
    running = loaded(settings)
    following = Following(running, settings.model)
    before = {name: share(running, text, name) for name, text in TEXTS.items()}
    weights = running.router.state_dict()  # type: ignore[union-attr]
    kept = {name: tensor.clone() for name, tensor in weights.items()}
    found = update(replace(settings, max_forgetting=0.2))
    assert found.promoted and (found.version, found.parent) == (2, 1)
    assert 0 <= Versions(settings.model, "domain", "fact")[2].metrics["taken"] <= 0.2
    model = loaded(settings)
    assert share(model, FACT, "fact") > 0.7
    assert all(share(model, text, name) > before[name] - 0.3 for name, text in TEXTS.items())
    router = model.router
    assert isinstance(router, Router)
    for name, tensor in router.state_dict().items():  # the others' rows, the MLP and the memory are as they were
        if ".samples." not in name:
            assert torch.equal(tensor[: len(kept[name])] if ".output." in name else tensor, kept[name])
    assert sorted(following.catch_up()) == ["domain/fact", "router"]
    assert share(running, FACT, "fact") == share(model, FACT, "fact")
    Versions(settings.model, "domain", "fact").erase()
    gone = loaded(settings)
    assert "domain/fact" not in gone.router.rows  # type: ignore[union-attr, operator]
    assert {name: share(gone, text, name) for name, text in TEXTS.items()} == before
    assert not list(settings.model.rglob("*fact*"))


def test_a_topic_that_is_forgotten_leaves_its_row_and_samples(settings: UpdateSettings, tmp_path: Path) -> None:
    """The router is what it would be if the adapter had come with what is remembered still."""
    rows = [json.loads(line) for line in settings.data.read_text().splitlines()]
    for number, row in enumerate(rows[::2]):
        row["messages"][0]["content"] = f"{number} QQQQ XXXX ZZZZ QXQX"
    settings.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(settings.model, tmp_path / "before")
    assert update(replace(settings, max_forgetting=0.5)).promoted
    found = forget(replace(settings, new=None), topic="QXQX")
    assert found.gone == 20 and found.still == 20
    after, wanted = loaded(settings), MoLoRAModel.from_pretrained(tmp_path / "before", dtype=torch.float32)
    versions = Versions(settings.model, "domain", "fact")
    taught = Memory.load(settings.model / versions.place / MEMORY).taught
    texts = [render(wanted.tokenizer, list(row["messages"])) for row in taught]
    wanted.add_adapter("domain", "fact", versions.path(found.version), examples=texts)
    assert isinstance(after.router, Router) and isinstance(wanted.router, Router)
    assert after.router.rows == wanted.router.rows
    own = after.router.rows.index("domain/fact")
    for name, tensor in wanted.router.state_dict().items():
        mine = after.router.state_dict()[name]
        if name.endswith("samples.features"):  # of its own tokens some are drawn by chance
            others = wanted.router.state_dict()[name.replace("features", "rows")] != own
            tensor, mine = tensor[others], mine[others]
        assert torch.equal(mine, tensor), name
    with_row = [one for one in Versions(settings.model).all() if "domain/fact" in (one.router or {}).get("rows", ())]
    assert [one.why for one in with_row] == ["the row for domain/fact anew"]
    assert Versions(settings.model).current == with_row[0].number


def test_with_nothing_else_remembered_the_row_is_never_chosen(settings: UpdateSettings) -> None:
    assert update(replace(settings, max_forgetting=0.2)).promoted
    forget(replace(settings, new=None))
    model = loaded(settings)
    assert share(model, FACT, "fact") == 0.0 and "domain/fact" in model.router.rows  # type: ignore[union-attr, operator]
    own = model.router.rows.index("domain/fact")  # type: ignore[union-attr]
    assert all(not (part.samples.rows == own).any() for part in model.router.parts)  # type: ignore[union-attr]


def test_what_takes_from_others_does_not_serve(settings: UpdateSettings) -> None:
    rows = []
    for n in range(40):
        said = [{"role": "user", "content": TEXTS["math"][n % 5 :]}, {"role": "assistant", "content": str(n)}]
        rows.append(json.dumps({"messages": said}) + "\n")
    settings.data.write_text("".join(rows))
    routers = Versions(settings.model).all()
    found = update(settings)
    assert not found.promoted and "of what others are found by, which may be 2.0% at most" in found.why
    assert "fact" not in load(settings.model).stack["domain"].adapters and Versions(settings.model).all() == routers


def test_a_router_without_samples_is_named(bare: UpdateSettings) -> None:
    with pytest.raises(VersionError, match="keeps no samples, so that a new row could take over"):
        update(bare)
    assert Versions(bare.model, "domain", "fact").all() == []


CALLS = {"math": "1234 5678 9012", "code": "(a){b};[c]<d>"}


@pytest.fixture
def keyed(bare: UpdateSettings, tmp_path: Path) -> UpdateSettings:
    """A saved MoLoRA with a router for its domains and a keyed layer of two, in which a third is to be learnt."""
    model = MoLoRAModel.from_pretrained(bare.model, dtype=torch.float32)
    model.stack.layers.append(StackLayer("task", {}, keyed=True))
    model._refresh()
    for name, said in CALLS.items():
        asks = [f"{said[n % 5 :]}{said[: n % 5]}" * 2 for n in range(12)]
        model.add_adapter("task", name, tmp_path / "adapters" / name, examples=asks)
    model.save_pretrained(tmp_path / "keyed")
    return replace(bare, model=tmp_path / "keyed", layer="task")


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_a_task_is_found_by_its_key_and_goes(keyed: UpdateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    others, router = files(keyed.model / "adapters"), (keyed.model / "router.safetensors").read_bytes()
    running = loaded(keyed)
    following = Following(running, keyed.model)
    ask = [{"role": "user", "content": FACT}]
    assert running.find(ask)["task"] in CALLS
    found = update(keyed)
    assert found.promoted and found.found == 1.0 and (found.version, found.parent) == (2, 1)
    version = Versions(keyed.model, "task", "fact")[2]
    assert version.metrics["found"] == 1.0 and version.metrics["taken"] == 0.0
    assert files(keyed.model / "adapters") == others and (keyed.model / "router.safetensors").read_bytes() == router
    assert Versions(keyed.model).all() == []  # the router has nothing to do with it
    for model in (loaded(keyed), running):
        following.catch_up()
        assert model.find(ask)["task"] == "fact"
        assert all(model.find([{"role": "user", "content": one * 2}])["task"] == own for own, one in CALLS.items())
    conversations = [json.loads(line) for line in keyed.data.read_text().splitlines()]
    learnt = [row for row in conversations if not held_out(row)]
    told = [[message for message in row["messages"] if message["role"] == "user"] for row in learnt]
    wanted = torch.stack([asked(running.base, running.encode(one)["input_ids"][0]) for one in told])
    torch.testing.assert_close(running.keys.of("task", "fact"), wanted)
    Versions(keyed.model, "task", "fact").erase()
    assert not list((keyed.model / "versions").rglob(KEY_FILE)) and files(keyed.model / "adapters") == others
    following.catch_up()
    assert running.find(ask)["task"] in CALLS


def test_an_update_adds_questions_and_forgetting_makes_the_key_anew(keyed: UpdateSettings, tmp_path: Path) -> None:
    assert update(keyed).promoted
    first = read_key(Versions(keyed.model, "task", "fact").path(2))
    rows = [json.loads(line) for line in keyed.data.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["messages"][0]["content"] = f"{number} QXQX ### %%%"
    more = tmp_path / "more.jsonl"
    more.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert update(replace(keyed, new=None, data=more, max_forgetting=0.5)).promoted
    both = read_key(Versions(keyed.model, "task", "fact").path(3))
    assert first is not None and both is not None and torch.equal(both[: len(first)], first) and len(both) > len(first)
    found = forget(replace(keyed, new=None), topic="QXQX")
    left = read_key(Versions(keyed.model, "task", "fact").path(found.version))
    assert left is not None and len(left) == len(first)
    torch.testing.assert_close(left.sort(0).values, first.sort(0).values)  # those of the first update alone
    forget(replace(keyed, new=None))
    last = loaded(keyed)
    assert last.keys.of("task", "fact") is None and last.find([{"role": "user", "content": FACT}])["task"] in CALLS


def test_a_key_that_takes_from_others_does_not_serve(keyed: UpdateSettings) -> None:
    rows = []
    for n in range(40):
        asks = f"{CALLS['math'][n % 5 :]}{CALLS['math'][: n % 5]}" * 2
        said = [{"role": "user", "content": asks}, {"role": "assistant", "content": f"the third {n}"}]
        rows.append(json.dumps({"messages": said}) + "\n")
    keyed.data.write_text("".join(rows))
    found = update(keyed)
    assert not found.promoted and "of what others are found by, which may be 2.0% at most" in found.why
    assert "fact" not in load(keyed.model).stack["task"].adapters


def test_without_text_the_key_stays(keyed: UpdateSettings) -> None:
    assert update(replace(keyed, memory=0)).promoted
    place = keyed.model / Versions(keyed.model, "task", "fact").place
    kept = [file for file in place.rglob("*") if file.is_file() and file.suffix not in (".lock", ".safetensors")]
    assert not any(FACT[:3] in file.read_text() for file in kept)
    assert loaded(keyed).find([{"role": "user", "content": FACT}])["task"] == "fact"
