"""The router's row of an adapter that a federation begins: near that of all text in one place, of honest updates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from molora import MoLoRAModel, Router
from molora.chat import render
from molora.errors import ConfigError, FederationError, UpdateError, VersionError
from molora.examples import features_of
from molora.saved import load
from molora.versions import Versions
from molora_training.continual.update import read_chats
from molora_training.federated import row
from molora_training.federated.client import Base, Client, Learnt
from molora_training.federated.outcome import Into, keep
from molora_training.federated.rounds import Federation
from molora_training.federated.settings import FederateSettings, LimitSettings, PrivacySettings
from tests.federated.parties import RANKS, SORTS, make_settings, texts_of, with_samples
from tests.unit.spoken import make_spoken, save_spoken


@pytest.fixture
def into(folder: Path, tmp_path: Path) -> Into:
    """A new adapter of a model whose router keeps samples."""
    return Into(with_samples(folder / "model", tmp_path / "model"), "domain", "speech")


def settings_of(folder: Path, into: Into, out: Path, **changes: Any) -> FederateSettings:
    return make_settings(folder, out, router=into.unrouted(), **{"rounds": 2, **changes})


def learnt(own: Federation, clients: dict[str, Client]) -> dict[str, Learnt]:
    return {name: client.train(own.order(name, RANKS[name])) for name, client in clients.items()}


def close(own: Federation, told: dict[str, Learnt]) -> Any:
    return own.close({name: one.to_bytes() for name, one in told.items()})


def test_what_is_drawn_has_the_moments() -> None:
    q = torch.nn.functional.silu(torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) @ torch.ones(6, 6))
    q = q + torch.randn(500, 6, generator=torch.Generator().manual_seed(1))
    wanted = row.moments_of(q).float()
    row.check_moments(wanted[None])
    found = row.moments_of(row.drawn(wanted, 100_000)).float()
    # The mean of 100,000 products of two normal variables is off by half a percent of their size.
    assert float((found - wanted).abs().max()) < 0.02 * float(wanted.abs().max())
    assert torch.allclose(row.drawn(3 * wanted, 10), row.drawn(wanted, 10), atol=1e-4)  # as after three rounds
    vector = row.to_vector(wanted, 0.3)
    assert float(vector.abs().max()) <= 0.3
    assert torch.allclose(row.from_vector(vector, wanted.shape, 0.3), wanted, rtol=1e-5)


def found_by(model: MoLoRAModel, texts: list[str]) -> list[torch.Tensor]:
    """By part, which row of the domain layer gets each token, by the order of their names."""
    router: Any = model.router
    rows = [router.rows.index(name) for name in sorted(router.rows) if name.startswith("domain/")]
    encoded = [model.encode(text) for text in texts]
    features = [features_of(model, encoded, part) for part in range(len(router.parts))]
    return [part.output(q)[:, rows].argmax(1) for part, q in zip(router.parts, features, strict=True)]


@pytest.mark.parametrize("reads", [0, 1, (0, 1)])
def test_the_row_is_near_that_of_all_text(folder: Path, tmp_path: Path, clients: dict[str, Client], reads: Any) -> None:
    """Against `fit_row` on all that the clients may learn: routes on text that neither saw."""
    made = save_spoken(make_spoken(tmp_path / "adapters", reads=reads), tmp_path)
    for file in (made / "adapters").rglob(
        "adapter_model.safetensors"
    ):  # random ones are far stronger than trained ones
        save_file({n: t * (0.05 if "lora_B" in n else 1) for n, t in load_file(file).items()}, file)
    into = Into(with_samples(made, tmp_path / "sampled"), "domain", "speech")
    base = Base.load(str(tmp_path / "base"))
    parties = {name: Client(name, base, one.rows) for name, one in clients.items()}
    own = Federation.open(replace(settings_of(folder, into, tmp_path / "out"), base=str(tmp_path / "base")))
    while not own.over:
        close(own, learnt(own, parties))
    own.result().save(tmp_path / "speech", own.config)
    saved = load(into.model)
    assert isinstance(saved.router, Router)
    pooled, together = MoLoRAModel.from_pretrained(into.model), MoLoRAModel.from_pretrained(into.model)
    seen, apart = (
        [render(pooled.tokenizer, list(one["messages"]), False) for own in clients.values() for one in own.split[part]]
        for part in (0, 1)
    )
    pooled.add_adapter("domain", "speech", tmp_path / "speech", examples=seen)
    together.add_adapter("domain", "speech", tmp_path / "speech")
    together.set_router(row.with_row(saved.router, saved.stack, "domain", "speech", own.moments).router)
    others = [text for sort in SORTS for text in texts_of(sort, 2)]
    for one, other in zip(found_by(pooled, apart), found_by(together, apart), strict=True):
        assert float((one == other).float().mean()) > 0.9 and float((other == 3).float().mean()) > 0.8
    for one, other in zip(found_by(pooled, others), found_by(together, others), strict=True):
        assert float((one == other).float().mean()) > 0.9


def test_the_row_is_of_those_who_kept_to_it(
    folder: Path, tmp_path: Path, clients: dict[str, Client], into: Into
) -> None:
    """Three lie of their text alone, and are refused altogether; one is gone."""
    settings = settings_of(folder, into, tmp_path / "out")
    alone = Federation.open(replace(settings, out=tmp_path / "alone"))
    own = Federation.open(settings)
    told = learnt(own, clients)
    close(alone, {name: clients[name].train(alone.order(name, RANKS[name])) for name in ("ada", "bob")})
    own.order("eve", 4)
    good = told["cyd"].moments
    assert good is not None
    told["cyd"] = replace(told["cyd"], moments=good * torch.nan)
    told["dan"] = replace(told["dan"], moments=good[:, 1:])
    report = close(own, told)
    assert torch.allclose(own.moments, alone.moments) and sorted(report.clients) == ["ada", "bob"]
    assert "NaN" in report.refused["cyd"] and "row is [" in report.refused["dan"] and report.absent == ["eve"]


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        (lambda m: 3 * m, "no means of squares"),  # it would weigh three times as much
        (lambda m: m + torch.triu(torch.ones_like(m), 1), "no means of squares"),
        (lambda m: torch.cat([m[:, :1], -m[:, 1:]], 1), "no means of squares"),
        (lambda m: m - 9 * torch.eye(m.shape[1]) * (torch.arange(m.shape[1]) > 0), "variance is negative"),
        (lambda m: m.double(), "float64"),
        (lambda m: None, "missing: row"),
        (lambda m: m + 1e6 * torch.eye(m.shape[1]) * (torch.arange(m.shape[1]) > 0), "times the round's median"),
    ],
)
def test_lies_about_text_are_refused(
    folder: Path, tmp_path: Path, clients: dict[str, Client], into: Into, lie: Any, why: str
) -> None:
    own = Federation.open(settings_of(folder, into, tmp_path / "out"))
    told = learnt(own, clients)
    told["dan"] = replace(told["dan"], moments=lie(told["dan"].moments))
    report = close(own, told)
    assert why in report.refused["dan"] and len(report.clients) == 3


def test_moments_that_nobody_asked_for_are_refused(folder: Path, tmp_path: Path, clients: dict[str, Client]) -> None:
    own = Federation.open(make_settings(folder, tmp_path / "out"))
    told = learnt(own, clients)
    assert all(one.moments is None for one in told.values())
    told["dan"] = replace(told["dan"], moments=torch.eye(3)[None])
    assert "unknown: row" in close(own, told).refused["dan"]


def test_it_goes_on_after_an_interruption(folder: Path, tmp_path: Path, clients: dict[str, Client], into: Into) -> None:
    settings = settings_of(folder, into, tmp_path / "out")
    own = Federation.open(settings)
    close(own, learnt(own, clients))
    again = Federation.open(settings)
    assert again.round == 1 and torch.equal(again.moments, own.moments)
    assert float(own.moments[0, 0, 0]) == pytest.approx(1, abs=1e-5)
    close(again, learnt(again, clients))
    assert float(again.moments[0, 0, 0]) == pytest.approx(2, abs=1e-5)  # of both rounds
    model = MoLoRAModel.from_pretrained(into.model)
    model.router.parts[0].input.bias.data += 1  # type: ignore[union-attr]
    model.save_pretrained(into.model)  # its features are others
    with pytest.raises(FederationError, match="other settings"):
        Federation.open(settings)


def test_a_new_adapter_serves_with_its_row(
    folder: Path, tmp_path: Path, clients: dict[str, Client], into: Into
) -> None:
    into = replace(into, general=folder / "data" / "ada.jsonl")
    limits = LimitSettings(max_forgetting=0.3)
    own = Federation.open(settings_of(folder, into, tmp_path / "out", limits=limits))
    before = {name: client.evaluate(own.trial()) for name, client in clients.items()}
    while not own.over:
        close(own, learnt(own, clients))
    losses = {"before": before, "after": {name: client.evaluate(own.trial()) for name, client in clients.items()}}
    kept = keep(own, losses, into, "molora federate run", {})
    assert kept.promoted and kept.general is not None and kept.general.conversations == 30
    version = Versions(into.model, "domain", "speech")[kept.version]
    assert version.metrics["taken"] <= 0.3
    model = MoLoRAModel.from_pretrained(into.model)
    router: Any = model.router
    samples = router.parts[0].samples
    assert int((samples.rows == router.rows.index("domain/speech")).sum()) == 128  # drawn, of nobody
    text = render(model.tokenizer, list(read_chats(folder / "data" / "bob.jsonl")[0]["messages"]), False)
    assert float((found_by(model, [text])[0] == 3).float().mean()) > 0.5
    assert Into(into.model, "domain", "speech").unrouted() is None and into.served() is not None


def test_a_row_that_takes_too_much_does_not_serve(
    folder: Path, tmp_path: Path, clients: dict[str, Client], into: Into, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = Federation.open(settings_of(folder, into, tmp_path / "out", rounds=1))
    close(own, learnt(own, clients))
    router: Any = load(into.model).router
    theirs = router.parts[0].samples.features[router.parts[0].samples.rows == router.rows.index("domain/math")]
    own.moments = row.moments_of(theirs)[None].float()  # as if the clients' text were mathematics
    told = {"loss": 3.0, "tokens": 1.0, "conversations": 1.0}
    kept = keep(own, {"before": {"ada": told}, "after": {"ada": {**told, "loss": 2.0}}}, into, "command", {})
    assert not kept.promoted and "of what others are found by" in kept.why
    assert "speech" not in load(into.model).stack["domain"].adapters


def test_where_no_row_can_be(folder: Path, into: Into) -> None:
    with pytest.raises(VersionError, match="keeps no samples"):
        Into(folder / "model", "domain", "law").unrouted()
    assert Into(folder / "model", "user", "eve").unrouted() is None
    assert Into(folder / "model", "domain", "math").unrouted() is None
    with pytest.raises(ConfigError, match=r"noise of privacy\.epsilon does not cover"):
        FederateSettings(router=into.model, aggregate="shared", privacy=PrivacySettings(epsilon=8.0))
    with pytest.raises(UpdateError, match="router in the order"):
        row.read_reader(b"\x00" * 20)


def test_a_reader_has_no_rows_and_no_samples(folder: Path, into: Into) -> None:
    router: Any = load(into.model).router
    found: Any = row.read_reader(row.reader_of(router))
    assert found.rows == [] and len(found.parts[0].samples.rows) == 0 and len(router.rows) == 5
    model = MoLoRAModel.from_pretrained(into.model)
    ids = model.encode("aye and nay")
    part = found.parts[0]
    z = part.read(model.base.get_input_embeddings()(ids["input_ids"]))
    q = part.features(z, torch.ones_like(ids["input_ids"], dtype=torch.bool), None)[0]
    assert torch.allclose(q, features_of(model, [ids], 0), atol=1e-5)
    assert row.reader_of(router) == row.reader_of(load(into.model).router)  # type: ignore[arg-type]
