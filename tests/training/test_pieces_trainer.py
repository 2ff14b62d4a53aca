"""The training of a pool of pieces, and a user's adapter that is put together from it, on a tiny base."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from molora import MoLoRAModel
from molora.adapter import Adapter
from molora.base import load_base
from molora.cli import app
from molora.errors import AdapterNotFoundError, ConfigError, DataError, HypernetError
from molora.factors import of_adapter
from molora.personalize import embeddings
from molora.personalize.generated import generated, stacked
from molora.personalize.history import Interaction
from molora.personalize.pieces import Assembled, PiecePool, PoolConfig
from molora.versions import Versions
from molora_training import pieces
from molora_training.data import encode
from molora_training.data.read_people import Asked, Person
from molora_training.fitting import drawn, fit_weights
from molora_training.pieces import PiecesSettings, choose_sharers, history_rows, pool_of, train
from tests.unit.spoken import make_spoken, save_spoken


def person(name: str, says: str, count: int, held_out: bool = False) -> Person:
    asked = [
        Asked(f"{name}-{number}", "validation" if number % 4 == 3 else "train", "plain", False,
              Interaction(f"Question {number}?", f"{says} {number}"))
        for number in range(count)
    ]  # fmt: skip
    return Person(name, held_out, tuple(asked))


PEOPLE = [
    person("ada", "blue", 8), person("bob", "blue", 4), person("cyd", "red", 6), person("dan", "red", 12),
    person("eve", "red", 40, held_out=True),
]  # fmt: skip


def by_colour(texts: Any) -> torch.Tensor:
    return torch.tensor([[1.0, 0.0] if "blue" in text else [0.0, 1.0] for text in texts])


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PiecesSettings:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pieces, "read_people", lambda name, folder: PEOPLE)
    model = make_spoken(tmp_path / "adapters")
    save_spoken(model, tmp_path)
    return PiecesSettings(
        out=tmp_path / "pool", people="any", data=tmp_path, base=str(tmp_path / "base"), sharers=2, rank=2, alpha=4.0,
        targets=("q_proj", "o_proj"), learning_rate=1e-2, batch_tokens=256, gate_learning_rate=1e-2, dtype="float32",
    )  # fmt: skip


def test_the_busiest_of_each_cluster_shares() -> None:
    some = [one for one in PEOPLE if not one.held_out]
    assert [one.id for one in choose_sharers(some, by_colour, 2)] == ["ada", "dan"]
    assert [one.id for one in choose_sharers(some, by_colour, 9)] == ["ada", "bob", "cyd", "dan"]


def test_a_pool_is_the_sharers_adapters_and_goes_on_where_it_was(
    settings: PiecesSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = pieces.train_gates

    def stopped(*arguments: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(pieces, "train_gates", stopped)
    with pytest.raises(KeyboardInterrupt):
        train(settings, by_colour)
    weights = {name: settings.work / "adapters" / name / "adapter_model.safetensors" for name in ("ada", "dan")}
    made = {name: file.stat().st_mtime_ns for name, file in weights.items()}
    with pytest.raises(ConfigError, match="other settings"):
        train(replace(settings, learning_rate=2e-2), by_colour)
    with monkeypatch.context() as patch, pytest.raises(ConfigError, match="on other text"):
        patch.setattr(pieces, "read_people", lambda name, folder: [person("ada", "green", 8), *PEOPLE[1:]])
        train(settings, by_colour)
    monkeypatch.setattr(pieces, "train_gates", honest)
    metrics = train(settings, by_colour)
    assert (metrics["sharers"], metrics["people"], metrics["interactions"]) == (2, 4, 6 + 9)
    for name, when in made.items():  # they were not trained again
        assert weights[name].stat().st_mtime_ns == when
    pool = PiecePool.load(settings.out)
    assert pool.config.rank == 2 and len(pool.config.modules) == 6
    for number, name in enumerate(("ada", "dan")):
        own = Adapter.load(settings.work / "adapters" / name)
        for module, weights in own.modules.items():
            delta = pool.B[module][number] @ pool.A[module][number]
            wanted = weights.scale * weights.B.float() @ weights.A.float()
            torch.testing.assert_close(delta, wanted, rtol=2e-2, atol=1e-4)
        gates = load_file(settings.work / "gates" / f"{name}.safetensors")
        for module, gate in gates.items():
            assert gate.any() and torch.equal(pool.gates[module][number], gate.bfloat16().float())


def test_nothing_but_the_history_is_learnt(settings: PiecesSettings) -> None:
    tokenizer = make_spoken(settings.data / "again").tokenizer
    splits = ("train", "test", "validation")
    asked = [replace(one, split=splits[n % 3]) for n, one in enumerate(PEOPLE[0].asked)]  # type: ignore[arg-type]
    rows = history_rows(replace(PEOPLE[0], asked=tuple(asked)), tokenizer, 1024)
    said = ["blue 0", "blue 3", "blue 6"]
    for row, answer in zip(rows, said, strict=True):
        assert tokenizer.decode(row.labels[row.labels >= 0]).startswith(answer)  # type: ignore[union-attr]


def test_a_task_without_an_adapter_is_named(settings: PiecesSettings, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError, match="nowhere"):
        train(replace(settings, task=tmp_path / "nowhere"), by_colour)


def test_pieces_on_top_of_what_the_task_is(
    settings: PiecesSettings, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The adapter of the task acts while the pieces learn and while a user's are chosen, and is asked for."""
    plain = PiecePool.load(train(settings, by_colour) and settings.out)
    task = tmp_path / "adapters" / "math"
    beneath: list[Any] = []
    gates = pieces.train_gates
    monkeypatch.setattr(pieces, "train_gates", lambda *given: beneath.append(given[-1]) or gates(*given))
    train(replace(settings, out=tmp_path / "above", task=task), by_colour)
    assert [set(one) for one in beneath] == [set(of_adapter(Adapter.load(task)))]
    above = PiecePool.load(tmp_path / "above")
    assert above.config.beneath == hashlib.sha256((task / "adapter_model.safetensors").read_bytes()).hexdigest()
    name = above.config.modules[0]
    assert not torch.allclose(above.B[name], plain.B[name], atol=1e-3)
    turns = [{"role": "user", "content": "Question 9?"}, {"role": "assistant", "content": "blue 9"}]
    (tmp_path / "zoe.jsonl").write_text(json.dumps({"messages": turns, "user": "zoe"}) + "\n")
    line = ["assemble", "user", "zoe", "--history", str(tmp_path / "zoe.jsonl"), "--pool", str(tmp_path / "above")]
    line += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "zoe.pieces")]
    with pytest.raises(HypernetError, match="name it with --beneath"):
        app(line, standalone_mode=False)
    with pytest.raises(HypernetError, match="not trained on top of domain/code"):
        app([*line, "--beneath", "domain/code"], standalone_mode=False)
    with pytest.raises(AdapterNotFoundError, match="no adapter 'domain/art'"):
        app([*line, "--beneath", "domain/art"], standalone_mode=False)
    app([*line, "--beneath", "domain/math", "--on-top", "1"], standalone_mode=False)
    base, tokenizer = load_base(settings.base, dtype=torch.bfloat16)
    with generated(base, stacked([of_adapter(Adapter.load(task))])):
        wanted = above.assemble(base, tokenizer, [turns])
    kept = Assembled.load(tmp_path / "zoe.pieces")
    assert torch.equal(kept.places, wanted.places)
    torch.testing.assert_close(kept.weights, wanted.weights, rtol=1e-2, atol=1e-3)
    assert not torch.equal(kept.weights, above.assemble(base, tokenizer, [turns]).weights)
    app([*line, "--beneath", "domain/math", "--way", "fitted", "--top", "1"], standalone_mode=False)
    base, tokenizer = load_base(settings.base, dtype=torch.bfloat16)
    base.requires_grad_(False)
    rows, below = [encode(turns, tokenizer, ["user"], ["user"])], of_adapter(Adapter.load(task))
    (fitted,) = fit_weights(base, above, [drawn(above, 1)], [rows], 0, below=below)
    kept = Assembled.load(tmp_path / "zoe.pieces")
    assert torch.equal(kept.places, fitted.places) and kept.weights.any()
    torch.testing.assert_close(kept.weights, fitted.weights, rtol=5e-2, atol=5e-3)
    assert Versions(tmp_path / "model", "user", "zoe")[2].data["made_from"] == "fitted"


def test_what_does_not_fit(settings: PiecesSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="sharers must be"):
        PiecesSettings(out=settings.out, people="x", sharers=0)
    monkeypatch.setattr(pieces, "read_people", lambda name, folder: PEOPLE[4:])
    with pytest.raises(DataError, match="Nobody in the set 'any'"):
        train(settings, by_colour)
    first = of_adapter(Adapter.load(settings.data / "adapters/math"))
    with pytest.raises(ConfigError, match="differ in rank or modules"):
        pool_of(PoolConfig("x", (), 2, 4), [first, dict(list(first.items())[:1])], [{}, {}])
    with pytest.raises(ConfigError, match="differ in rank or modules"):
        pool_of(PoolConfig("x", (), 1, 5), [first], [{}])


def test_a_users_adapter_is_assembled_into_a_saved_model(
    settings: PiecesSettings, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings, by_colour, encoder_name="colours")
    turns = [{"role": "user", "content": "Question 9?"}, {"role": "assistant", "content": "blue 9"}]
    (tmp_path / "zoe.jsonl").write_text(json.dumps({"messages": turns, "user": "zoe"}) + "\n")
    line = ["assemble", "user", "zoe", "--history", str(tmp_path / "zoe.jsonl"), "--pool", str(settings.out)]
    line += ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "zoe.pieces")]
    capsys.readouterr()
    app([*line, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    assert (found["adapter"], found["version"], found["interactions"]) == ("user/zoe", 1, 1)
    kept = Assembled.load(tmp_path / "zoe.pieces")
    assert (tmp_path / "zoe.pieces").stat().st_size == found["bytes"]
    pool = PiecePool.load(settings.out)
    adapter = MoLoRAModel.from_pretrained(tmp_path / "model").adapters["user/zoe"]
    for name, (A, B) in pool.factors(kept).items():
        weights = adapter.modules[name]
        torch.testing.assert_close(weights.scale * weights.B.float() @ weights.A.float(), B @ A, rtol=2e-2, atol=1e-4)
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=by_colour))
    app([*line, "--way", "anchors", "--on-top", "1", "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["version"] == 2
    merged = Assembled.load(tmp_path / "zoe.pieces")
    assert merged.places.tolist() == [[0, 1]] * 6 and float(merged.weights[0, 0]) > 0.99  # ada says blue, too
    assert MoLoRAModel.from_pretrained(tmp_path / "model").adapters["user/zoe"].ranks == [2 * 2 + 1]
    assert Versions(tmp_path / "model", "user", "zoe")[2].data["made_from"] == "anchors"
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(DataError, match="holds nothing of zoe"):
        app([*line[:4], str(tmp_path / "none.jsonl"), *line[5:]], standalone_mode=False)
    (tmp_path / "other.jsonl").write_text(json.dumps({"messages": turns, "user": "max"}) + "\n")
    with pytest.raises(DataError, match="max"):
        app([*line[:4], str(tmp_path / "other.jsonl"), *line[5:]], standalone_mode=False)
