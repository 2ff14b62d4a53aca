"""The table of what a document's adapter knows: its metrics, its batches, and the whole on a tiny base."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from molora.cli import app
from molora.errors import DataError
from molora.personalize.document_net import DocumentNet
from molora.personalize.generated import generated
from molora_training import document_table
from molora_training.data import Example, write_examples
from molora_training.data.lessons import Lesson, of_kind, write_lessons
from molora_training.document_table import Table, exact, f1, rouge_l
from molora_training.hypernet.facts import JUDGED
from molora_training.hypernet.lessons import Needles
from tests.unit.spoken import make_spoken
from tests.unit.test_internalize import make_net

LESSONS = [
    Lesson(f"The hat of {who} is {colour}.", ((f"Hat of {who}?", colour), ("Is it a hat?", "Yes.")))
    for who, colour in (("Ada", "red"), ("Bob", "blue"), ("Eve", "green"))
]


def test_metrics_are_squads_and_rouges() -> None:
    assert f1("The cat sat.", "a cat") == pytest.approx(2 * 1 / 3)
    assert (
        f1("no", "yes") == 0.0 and f1("", "") == 1.0 and exact("The Cat!", "cat") == 1.0 and exact("cats", "cat") == 0.0
    )
    assert rouge_l("the cat sat", "the cat") == pytest.approx(0.8)


@torch.no_grad()
def test_a_batch_of_answers_is_each_alone(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base), batch=3)
    texts = [
        "one text",
        "another one, which is a good deal longer than a chunk of the network is, so that it has two",
        "x",
    ]
    factors = [table.factors(text) for text in texts]
    prompts = ["a", "a longer question?", "what"]
    together = table.speaker.answers(prompts, factors)
    assert together == [table.speaker.answers([prompt], [own])[0] for prompt, own in zip(prompts, factors, strict=True)]
    assert together != table.speaker.answers(prompts)
    ids = model.tokenizer(
        "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n", add_special_tokens=False, return_tensors="pt"
    )["input_ids"]
    with generated(model.base, {name: (A[None], B[None]) for name, (A, B) in factors[0].items()}):
        new, end = document_table.NEW_TOKENS, table.speaker.end
        said = model.base.generate(ids, max_new_tokens=new, do_sample=False, eos_token_id=end, pad_token_id=0)
    assert together[0] == model.tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()


@torch.no_grad()
def test_unrelated_text_under_a_network_that_has_not_learnt_is_the_bases(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base, trained=False))
    rows = [document_table.encode_within([_example(n)], model.tokenizer, 1024, ["science"])[0] for n in range(5)]
    found = table.unrelated(rows, LESSONS)
    assert found["adapter"] == found["base"] > 0
    other = Table(model.base, model.tokenizer, make_net(model.base)).unrelated(rows, LESSONS)
    assert other["base"] == found["base"] != other["adapter"]


def test_the_share_is_from_the_higher_floor_to_the_higher_ceiling() -> None:
    found = {"base": 0.1, "adapter of the text": 0.5, "adapter of another text": 0.3, "what every text has": 0.2,
             "text in the prompt": 0.3, "text in the prompt, with what every text has": 0.6}  # fmt: skip
    report = {
        "rows": [
            {"kind": kind, "contender": name, "f1": value / part, "rouge_l": value / part}
            for kind, part in (("words", 1), ("yes or no", 9))
            for name, value in found.items()
        ]
        + [{"kind": "words", "contender": document_table.OVER, "f1_interval": [-0.1, 0.5]}],
        "needles": [{"times": times, "recall": 1.0, "recall at rank 8": 0.9} for times in (1, 4, 16)],
        "unrelated": {"base": 2.0, "adapter": 2.1},
        "cost": {"seconds": 0.1},
    }
    *shares, over = [line for line in document_table.must(report) if line["name"].startswith("passages")]
    assert [line["value"] for line in shares] == pytest.approx([0.75, 0.75]) and len(shares) == 2
    assert over["value"] == -0.1 and not over["holds"] and all(line["holds"] for line in shares)
    others = [line for line in document_table.must(report) if not line["name"].startswith("passages")]
    assert [(line["value"], line["bar"], line["holds"]) for line in others] == [
        (0.9, 0.95, False), (0.9, 0.8, True), (pytest.approx(0.05), 0.03, False), (0.1, 5.0, True)
    ]  # fmt: skip
    on_gpu = document_table.must({**report, "cost": {"seconds": 0.2, "peak_bytes": 1.0}})
    assert (on_gpu[-1]["bar"], on_gpu[-1]["holds"]) == (0.15, False)
    assert {line["bar"] for line in shares} == {0.75}
    report["rows"][4]["f1"] = 0.1  # type: ignore[index]
    report["rows"][5]["f1"] = 0.2  # type: ignore[index]
    shares = [line for line in document_table.must(report) if line["name"].startswith("passages")]
    assert shares[0]["value"] == 0.0 and shares[0]["note"].endswith("20.0% with it, 50.0% with the text's adapter")
    assert shares[1]["value"] == pytest.approx(0.75) and shares[1]["note"] == "another text's adapter: 0.250"


def test_the_own_adapter_is_compared_text_by_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base))
    told = {"adapter of the text": [1.0, 0.5, 0.75], "adapter of another text": [0.0, 0.25, 1.0]}
    monkeypatch.setattr(
        table, "_scores", lambda one, _: {"f1": torch.tensor(told.get(one.name, [0.0] * 3), dtype=torch.float64)}
    )
    *_, last = table.passages(LESSONS)
    assert last["contender"] == "adapter of the text, over that of another"
    assert last["f1"] == pytest.approx(1.0 / 3) and last["f1_interval"][0] < 0 < last["f1_interval"][1]


def test_questions_are_told_apart_by_their_answers() -> None:
    lesson = Lesson("A text.", (("Is it?", "Yes."), ("What?", "Yesterday"), ("Was it?", "no"), ("Who?", "No one")))
    assert of_kind([lesson, Lesson("Other.", (("Is it?", "No"),))], "words") == [
        Lesson("A text.", (("What?", "Yesterday"), ("Who?", "No one")))
    ]
    assert [len(one.questions) for one in of_kind([lesson], "yes or no")] == [2]


def test_what_every_text_has_is_the_networks_own_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base))
    given: dict[str, Any] = {}

    def scores(one: document_table.Contender, _: Any) -> dict[str, torch.Tensor]:
        given[one.name] = one.factors and one.factors(0)
        return {"f1": torch.zeros(3)}

    monkeypatch.setattr(table, "_scores", scores)
    table.passages(LESSONS)
    for name, (A, B) in given["what every text has"].items():
        layer, inner = int(name.split(".")[2]), name.rsplit(".", 1)[1]
        bias_A, bias_B = table.net.learned()[inner]
        torch.testing.assert_close(B @ A, bias_B[layer] @ bias_A[layer])
        whole_A, whole_B = given["adapter of the text"][name]
        torch.testing.assert_close(whole_A[: len(A)], A)
        torch.testing.assert_close(whole_B[:, : B.shape[1]], B)
    assert given["base"] is None and given["text in the prompt"] is None
    assert given["text in the prompt, with what every text has"] is given["what every text has"]


def save_net(folder: Path) -> None:
    """A network in ``net``, for a base in ``base``."""
    model = make_spoken(folder / "adapters")
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")  # type: ignore[union-attr]
    net = make_net(model.base)
    object.__setattr__(net.config, "base", str(folder / "base"))
    net.save(folder / "net")


def test_one_passage_has_no_other_to_be_compared_with(tmp_path: Path) -> None:
    save_net(tmp_path)
    write_lessons(tmp_path / "passages.test.jsonl", LESSONS)
    with pytest.raises(DataError, match="fewer than two passages"):
        document_table.run(tmp_path / "net", tmp_path, None, tmp_path / "o.json", "x", limit=1)


def test_each_contender_is_what_it_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base, rank=9))
    every: dict[str, document_table.Contender] = {}

    def scores(one: document_table.Contender, _: Any) -> dict[str, torch.Tensor]:
        every[one.name] = one
        return {"f1": torch.zeros(3)}

    monkeypatch.setattr(table, "_scores", scores)
    table.passages(LESSONS)

    def acts(name: str, place: int) -> dict[str, torch.Tensor]:
        factors = every[name].factors
        assert factors is not None
        return {module: B @ A for module, (A, B) in factors(place).items()}

    def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
        return all(torch.allclose(delta, other[module], atol=1e-4) for module, delta in one.items())

    for place, lesson in enumerate(LESSONS):
        own, other = acts("adapter of the text", place), acts("adapter of another text", place)
        assert same(own, {name: B @ A for name, (A, B) in table.factors(lesson.text).items()})
        assert not same(own, other) and same(other, acts("adapter of the text", (place + 1) % 3))
        mixed = acts("adapter of the text's words, shuffled", place)
        assert not same(mixed, own) and not same(mixed, other)
        short = every["adapter of the text, cut to rank 8"].factors(place)  # type: ignore[misc]
        assert max(len(A) for A, _ in short.values()) <= document_table.CUT
        shown = every["text in the prompt"].prompt(lesson, "Which?")
        assert (
            shown
            == f"{lesson.text}\n\nWhich?"
            == every["text in the prompt, with what every text has"].prompt(lesson, "Which?")
        )
        found = every["search over all texts"].prompt(lesson, f"Hat of {lesson.text.split()[3]}?")
        assert found.startswith(lesson.text) and found.endswith("?") and found.count("\n") >= 2
        assert (
            every["adapter of the text"].prompt(lesson, "Which?") == "Which?" == every["base"].prompt(lesson, "Which?")
        )


def test_a_needle_is_found_where_its_number_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole adapters say the number and cut ones another, as who would be asked both shows."""
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base, rank=9))
    lessons = Needles((64, 64), seed=1, count=2).of_length(64)

    def answers(prompts: Any, own: Any) -> list[str]:
        assert prompts == [lesson.questions[0][0] for lesson in lessons]
        whole = all(len(A) > document_table.CUT for one in own for A, _ in one.values())
        right = [lesson.questions[0][1] for lesson in lessons]
        return right if whole else [right[0], right[1].replace(".", "0.")]  # a longer number is another one

    monkeypatch.setattr(table.speaker, "answers", answers)
    found = table.recall(64, 2)
    assert (found["recall"], found["recall at rank 8"]) == (1.0, 0.5) and found["rank"] > document_table.CUT


@torch.no_grad()
def test_a_texts_score_is_the_mean_over_its_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    table = Table(model.base, model.tokenizer, make_net(model.base))
    lessons = [Lesson("A.", (("1?", "yes"), ("2?", "no"), ("3?", "no"))), Lesson("B.", (("4?", "yes"),))]
    monkeypatch.setattr(table.speaker, "answers", lambda prompts, own: ["yes" for _ in prompts])
    found = table._scores(document_table.Contender("x", lambda _, question: question), lessons)
    assert found["exact"].tolist() == pytest.approx([1 / 3, 1.0])


def test_the_command_writes_every_row_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    save_net(tmp_path)
    (tmp_path / "net/metrics.json").write_text(json.dumps({"longest": 64, "settings": {"task": "passages"}}))
    write_lessons(tmp_path / "data/passages.test.jsonl", LESSONS)
    write_examples(tmp_path / "data/science.test.jsonl", [_example(n) for n in range(3)])
    monkeypatch.setattr(document_table, "NEW_TOKENS", 3)
    app(
        ["eval", "documents", str(tmp_path / "net"), "--data", str(tmp_path / "data"), "--out",
         str(tmp_path / "o.json"), "--limit", "3", "--needles", "2", "--json"],
        standalone_mode=False,
    )  # fmt: skip
    report = json.loads(capsys.readouterr().out)
    assert report == json.loads((tmp_path / "o.json").read_text())
    names = [
        "base", "adapter of the text", "adapter of the text, cut to rank 8", "adapter of another text",
        "adapter of the text's words, shuffled", "what every text has", "text in the prompt",
        "text in the prompt, with what every text has", "search over all texts",
        "adapter of the text, over that of another",
    ]  # fmt: skip
    assert [(row["kind"], row["contender"]) for row in report["rows"]] == [
        (kind, name) for kind in ("words", "yes or no", *JUDGED) for name in names
    ]
    assert report["data"].startswith(
        "of the test split 3 passages with questions that are answered in words and 3 with"
    )
    assert report["task"] == "passages"
    assert [one["tokens"] for one in report["needles"]] == [64, 128, 256, 1024]
    assert report["needles"][3]["rank"] > report["needles"][0]["rank"]
    assert all(
        (-1 if "over" in row["contender"].split(", ")[-1].split() else 0)
        <= row[f"{name}_interval"][0]
        <= row[name]
        <= row[f"{name}_interval"][1]
        <= 1
        for row in report["rows"]
        for name in ("f1", "rouge_l", "exact")
    )
    assert len(report["must"]) == 7 and report["cost"]["bytes at rank 8"] > 0
    assert isinstance(DocumentNet.load(tmp_path / "net"), DocumentNet)


def _example(number: int) -> Example:
    messages = (
        {"role": "user", "content": f"Question {number}?"},
        {"role": "assistant", "content": f"Answer {number}."},
    )
    return Example(f"s{number}", "science", "test", messages)
