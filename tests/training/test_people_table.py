"""The table of what an adapter of one's own brings, on a tiny base: its rows, its lines and its arithmetic."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from molora.adapter import Adapter
from molora.base import load_base
from molora.cli import app
from molora.errors import ConfigError, DataError, HypernetError
from molora.factors import concatenated, of_adapter
from molora.personalize import embeddings
from molora.personalize.from_text import factors_from_texts
from molora.personalize.generated import generated, stacked
from molora.personalize.history import Interaction
from molora.personalize.pieces import PiecePool
from molora.personalize.text_net import TextNet, TextNetConfig
from molora_training import people_adapters, people_table, pieces
from molora_training.adapter_settings import AdapterTrainSettings
from molora_training.data import Example, read_examples, write_examples
from molora_training.data.read_people import Asked, Person
from molora_training.hypernet.text_settings import TextHypernetSettings
from molora_training.people_adapters import OWN, People, PeopleAdapters, encoded
from molora_training.people_lines import must
from molora_training.people_settings import PeopleSettings
from molora_training.people_table import PeopleTable, run
from molora_training.pieces import PiecesSettings
from molora_training.settings import load_settings
from molora_training.speaker import Speaker
from tests.unit.spoken import make_spoken


def person(name: str, says: str, count: int, held_out: bool = False) -> Person:
    splits = ["train", "train", "validation", "test"]
    asked = [
        Asked(f"{name}-{n}", splits[n % 4], "plain", False, Interaction(f"Question {n}?", says))  # type: ignore[arg-type]
        for n in range(count)
    ]
    return Person(name, held_out, tuple(asked))


PEOPLE = [
    person("ada", "4", 16), person("bob", "2", 16), person("cyd", "4", 8, held_out=True),
    person("dan", "2", 12, held_out=True), person("eve", "1", 8, held_out=True),
]  # fmt: skip
ENCODER = SimpleNamespace(
    encode=lambda texts: torch.nn.functional.normalize(
        torch.tensor([[float("4" in text), 1.0, float(len(text) % 3)] for text in texts])
    )
)


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PeopleSettings:
    monkeypatch.chdir(tmp_path)
    for module in (people_table, pieces):
        monkeypatch.setattr(module, "read_people", lambda name, folder: PEOPLE)
    model = make_spoken(tmp_path / "adapters", domains=())
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(20)
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[union-attr]
    task = tmp_path / "adapters" / "math"
    pieces.train(
        PiecesSettings(
            out=tmp_path / "pool", people="any", data=tmp_path, base=str(tmp_path / "base"), rank=2, task=task,
            learning_rate=1e-2, batch_tokens=128,
        ),
        ENCODER.encode,
    )  # fmt: skip
    config = TextNetConfig.for_base(model.base, str(tmp_path / "base"), 3, width=8, rank=2)
    net = TextNet(config)
    for bias in net.bias_B.values():
        torch.nn.init.normal_(bias, std=0.1)
    net.save(tmp_path / "net")
    examples = [
        Example(
            f"s{n}", "science", "test", ({"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "x"})
        )
        for n in range(3)
    ]
    write_examples(tmp_path / "science.test.jsonl", examples)
    return PeopleSettings(
        people="any", pool=tmp_path / "pool", net=tmp_path / "net", task=task, data=tmp_path, new_tokens=2,
        learning_rates=(1e-6, 3e-2), fit_learning_rates=(1e-6, 0.15), epochs=12, batch_tokens=128, at_once=2,
    )  # fmt: skip


WAYS = [
    "base", "base, profile in the prompt", "base, search in the prompt", "task's adapter",
    "task's adapter, search in the prompt", "own adapter", "own adapter, another's",
    "own adapter, search in the prompt", "pieces", "pieces, another's",
    "pieces, weights fitted", "pieces, weights fitted, another's", "anchors", "anchors and rank 4",
    "anchors and rank 4, another's", "profile's adapter", "profile's adapter, another's",
    "profile's adapter, of a random direction", "profile's adapter, search in the prompt",
]  # fmt: skip


def test_the_command_writes_every_row_and_line(
    settings: PeopleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: ENCODER)
    given = [f"{name}={getattr(settings, name)}" for name in ("people", "pool", "net", "task", "data", "new_tokens")]
    given += ["learning_rates=[1e-6,3e-2]", "fit_learning_rates=[1e-6,0.15]"]
    given += ["epochs=12", "batch_tokens=128", "at_once=2"]
    app(["eval", "people", *given, "--out", str(tmp_path / "o.json"), "--json"], standalone_mode=False)
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "o.json").read_text())
    rows = {row["contender"]: row for row in report["rows"]}
    assert list(rows) == WAYS and report["people"] == 3
    assert all(row["loss_interval"][0] <= row["loss"] <= row["loss_interval"][1] for row in rows.values())
    # Those of the two that teach anything.
    assert report["learning_rates"] == {"own adapter": 3e-2, "pieces, weights fitted": 0.15}
    # Three people say one thing each, and always: it can be learnt, and another's adapter says the wrong one.
    assert rows["own adapter"]["loss"] < 0.2 * rows["task's adapter"]["loss"]
    assert rows["own adapter, another's"]["loss"] > 2.0 + rows["own adapter"]["loss"]
    assert rows["own adapter"]["accuracy"] == 1.0 and rows["own adapter"]["mae"] == 0.0
    assert set(report["unrelated"]) == {name for name in WAYS if "prompt" not in name}
    cost = report["cost"]
    assert 0 < cost["pieces"]["kept_bytes"] < 2048 < cost["own adapter"]["adapter_bytes"]
    assert {"seconds_of_one", "seconds_of_batch"} <= set(cost["profile's adapter"])
    assert [one["name"].split(":")[0] for one in report["must"]] == [
        *["profile's adapter"] * 3, *["pieces, weights fitted"] * 2, "anchors and rank 4"
    ]  # fmt: skip


def plain_table(settings: PeopleSettings, folder: Path, persons: list[Person]) -> PeopleTable:
    """Without a pool, a network and a task."""
    base, tokenizer = load_base(str(folder / "base"), dtype=torch.float32)
    few = replace(settings, pool=None, net=None, task=None)
    people, speaker = People(persons, ENCODER), Speaker(base.requires_grad_(False), tokenizer, new_tokens=2)
    adapters = PeopleAdapters(few, people, speaker, None, None, folder / "work", "mark")
    return PeopleTable(few, people, speaker, adapters, read_examples(folder / "science.test.jsonl"))


def test_without_a_pool_or_a_network_there_are_fewer_rows(settings: PeopleSettings, tmp_path: Path) -> None:
    few = replace(settings, learning_rates=(1e-2,), epochs=1)
    table = plain_table(few, tmp_path, [one for one in PEOPLE if one.held_out])
    speaker = table.speaker
    found = table.contenders()
    assert [one.name for one in found] == [*WAYS[:3], *WAYS[5:8]]
    assert found[3].own is not None and found[4].own is not None
    assert found[4].own() == [found[3].own()[place] for place in (1, 2, 0)]
    asked = table.asked[0][1].question
    assert found[1].prompt(0, asked).startswith("Of the one who asks: ") and found[1].prompt(0, asked).endswith(asked)
    assert found[2].prompt(0, asked).count("Answered: 4") == 3  # of cyd's history, nobody else's
    rows = [table.asking(one)["row"] for one in found]
    row = rows[0]
    losses = speaker.losses(encoded([one for _, one in table.asked], speaker.tokenizer))
    assert row["loss"] == pytest.approx(float(losses[:, 0].sum() / losses[:, 1].sum()))
    cost = {"one": {}}
    assert must({"rows": rows, "cost": cost, "peak_bytes": None}) == []


def test_intervals_and_means_are_over_people(settings: PeopleSettings, tmp_path: Path) -> None:
    """Two with one question each, and one with many, of which none is answered right."""
    many = person("dan", "2", 8, held_out=True)
    more = [replace(many.asked[3], id=f"dan-more-{n}") for n in range(8)]
    held_out = [person("cyd", "4", 4, True), replace(many, asked=(*many.asked, *more)), person("eve", "1", 4, True)]
    table = plain_table(replace(settings, questions=9), tmp_path, held_out)
    speaker = table.speaker
    assert [place for place, _ in table.asked] == [0, *[1] * 9, 2]
    right = {0: "4", 1: "5", 2: "1"}
    said = [right[place] for place, _ in table.asked]
    speaker.answers = lambda prompts, own=None: said  # type: ignore[method-assign]
    row = table.row(table.contenders()[0], None)
    assert row["accuracy"] == pytest.approx(2 / 3) and row["mae"] == pytest.approx(1.0)
    # Of three people all that are drawn may be those with a right answer, or the one without.
    assert row["accuracy_interval"] == [0.0, 1.0] and row["mae_interval"] == [0.0, 3.0]
    losses = speaker.losses(encoded([one for _, one in table.asked], speaker.tokenizer))
    by_person = torch.stack([losses[:1].sum(0), losses[1:10].sum(0), losses[10:].sum(0)])
    alone = (by_person[:, 0] / by_person[:, 1]).tolist()
    assert row["loss_interval"] == pytest.approx([min(alone), max(alone)])


def test_what_is_known_of_one_stands_before_their_own_questions(settings: PeopleSettings, tmp_path: Path) -> None:
    table = plain_table(settings, tmp_path, [one for one in PEOPLE if one.held_out])
    people, speaker = table.people, table.speaker
    _, profile, found = table.contenders()[:3]
    for place, says in enumerate("421"):
        assert people.profiles[place][:1200] in profile.prompt(place, "Question 3?")
        assert found.prompt(place, "Question 3?").count(f"Answered: {says}") == 3
    name = "model.layers.0.self_attn.q_proj"
    outside, inside = speaker.base.get_submodule(name).weight.shape
    made = [{name: (torch.ones(1, inside), torch.full((outside, 1), 0.1 * place))} for place in range(3)]
    alone = speaker.losses(table.apart).sum(0)
    assert table.unrelated(None) == pytest.approx(float(alone[0] / alone[1]))
    by_hand = torch.stack([speaker.losses([row], [own])[0] for row, own in zip(table.apart, made, strict=True)]).sum(0)
    assert table.unrelated(made) == pytest.approx(float(by_hand[0] / by_hand[1])) != table.unrelated(None)


def test_adapters_are_made_of_what_they_are_called(
    settings: PeopleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    persons = [person("cyd", "4", 8), person("dan", "2", 12), person("eve", "1", 16)]
    base, tokenizer = load_base(str(tmp_path / "base"), dtype=torch.float32)
    people, speaker = People(persons, ENCODER), Speaker(base.requires_grad_(False), tokenizer, new_tokens=2)
    pool, net = PiecePool.load(tmp_path / "pool"), TextNet.load(tmp_path / "net")
    for head in net.heads.values():
        torch.nn.init.normal_(head)
    made = PeopleAdapters(replace(settings, epochs=1), people, speaker, pool, net, tmp_path / "work", "mark")
    learnt: dict[int, Any] = {}  # by how much somebody said, what was beneath
    train = people_adapters.train_adapters

    def seen(base: Any, rows: Any, *given: Any, below: Any) -> Any:
        learnt.update({len(own): under for own, under in zip(rows, below, strict=True)})
        return train(base, rows, *given, below=below)

    monkeypatch.setattr(people_adapters, "train_adapters", seen)
    task = of_adapter(Adapter.load(settings.task))  # type: ignore[arg-type]

    def same(one: Any, *parts: Any) -> bool:
        wanted = concatenated(parts)
        return one.keys() == wanted.keys() and all(
            torch.allclose(B @ A, wanted[name][1] @ wanted[name][0], atol=1e-5) for name, (A, B) in one.items()
        )

    anchors = [pool.factors(pool.nearest(own.mean(0))) for own in people.embedded]
    on_top = [concatenated([task, one]) for one in anchors]
    for place, one in enumerate(made["anchors"].adapters):
        assert same(one, on_top[place])
    small = made["anchors and rank 4"].adapters
    name = pool.config.modules[0]
    for place, one in enumerate(small):
        assert same(learnt[len(people.histories[place])], on_top[place])
        beneath, (A, _) = on_top[place][name][0], one[name]
        assert len(A) == len(beneath) + 4 and torch.equal(A[:-4], beneath)
    history = [[pieces.messages(one) for one in some] for some in people.histories]
    with generated(base, stacked([task])):
        chosen = [pool.factors(pool.assemble(base, tokenizer, some)) for some in history]
    for place, one in enumerate(made["pieces"].adapters):
        assert same(one, task, chosen[place])
        assert not same(one, task, pool.factors(pool.assemble(base, tokenizer, history[place])))
    assert all(same(one, task) for one in made.of_the_task)
    of_profiles, random = made["profile's adapter"].adapters, made.of_random_directions
    assert all(
        same(one, own)
        for one, own in zip(of_profiles, factors_from_texts(net, ENCODER.encode, people.profiles), strict=True)
    )
    assert not any(same(one, other) for one in random for other in of_profiles)


def test_a_learning_rate_is_chosen_by_validation_alone(settings: PeopleSettings, tmp_path: Path) -> None:
    judged: list[Any] = []
    one_rate = replace(settings, epochs=1, learning_rates=(1e-2,))
    table = plain_table(one_rate, tmp_path, [one for one in PEOPLE if one.held_out])
    losses = table.speaker.losses

    def seen(rows: Any, own: Any = None) -> torch.Tensor:
        judged.extend(rows)
        return losses(rows, own)

    table.speaker.losses = seen  # type: ignore[method-assign]
    assert table.adapters[OWN].learning_rate == 1e-2
    wanted = [one for person in table.people.persons for one in person.interactions("validation")]
    assert [row.input_ids.tolist() for row in judged] == [
        row.input_ids.tolist() for row in encoded(wanted, table.speaker.tokenizer)
    ]


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    cost = {
        way: {name: value for name, value in one.items() if "seconds" not in name}
        for way, one in report["cost"].items()
    }
    return {**report, "cost": cost}


class Stopping:
    """Counts the calls of a function, and interrupts one of them."""

    def __init__(self, function: Callable[..., Any], at: int) -> None:
        self.function, self.at, self.calls = function, at, 0

    def __get__(self, one: object, kind: type) -> Callable[..., Any]:
        return partial(self, one)

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.calls += 1
        if self.calls == self.at:
            raise KeyboardInterrupt
        return self.function(*given, **named)


def test_an_interrupted_table_goes_on(
    settings: PeopleSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def go(out: str, train_stops: int = 0, ask_stops: int = 0, **changed: Any) -> tuple[Any, int, int]:
        """The report, and how often adapters were trained and a way was asked."""
        with monkeypatch.context() as patch:
            training = Stopping(people_adapters.train_adapters, train_stops)
            asking = Stopping(PeopleTable.asking, ask_stops)
            patch.setattr(people_adapters, "train_adapters", training)
            patch.setattr(PeopleTable, "asking", asking)
            try:
                report = run(replace(settings, **changed), ENCODER, tmp_path / out, "x")
            except KeyboardInterrupt:
                report = None
            return report, training.calls, asking.calls

    # Of three people two learn at once, two trainings for each of two learning rates; on top of the anchors, where each
    # has four times as many tokens in a step, one.
    whole = go("whole.json")
    assert whole[1:] == (7, len(WAYS)) and list(tmp_path.glob(".whole/*.safetensors*")) == []
    assert go("o.json", train_stops=4) == (None, 4, 0)  # in the second rate
    assert go("o.json", ask_stops=7) == (None, 5, 7)  # which alone is trained again
    assert not (tmp_path / "o.json").is_file() and len(list(tmp_path.glob(".o/*.safetensors"))) == 6
    report, trained, asked = go("o.json")
    assert (trained, asked) == (0, len(WAYS) - 6)
    assert without_times(report) == without_times(whole[0])
    assert report == json.loads((tmp_path / "o.json").read_text())
    assert go("o.json") == (report, 0, 0)
    # Nothing is used of other settings, of other people, or of an adapter that was trained anew.
    assert go("o.json", questions=1)[1:] == (7, len(WAYS))
    monkeypatch.setattr(people_table, "read_people", lambda name, folder: [*PEOPLE[:-1], person("eve", "5", 8, True)])
    changed = go("o.json", questions=1)
    assert changed[1:] == (7, len(WAYS))
    net = TextNet.load(settings.net)  # type: ignore[arg-type]
    torch.nn.init.zeros_(next(iter(net.bias_B.values())))
    shutil.rmtree(settings.net)  # type: ignore[arg-type]
    net.save(settings.net)  # type: ignore[arg-type]
    again = go("o.json", questions=1)
    assert again[1:] == (7, len(WAYS)) and again[0]["rows"] != changed[0]["rows"]


def test_the_lines_by_hand() -> None:
    def way(name: str, loss: float, accuracy: float) -> dict[str, Any]:
        return {"contender": name, "loss": loss, "loss_interval": [loss - 0.25, loss + 0.25], "accuracy": accuracy}

    report = {
        "rows": [
            way("base", 3.0, 0.1), way("base, search in the prompt", 2.0, 0.5), way("task's adapter", 2.0, 0.2),
            way("task's adapter, search in the prompt", 2.0, 0.4), way("own adapter", 1.0, 0.8),
            way("pieces", 1.0, 0.4), way("pieces, weights fitted", 1.0, 0.6), way("anchors and rank 4", 1.0, 0.7),
            way("profile's adapter", 1.0, 0.3),
            way("profile's adapter, another's", 1.25, 0.3), way("profile's adapter, of a random direction", 2.0, 0.3),
        ],
        "cost": {"pieces": {"kept_bytes": 1500.0}, "pieces, weights fitted": {"kept_bytes": 1000.0},
                 "profile's adapter": {"seconds_of_one": 0.04, "seconds_of_batch": 0.6}},
        "peak_bytes": 1,
    }  # fmt: skip
    found = must(report)
    assert [one["value"] for one in found] == pytest.approx([1.5, -0.25, 0.5, 0.04, 0.6, 0.75, 1000, 0.3])
    assert [one["holds"] for one in found] == [True, False, True, True, False, False, True, True]
    assert found[5]["note"].endswith("as in the paper: 0.500")
    assert len(must({**report, "peak_bytes": None})) == 6  # seconds are bounded on a GPU alone


def test_numbers_and_texts_are_judged_by_what_they_are() -> None:
    assert people_table._worth(["4", "x", "3.5"], ["4.0", "1", "3"]) == {
        "accuracy": [1.0, 0.0, 0.0], "mae": [0.0, 4.0, 0.5]
    }  # fmt: skip
    found = people_table._worth(["the cat", "no"], ["the cat sat", "yes"])
    assert found["rouge_1"] == pytest.approx([0.8, 0.0]) and found["rouge_l"] == pytest.approx([0.8, 0.0])


def test_what_does_not_fit(settings: PeopleSettings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="on top of the task's adapter"):
        run(replace(settings, task=None), ENCODER, tmp_path / "o.json", "x")
    file = tmp_path / "net" / "hypernet.json"
    made_for = file.read_text()
    file.write_text(json.dumps({**json.loads(made_for), "base": "somebody/of-the-same-sizes"}))
    with pytest.raises(HypernetError, match="trained for somebody/of-the-same-sizes, not for"):
        run(settings, ENCODER, tmp_path / "o.json", "x")
    file.write_text(made_for)
    with pytest.raises(ConfigError, match="found must be a whole number from 1"):
        replace(settings, found=0)
    monkeypatch.setattr(people_table, "read_people", lambda name, folder: PEOPLE[:3])
    with pytest.raises(DataError, match="fewer than two people are held out"):
        run(settings, ENCODER, tmp_path / "o.json", "x")


def test_the_configs_are_read() -> None:
    folder = Path(people_table.__file__).parent / "configs"
    for name in ("raters", "presidents"):
        assert load_settings(PeopleSettings, folder / f"people-{name}.yaml").people == name
    assert load_settings(PiecesSettings, folder / "pieces.yaml", ["people=x", "out=y"]).sharers == 50
    assert load_settings(TextHypernetSettings, folder / "profile-net.yaml", ["data.folder=x", "out=y"]).net.head == "M"
    files = ["data.train=a", "data.validation=b", "out=y"]
    assert load_settings(AdapterTrainSettings, folder / "task.yaml", files).epochs == 1
