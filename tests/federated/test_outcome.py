"""What comes of a federation: a version that serves if it learnt and lost little, and a report that adds up."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from molora import MoLoRAModel, Router
from molora.router import NEVER
from molora.versions import Versions
from molora_training.continual.memory import Memory, held_out
from molora_training.continual.update import MEMORY, read_chats
from molora_training.federated.client import Base, Client
from molora_training.federated.lora import Lora, distance
from molora_training.federated.outcome import Into, Losses, change_of, keep, plain, report, write
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import LimitSettings
from tests.federated.parties import ANSWERS, RANKS, make_settings, with_samples


@pytest.fixture
def into(folder: Path, tmp_path: Path) -> Into:
    return Into(shutil.copytree(folder / "model", tmp_path / "model"), "domain", "math", folder / "data" / "ada.jsonl")


def trained(folder: Path, out: Path, into: Into, **limits: float) -> tuple[Federation, dict[str, Losses]]:
    limit = replace(LimitSettings(), **limits)
    settings = into.begin(make_settings(folder, out, rounds=2, limits=limit))
    base = Base.load(settings.base)
    clients = {name: Client.of_file(name, base, folder / "data" / f"{name}.jsonl") for name in ANSWERS}

    def losses() -> Losses:
        return {name: client.evaluate(own.trial()) for name, client in clients.items()}

    own = Federation.open(settings)
    before = losses()
    while not own.over:
        own.close({name: one.train(own.order(name, RANKS[name])).to_bytes() for name, one in clients.items()})
    return own, {"before": before, "after": losses()}


def test_what_was_learnt_serves(folder: Path, tmp_path: Path, into: Into) -> None:
    own, losses = trained(folder, tmp_path / "adapter", into, max_forgetting=10.0)
    versions = Versions(into.model, "domain", "math")
    remembered = [row for row in read_chats(folder / "data" / "dan.jsonl") if held_out(row)]
    file = into.model / versions.place / MEMORY
    file.parent.mkdir(parents=True, exist_ok=True)
    Memory().with_(remembered).save(file)
    kept = keep(own, losses, into, "molora federate run", {"privacy": None})
    assert kept.promoted and kept.learnt is not None and kept.learnt.after < kept.learnt.before
    assert f"{-kept.learnt.growth:.1%} less loss" in kept.why
    assert kept.general is not None and kept.general.conversations == 30
    assert kept.kept is not None and kept.kept.conversations == len(remembered)
    version = versions[kept.version]
    assert version.data == {"clients": 4, "rounds": 2, "run": into.mark(own.run, 2)}
    assert version.command == "molora federate run"
    assert version.metrics["learnt"]["conversations"] == kept.learnt.conversations
    served = Path(MoLoRAModel.from_pretrained(into.model).stack["domain"].adapters["math"])
    assert served == versions.path(kept.version)
    assert distance(Lora.from_folder(served), own.result()) < 1e-5
    assert versions.rollback() == version.parent


def test_what_learnt_nothing_does_not_serve(folder: Path, tmp_path: Path, into: Into) -> None:
    own, losses = trained(folder, tmp_path / "adapter", into, max_forgetting=10.0)
    backwards = {"before": losses["after"], "after": losses["before"]}
    kept = keep(own, backwards, into, "command", {})
    assert not kept.promoted and "nothing was learnt" in kept.why
    assert Versions(into.model, "domain", "math").current != kept.version
    unknown = keep(own, {}, replace(into, general=None), "command", {})
    assert not unknown.promoted and "nothing was measured" in unknown.why


def test_what_lost_too_much_does_not_serve(folder: Path, tmp_path: Path, into: Into) -> None:
    (tmp_path / "other.jsonl").write_text(
        "".join(
            json.dumps({"messages": [{"role": "user", "content": f"{n:02}"}, {"role": "assistant", "content": "XQZ"}]})
            + "\n"
            for n in range(12)
        )
    )
    into = replace(into, general=tmp_path / "other.jsonl")
    own, losses = trained(folder, tmp_path / "adapter", into, max_forgetting=0.0)
    kept = keep(own, losses, into, "command", {})
    assert kept.general is not None and kept.general.growth > 0
    assert not kept.promoted and "general conversations grew by" in kept.why


@pytest.mark.parametrize("name", ["math", "speech"])
def test_a_version_is_made_once_wherever_its_making_is_interrupted(
    folder: Path, tmp_path: Path, into: Into, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Before it serves, and after. Another adapter serves from then on, and a new one has its row."""
    into = replace(into, model=with_samples(into.model, tmp_path / "samples"), name=name)
    own, losses = trained(folder, tmp_path / "adapter", into, max_forgetting=10.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Versions, "promote", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        keep(own, losses, into, "command", {})
    made = into.versions.all()[-1].number
    for served in (False, True):
        assert (into.versions.current == made) == served
        settings = into.begin(replace(own.settings, start=None, router=None))  # as they are given
        assert settings == own.settings
        again = Federation.open(settings)
        assert again.over and again.run == own.run
        kept = keep(again, losses, into, "command", {})
        assert kept.promoted and kept.version == into.versions.current == into.versions.all()[-1].number == made
        assert kept.learnt == change_of(losses["before"], losses["after"])
    model = MoLoRAModel.from_pretrained(into.model)
    assert Path(model.stack["domain"].adapters[name]) == into.versions.path(made)
    assert isinstance(model.router, Router)
    bias = model.router.parts[0].output.bias[model.router.rows.index(f"domain/{name}")]  # type: ignore[union-attr, index]
    assert float(bias) > NEVER / 2
    anew = into.begin(own.settings, resume=False)
    assert anew.start == into.served() and anew.router is None
    assert Federation.open(anew, resume=False).run != own.run


def test_what_serves_by_now_is_not_taken_back(folder: Path, tmp_path: Path, into: Into) -> None:
    own, losses = trained(folder, tmp_path / "adapter", into, max_forgetting=10.0)
    first = keep(own, losses, into, "command", {})
    other = into.versions.add(folder / "adapters" / "math")
    into.versions.promote(other.number)
    again = keep(own, losses, into, "command", {})
    assert again == replace(first, promoted=False, why=f"version {other.number} serves by now")
    assert into.versions.current == other.number
    into.versions.rollback(into.versions[first.version].parent)
    assert keep(own, losses, into, "command", {}) == first and len(into.versions.all()) == 3


def test_losses_are_pooled_over_those_who_told_both() -> None:
    before = {"ada": {"loss": 20.0, "tokens": 10.0, "conversations": 2.0}, "bob": {"loss": 9.0, "tokens": 3.0}}
    after = {"ada": {"loss": 15.0, "tokens": 10.0, "conversations": 2.0}, "cyd": {"loss": 1.0, "tokens": 1.0}}
    found = change_of(before, after)
    assert found is not None and (found.before, found.after, found.conversations) == (2.0, 1.5, 2)
    assert change_of({}, after) is None


def test_a_report_is_json_and_the_folder_is_replaced(folder: Path, tmp_path: Path, into: Into) -> None:
    own, losses = trained(folder, tmp_path / "adapter", into)
    told = json.loads(json.dumps(plain(report(own, losses, "command", 2.0))))
    rows = [row for one in told["rounds"] for name, row in one["clients"].items() if name == "bob"]
    assert told["clients"]["bob"]["bytes_up"] == sum(row["bytes_up"] for row in rows)
    assert told["clients"]["bob"]["peak_bytes"] == max(row["peak_bytes"] for row in rows)
    assert told["settings"]["ranks"] == [2, 4, 8] and told["learnt"]["conversations"] > 10
    for _ in range(2):
        write(own, tmp_path / "made" / "adapter")
    assert distance(Lora.from_folder(tmp_path / "made" / "adapter"), own.result()) == pytest.approx(0, abs=1e-5)
    assert [one.name for one in (tmp_path / "made").iterdir()] == ["adapter"]


def test_an_interrupted_writing_leaves_what_was_there(
    folder: Path, tmp_path: Path, into: Into, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, _ = trained(folder, tmp_path / "adapter", into)
    out = tmp_path / "made" / "adapter"
    write(own, out)
    before = (out / "adapter_model.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("molora_training.federated.lora.save_tensors", lambda *_: (_ for _ in ()).throw(OSError("full")))
        with pytest.raises(OSError, match="full"):
            write(own, out)
    assert (out / "adapter_model.safetensors").read_bytes() == before
    seen: list[bool] = []
    rmtree = shutil.rmtree

    def watched(place: Path, *_: Any, **__: Any) -> None:
        seen.append(out.is_dir())
        rmtree(place)

    with monkeypatch.context() as patch:  # nor is it gone while the old one is taken away
        patch.setattr("shutil.rmtree", watched)
        write(own, out)
    assert seen and all(seen)
    assert [one.name for one in out.parent.iterdir()] == ["adapter"]
