"""`molora update router` on a tiny model: it tells what the routes say, and serves only if it still finds the old."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from typer.testing import CliRunner

from molora import MoLoRAModel, Router
from molora.cli import app
from molora.errors import ConfigError, DataError, VersionError
from molora.versions import Versions
from molora_training.continual.router_update import RouterUpdateSettings, _against, update_router
from molora_training.data import encode_within, read_examples
from tests.unit.spoken import make_spoken, save_spoken

TEXTS = {"math": "12+34=46 78*9=702 0123", "code": "def f(x): return x"}


def write_data(folder: Path, texts: dict[str, str]) -> Path:
    folder.mkdir(exist_ok=True)
    for domain, text in texts.items():
        for split in ("train", "validation"):
            rows = []
            for n in range(12):
                turned = text[n % 5 :] + text[: n % 5]
                said = [{"role": "user", "content": turned}, {"role": "assistant", "content": turned[::-1]}]
                rows.append({"id": f"{domain}-{split}-{n}", "domain": domain, "split": split, "messages": said})
            (folder / f"{domain}.{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RouterUpdateSettings:
    monkeypatch.chdir(tmp_path)
    model = save_spoken(make_spoken(tmp_path / "adapters"), tmp_path)
    return RouterUpdateSettings(
        model, write_data(tmp_path / "data", TEXTS), max_forgetting=0.5, mixed=40, documents=0, in_a_turn=0, asides=0,
        epochs=4, learning_rate=2e-2, batch_tokens=1024,
    )  # fmt: skip


@torch.no_grad()
def routes_of(settings: RouterUpdateSettings, domain: str) -> list[str | None]:
    """For each token of a domain's held-out text the adapter that acts, by a model that is loaded now."""
    model = MoLoRAModel.from_pretrained(settings.model, dtype=torch.float32)
    found: list[str | None] = []
    for row in encode_within(
        read_examples(settings.data / f"{domain}.validation.jsonl"), model.tokenizer, 2048, list(TEXTS)
    ):
        routes = model(row.input_ids[None], output_routes=True).routes
        slots = routes.slots[0, :, routes.columns.index("domain")]
        found += [routes.names[slot].partition("/")[2] if slot >= 0 else None for slot in slots.tolist()]
    return found


def test_it_finds_its_adapters_better_and_serves(settings: RouterUpdateSettings) -> None:
    before = {name: routes_of(settings, name) for name in TEXTS}
    found = update_router(settings, command="molora update router")
    assert found.promoted and (found.version, found.parent) == (2, 1)
    after = {name: routes_of(settings, name) for name in TEXTS}
    for name in TEXTS:
        told = [sum(one == name for one in routes[name]) / len(routes[name]) for routes in (before, after)]
        assert list(found.right[name]) == pytest.approx(told, abs=1e-3)
        assert told[1] > 0.8
    assert found.mixed[1] > found.mixed[0] and 0 < found.drift < 1
    mine = Versions(settings.model)
    assert mine.current == 2 and mine[2].metrics["drift"] == found.drift and mine[2].data["domains"] == list(TEXTS)
    assert mine.rollback() == 1 and {name: routes_of(settings, name) for name in TEXTS} == before


def test_what_loses_a_domain_does_not_serve(settings: RouterUpdateSettings, tmp_path: Path) -> None:
    update_router(settings)
    # What is math is told to be code, and held out stays what it is.
    wrong = write_data(tmp_path / "wrong", {"math": TEXTS["code"], "code": TEXTS["math"]})
    for name in TEXTS:
        held_out = f"{name}.validation.jsonl"
        (wrong / held_out).write_text((settings.data / held_out).read_text())
    found = update_router(replace(settings, data=wrong, max_forgetting=0.02))
    assert not found.promoted and "of the tokens of" in found.why and "2.0% at most" in found.why
    assert Versions(settings.model).current == 2
    with pytest.raises(VersionError, match="may not serve"):
        Versions(settings.model).promote(found.version)


def test_what_has_no_text_is_protected_by_its_samples(settings: RouterUpdateSettings, tmp_path: Path) -> None:
    update_router(settings)
    served = Versions(settings.model).current
    model = MoLoRAModel.from_pretrained(settings.model, dtype=torch.float32)
    model.add_adapter("domain", "law", tmp_path / "adapters" / "law")  # without an example: "auto" cannot choose it
    model.save_pretrained(tmp_path / "three")
    alone = write_data(tmp_path / "law", {"law": "§§§ %%% &&& $$$ ###"})
    three = replace(settings, model=tmp_path / "three", data=alone)
    found = update_router(three)
    assert served == 2 and found.promoted and found.sampled == ["math", "code"]
    assert found.right["law"][0] == 0.0 and found.right["law"][1] > 0.7
    assert all(found.right[name][0] - found.right[name][1] < 0.2 for name in TEXTS)
    now = MoLoRAModel.from_pretrained(tmp_path / "three", dtype=torch.float32).router
    assert isinstance(now, Router) and isinstance(model.router, Router)
    before, after = model.router.state_dict(), now.state_dict()
    at = [now.rows.index(f"domain/{name}") for name in TEXTS]
    for name, tensor in after.items():
        if ".output." in name:
            assert torch.equal(tensor[at], before[name][at])
        elif ".samples." not in name:
            assert torch.equal(tensor, before[name])
    samples = now.parts[0].samples
    rows = {now.rows[index] for index in samples.rows.tolist()}  # type: ignore[union-attr, operator]
    assert {"domain/law", "domain/math", "domain/code"} <= rows
    for told in {name: routes_of(replace(three, data=settings.data), name) for name in TEXTS}.values():
        assert sum(one == "law" for one in told) / len(told) < 0.3


def test_samples_are_judged_together() -> None:
    settings = RouterUpdateSettings(Path(), Path(), max_forgetting=0.02)
    samples = {"math": (0.9, 0.87), "code": (0.9, 0.9)}  # 1.5% over both
    assert _against(settings, {"law": (0.0, 0.9)}, samples, (0.5, 0.6)) == ""
    why = _against(settings, {"law": (0.0, 0.9)}, {**samples, "code": (0.9, 0.87)}, (0.5, 0.6))
    assert why == "3.0% of the tokens of what has no text here (samples) are found no more, which may be 2.0% at most"
    assert _against(settings, {"law": (0.9, 0.9)}, samples, (0.6, 0.6)) == "nothing was gained"


def test_what_has_neither_text_nor_samples_is_named(settings: RouterUpdateSettings, tmp_path: Path) -> None:
    alone = write_data(tmp_path / "code alone", {"code": TEXTS["code"]})
    with pytest.raises(DataError, match="has no text of math, and the router keeps no samples of it"):
        update_router(replace(settings, data=alone))
    assert Versions(settings.model).all() == []


def test_bad_input_is_named(settings: RouterUpdateSettings, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="must not be negative"):
        replace(settings, max_forgetting=-1.0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no <adapter>"):
        update_router(replace(settings, data=tmp_path / "empty"))
    lock = settings.model / Versions(settings.model).place / ".update.lock"
    with FileLock(lock), pytest.raises(VersionError, match="Another update of the router"):
        update_router(settings)
    model = MoLoRAModel.from_pretrained(settings.model, dtype=torch.float32)
    model.set_router(None)
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(VersionError, match="no learned router"):
        update_router(replace(settings, model=tmp_path / "plain"))


def test_the_command(settings: RouterUpdateSettings) -> None:
    line = ["update", "router", "--data", str(settings.data), "--model", str(settings.model)]
    found = CliRunner().invoke(app, [*line, "--epochs", "2", "--learning-rate", "0.02", "--max-forgetting", "0.9"])
    assert found.exit_code == 0, found.output
    assert "mixed text" in found.output and "go elsewhere than before" in found.output
    assert "Version 2 serves" in found.output
    wrong = CliRunner().invoke(app, [*line, "--method", "elastic"])
    assert wrong.exit_code != 0 and "are for an adapter" in str(wrong.exception)
    nameless = CliRunner().invoke(app, ["update", "domain", *line[2:]])
    assert nameless.exit_code != 0 and "Name an adapter" in str(nameless.exception)
