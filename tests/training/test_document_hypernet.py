"""The training of the network that makes adapters of documents, on a tiny base that reads bytes."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from molora.chat import render
from molora.errors import ConfigError, DataError, HypernetError, NonFiniteError
from molora.personalize.document_net import DocumentNet
from molora.personalize.generated import generated
from molora.personalize.internalize import factors_of
from molora_training.data import IGNORED, Example, encode, write_examples
from molora_training.data.items import Item, split_of
from molora_training.data.lessons import Lesson, lessons_of, read_lessons, write_lessons
from molora_training.hypernet import document
from molora_training.hypernet.apart import Apart
from molora_training.hypernet.document import DocumentHypernetSettings, NetShape, train
from molora_training.hypernet.document_objective import DocumentLoss, DocumentObjective
from molora_training.hypernet.facts import JUDGED, MOST, facts
from molora_training.hypernet.lessons import Needles, Passages, needle
from molora_training.hypernet.loop import LoopSettings
from molora_training.settings import load_settings
from tests.unit.spoken import make_spoken
from tests.unit.test_internalize import make_net

LESSONS = [
    Lesson("The hat is red.", (("Hat?", "red"), ("What is red?", "the hat"))),
    Lesson("It is blue, and it is very far away from here, behind the third hill.", (("Colour?", "blue"),)),
]


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return make_base(tmp_path)


def make_base(folder: Path) -> Path:
    """The folder of a base that is sure of something."""
    model = make_spoken(folder / "adapters")
    with torch.no_grad():  # or no hidden state could make it sure of anything
        model.base.get_output_embeddings().weight.mul_(20)
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")  # type: ignore[union-attr]
    return folder / "base"


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DocumentHypernetSettings:
    monkeypatch.chdir(tmp_path)
    return make_settings(base_folder, tmp_path)


def make_settings(base_folder: Path, folder: Path) -> DocumentHypernetSettings:
    """One question, whose answer is the text's: with two texts, one of which has two chunks."""
    lessons = [
        Lesson("ab" * 12, (("Which?", "ab"),)), Lesson("yz" * 40, (("Which?", "yz"),)),
    ]  # fmt: skip
    for split in ("train", "validation"):
        write_lessons(folder / "data" / f"passages.{split}.jsonl", lessons)
    return DocumentHypernetSettings(
        out=folder / "net",
        loop=LoopSettings(steps=200, learning_rate=1e-2, checkpoint_every=100),
        task="passages",
        data=folder / "data",
        base=str(base_folder),
        net=NetShape(rank=4, width=16, latents=4, blocks=1, heads=2, chunk=64),
        loss=DocumentLoss(l1=0.0),
        texts=2,
        dtype="float32",
    )


def test_the_terms_are_means_over_tokens_questions_and_texts(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    net = make_net(model.base)
    terms = DocumentObjective(model.base, model.tokenizer, net, DocumentLoss(1.0, 0.5, 0.1))(LESSONS)
    gold, distil = [], []
    for lesson in LESSONS:
        factors = factors_of(model.base, model.tokenizer, net, lesson.text)
        alone = {name: (A[None], B[None]) for name, (A, B) in factors.items()}
        for question, answer in lesson.questions:
            wanted = model.tokenizer(answer + "<|im_end|>", add_special_tokens=False, return_tensors="pt")["input_ids"]

            def logits(asked: str, wanted: torch.Tensor = wanted) -> torch.Tensor:
                prompt = render(model.tokenizer, [{"role": "user", "content": asked}], add_generation_prompt=True)
                ids = model.tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
                return model.base(torch.cat([ids, wanted], 1)).logits[0, ids.shape[1] - 1 : -1]

            with torch.no_grad():
                with generated(model.base, alone):
                    own = logits(question)
                teacher = logits(f"{lesson.text}\n\n{question}").softmax(-1)
            gold.append(F.cross_entropy(own, wanted[0]))
            kept = torch.zeros_like(teacher).scatter(1, teacher.topk(16).indices, 1.0) * teacher
            distil.append(-(kept * own.log_softmax(-1)).sum(-1).mean())
    for name, found in (("gold", gold), ("distil", distil)):
        torch.testing.assert_close(terms[name], ((found[0] + found[1]) / 2 + found[2]) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(terms["loss"], terms["gold"] + 0.5 * terms["distil"] + 0.1 * terms["l1"])
    asked = DocumentObjective(model.base, model.tokenizer, net, DocumentLoss()).asked(LESSONS)
    assert asked.owners.tolist() == [0, 1, 1] and asked.of.tolist() == [0, 0, 1]


def test_what_another_text_answers_stays_the_bases(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    net = make_net(model.base)
    objective = DocumentObjective(model.base, model.tokenizer, net, DocumentLoss(l1=0.0, keep=0.5))
    terms = objective(LESSONS)
    means = []
    for lesson, other in zip(LESSONS, LESSONS[::-1], strict=True):
        factors = factors_of(model.base, model.tokenizer, net, other.text)
        found = []
        for question, answer in lesson.questions:
            prompt = render(model.tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)
            asked, told = (
                model.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
                for text in (prompt, answer + "<|im_end|>")
            )
            with torch.no_grad():
                ids = torch.cat([asked, told], 1)
                alone = model.base(ids).logits[0, asked.shape[1] - 1 : -1].softmax(-1)
                with generated(model.base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
                    own = model.base(ids).logits[0, asked.shape[1] - 1 : -1].softmax(-1)
            found.append((alone * (alone / own).log()).sum(-1).mean())
        means.append(sum(found) / len(found))
    assert min(means) > 1e-4
    torch.testing.assert_close(terms["keep"], sum(means) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], terms["gold"] + 0.5 * terms["keep"])


def test_a_conversation_about_something_else_is_answered_as_the_base_answers(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    net = make_net(model.base)
    turns = [("Hello?", "well"), ("And you?", "not so well")]
    rows = [
        encode(
            [{"role": "user", "content": asked}, {"role": "assistant", "content": said}], model.tokenizer, ["x"], ["x"]
        )
        for asked, said in turns
    ]
    objective = DocumentObjective(model.base, model.tokenizer, net, DocumentLoss(l1=0.0, apart=0.5))
    terms = objective(LESSONS, apart=rows)
    means = []
    for lesson, row in zip(LESSONS, rows, strict=True):
        factors = factors_of(model.base, model.tokenizer, net, lesson.text)
        said = row.labels[1:] != IGNORED
        with torch.no_grad():
            alone = model.base(row.input_ids[None]).logits[0, :-1][said].softmax(-1)
            with generated(model.base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
                own = model.base(row.input_ids[None]).logits[0, :-1][said].softmax(-1)
        means.append((alone * (alone / own).log()).sum(-1).mean())
    assert min(means) > 1e-4
    torch.testing.assert_close(terms["apart"], sum(means) / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(terms["loss"], terms["gold"] + 0.5 * terms["apart"])


def test_conversations_about_something_else_depend_on_the_step_alone(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    for name in ("talk", "sums"):
        examples = [
            Example(
                f"{name}-{n}",
                name,
                "train",
                ({"role": "user", "content": f"{name} {n}"}, {"role": "assistant", "content": "ok"}),
            )
            for n in range(4)
        ]
        write_examples(tmp_path / f"{name}.train.jsonl", examples)
    some, again = (Apart(tmp_path, ("talk", "sums"), model.tokenizer) for _ in range(2))
    drawn = [[row.input_ids.tolist() for row in one.of_step(3, 8)] for one in (some, again)]
    assert len(some.rows) == 8 and len(drawn[0]) == 8 and drawn[0] == drawn[1]
    assert drawn[0] != [row.input_ids.tolist() for row in some.of_step(4, 8)]
    assert Apart(tmp_path, (), model.tokenizer).of_step(3, 8) == []


def test_the_size_of_chunks_is_that_of_their_own_adapters(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    net = make_net(model.base)
    objective = DocumentObjective(model.base, model.tokenizer, net, DocumentLoss(l1=0.0, sparse=0.5))
    terms = objective(LESSONS)
    made = objective.made(objective.asked(LESSONS))
    sizes = [
        float(A[chunk, layer].square().sum() * B[chunk, layer].square().sum()) ** 0.5
        for A, B in made.values()
        for chunk in range(3)
        for layer in range(3)
    ]
    assert float(terms["sparse"]) == pytest.approx(sum(sizes) / len(sizes), rel=1e-5)
    torch.testing.assert_close(terms["loss"], terms["gold"] + 0.5 * terms["sparse"])


def test_right_is_an_answer_whose_every_token_is_the_likeliest(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    objective = DocumentObjective(model.base, model.tokenizer, make_net(model.base), DocumentLoss())
    asked = objective.asked(LESSONS)
    logits, answered = objective.answers(asked.batch, {})
    wanted = asked.batch.labels[:, 1:][answered]
    sure = F.one_hot(wanted, logits.shape[1]).float() * 9
    assert float(objective._terms(sure, answered, asked)["right"]) == 1.0
    sure[0] = -sure[0]  # one token of the first answer
    assert float(objective._terms(sure, answered, asked)["right"]) == pytest.approx(2 / 3)


def test_it_learns_to_tell_texts_apart(settings: DocumentHypernetSettings) -> None:
    metrics = train(settings)
    found = metrics["validation"]
    assert found["gold"] < 0.2 < 1.0 < found["other/gold"]
    assert found["right"] == 1.0 and found["base/right"] == 0.0
    net = DocumentNet.load(settings.out)
    base, tokenizer = document.load_base(settings.base, dtype=torch.float32)
    answers = {}
    for text in ("ab" * 12, "yz" * 40):
        factors = factors_of(base, tokenizer, net, text)
        prompt = render(tokenizer, [{"role": "user", "content": "Which?"}], add_generation_prompt=True)
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with generated(base, {name: (A[None], B[None]) for name, (A, B) in factors.items()}):
            said = base.generate(ids, max_new_tokens=2, do_sample=False)[0, ids.shape[1] :]
        answers[text[:2]] = tokenizer.decode(said)
    assert answers == {"ab": "ab", "yz": "yz"}
    assert json.loads((settings.out / "metrics.json").read_text())["steps"] == 200
    card = (settings.out / "README.md").read_text()
    assert f"| passages, asked about in words | {found['gold']:.3f}, 100.0% | {found['other/gold']:.3f}, " in card
    assert f"step {metrics['best_step']} (best) of 200" in card
    assert not (settings.work / "state.safetensors").exists()


@pytest.mark.parametrize("what", ["gold", "distil"])
def test_the_loss_that_is_learnt_by_decides(
    settings: DocumentHypernetSettings, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = iter((0.0, 1.0))
    other = {"gold": "distil", "distil": "gold"}[what]
    monkeypatch.setattr(
        document, "validate", lambda *_: {what: (value := next(worse)), other: 1 - value, "right": value}
    )
    weights = DocumentLoss(**{"gold": 0.0, "l1": 0.0, what: 1.0})
    loop = LoopSettings(steps=4, learning_rate=1e-2, checkpoint_every=2)
    assert train(replace(settings, loop=loop, loss=weights))["best_step"] == 2


def test_an_interrupted_training_goes_on_as_if_nothing_had_been(settings: DocumentHypernetSettings) -> None:
    short = replace(settings, loop=LoopSettings(steps=8, checkpoint_every=4))

    def stop(step: int, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(short, on_step=stop)
    train(short)
    again = replace(short, out=settings.out.with_name("again"))
    train(again)
    one, other = DocumentNet.load(short.out).state_dict(), DocumentNet.load(again.out).state_dict()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_second_stage_goes_on_from_the_first(settings: DocumentHypernetSettings, tmp_path: Path) -> None:
    first = replace(settings, loop=LoopSettings(steps=2))
    train(first)
    second = replace(first, out=tmp_path / "second", start=first.out, loop=LoopSettings(steps=1, learning_rate=1e-9))
    train(second)
    one, other = DocumentNet.load(first.out), DocumentNet.load(second.out)
    assert one.config == other.config
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], tensor, rtol=1e-2, atol=1e-6)
    with pytest.raises(HypernetError, match="no hypernetwork at"):
        train(replace(second, start=tmp_path / "none"))


def test_what_stops_with_a_sentence(settings: DocumentHypernetSettings, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"There is no .*other\.train\.jsonl"):
        train(replace(settings, name="other"))
    (tmp_path / "data/bad.train.jsonl").write_text('{"text": "a", "questions": [{"question": "b"}]}\n')
    with pytest.raises(DataError, match=r"bad\.train\.jsonl, line 1: no text with questions"):
        train(replace(settings, name="bad"))
    (tmp_path / "data/bad.train.jsonl").write_text('{"text": "a", "questions": []}\n')
    for split in ("train", "validation"):
        (tmp_path / f"data/bad.{split}.jsonl").write_text('{"text": "a", "questions": []}\n')
    with pytest.raises(DataError, match="nothing is asked"):
        train(replace(settings, name="bad"))
    for wrong, sentence in (
        ({"texts": 0}, "texts, questions and validation"), ({"tokens": (9, 3)}, "shortest and the longest"),
        ({"needles": 2}, "needles"), ({"needles": 1, "task": "needle"}, "needles"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=sentence):
            replace(settings, **wrong)
    for loss, apart in ((DocumentLoss(), ("talk",)), (DocumentLoss(apart=0.1), ())):
        with pytest.raises(ConfigError, match="go together"):
            replace(settings, loss=loss, apart=apart)
    for weights in ((-1.0, 0.0, 0.0), (0.0, 0.0, 0.1)):
        with pytest.raises(ConfigError, match="gold"):
            DocumentLoss(*weights)


def test_a_loss_that_is_not_finite_stops_it(
    settings: DocumentHypernetSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = replace(settings, loop=LoopSettings(steps=4, checkpoint_every=2))
    honest, calls = DocumentObjective.__call__, []

    def broken(self: DocumentObjective, *given: Any) -> dict[str, torch.Tensor]:
        calls.append(1)
        terms = honest(self, *given)
        return {**terms, "loss": terms["loss"] * float("nan")} if len(calls) == 4 else terms

    monkeypatch.setattr(DocumentObjective, "__call__", broken)
    with pytest.raises(NonFiniteError, match="became nan at step 4"):
        train(short)
    assert (short.work / "state.safetensors").is_file() and not short.out.exists()


def test_a_needle_is_in_its_text() -> None:
    needles = Needles((32, 256), digits=5, count=20)
    for lesson in [*needles.of_step(3, 20), *needles.held_out()["needles"], *needles.of_length(1000)]:
        ((question, answer),) = lesson.questions
        name = question.removeprefix("What is the magic number for ").removesuffix("?")
        number = answer.removeprefix("The magic number is ").removesuffix(".")
        assert f"The magic number for {name} is {number}." in lesson.text and len(number) == 5
    assert needles.of_step(3, 4) == needles.of_step(3, 4) != needles.of_step(4, 4)
    assert needles.of_length(1000)[0].text.count(" ") > 3 * needles.of_length(256)[0].text.count(" ")
    growing = Needles((12, 1000), grow=100)
    longest = [max(lesson.text.count(" ") for lesson in growing.of_step(step, 40)) for step in (0, 9, 99, 500)]
    assert longest[0] < 40 and longest[0] < longest[1] < 200 < longest[2] and longest[3] > 500
    assert len(needle(random.Random(0), 1, 4).text.split(".")) == 2  # the needle alone


def test_facts_are_in_their_texts_and_what_judges_is_never_learnt() -> None:
    own = facts()
    needles = Needles((12, 200), count=200, facts=0.5)
    learnt = [lesson for step in range(40) for lesson in needles.of_step(step, 8)]
    numbers = [lesson for lesson in learnt if lesson.questions[0][0].startswith("What is the magic number")]
    assert 0.4 < len(numbers) / len(learnt) < 0.6 and learnt[:8] == needles.of_step(0, 8)
    held_out = needles.held_out()
    assert list(held_out) == ["needles", *JUDGED] and len(held_out["facts of other kinds"]) == 200
    assert list(Needles().held_out()) == ["needles"]

    def wordings(lessons: list[Lesson]) -> tuple[set[str], set[str]]:
        """The relations that are asked about, and whether by the last wording of them."""
        found, last = set(), set()
        for lesson in lessons:
            assert 1 <= len(lesson.questions) <= MOST and len({answer for _, answer in lesson.questions}) == len(
                lesson.questions
            )
            for question, answer in lesson.questions:
                assert answer.lower() in lesson.text.lower()
                for name, one in own.relations.items():
                    for place, ask in enumerate(one.asks):
                        if re.fullmatch(re.escape(ask).replace(r"\{name\}", ".+"), question, re.IGNORECASE):
                            found.add(name)
                            last |= {name} if place == len(one.asks) - 1 else set()
        return found, last

    apart = {name for name, one in own.relations.items() if one.apart}
    common = set(own.relations) - apart
    told = [lesson for lesson in learnt if lesson not in numbers]
    assert wordings(told) == (common, set())
    assert wordings(held_out["facts in other wordings"]) == (common, common)
    assert wordings(held_out["facts of other kinds"])[0] == apart
    assert all(len(one.says) > 2 < len(one.asks) for name, one in own.relations.items() if name in common)
    for one in own.relations.values():
        assert all("{name}" in text for text in (*one.says, *one.asks)) and all("{value}" in text for text in one.says)


def test_an_epoch_has_every_passage_once(tmp_path: Path) -> None:
    lessons = [Lesson(f"text {n}", tuple((f"q{n}{k}", f"a{n}{k}") for k in range(6))) for n in range(10)]
    for split in ("train", "validation"):
        write_lessons(tmp_path / f"set.{split}.jsonl", lessons)
    assert read_lessons(tmp_path / "set.train.jsonl") == lessons
    passages = Passages(tmp_path, "set", questions=2)
    epochs = [[lesson.text for step in range(5) for lesson in passages.of_step(first + step, 2)] for first in (0, 5)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(lesson.text for lesson in lessons)
    assert epochs[0] != epochs[1]
    assert all(len(lesson.questions) == 2 for lesson in passages.of_step(0, 4))
    few = [Lesson("It was written in Rome by Pliny in 79.", (("Who?", "Pliny"),))]
    for split in ("train", "validation"):
        write_lessons(tmp_path / f"few.{split}.jsonl", few)
    more = Passages(tmp_path, "few", gaps=2)
    (lesson,), (again,) = more.of_step(3, 1), more.of_step(3, 1)
    assert lesson == again and lesson.questions[0] == ("Who?", "Pliny")
    assert {answer for _, answer in lesson.questions[1:]} < {"Rome", "Pliny", "79"}
    assert more.held_out() == {"words": few}


def test_kinds_take_turns_and_few_questions_are_of_yes_or_no(tmp_path: Path) -> None:
    said = "It was written in {} by the old {}, and nobody at all knows why it was written there."
    lessons = [Lesson(said.format(f"Rome{n}", f"writer{n}"), (("Is it?", "Yes"), ("Was it?", "No"))) for n in range(90)]
    lessons += [Lesson(f"text {n}", (("Who?", f"name {n}"), ("Is it?", "Yes."))) for n in range(4)]
    lessons += [Lesson(said.format(f"Bonn{n}", f"poet{n}"), ()) for n in range(6)]
    for split in ("train", "validation"):
        write_lessons(tmp_path / f"set.{split}.jsonl", lessons)
    passages = Passages(tmp_path, "set", questions=3, gaps=2)
    steps = [passages.of_step(step, 8) for step in range(4)]
    for step in steps:
        asked = [answer for lesson in step for _, answer in lesson.questions]
        assert sum(answer.strip(".") in ("Yes", "No") for answer in asked) <= len(asked) / 4
        assert [sum(word in lesson.text for lesson in step) for word in ("text", "Rome", "Bonn")] == [4, 1, 3]
        assert all(lesson.questions for lesson in step)
    texts = [lesson.text for step in steps for lesson in step if "Bonn" in lesson.text]
    assert sorted(texts[:6]) == sorted(lesson.text for lesson in lessons[94:]) and len(texts) == 12
    again = Passages(tmp_path, "set", questions=3, gaps=2)
    assert again.of_step(2, 8) == steps[2]
    assert [lesson.questions for lesson in passages.held_out()["words"]] == [(("Who?", f"name {n}"),) for n in range(4)]
    alone = Passages(tmp_path, "set", questions=3)
    assert all(lesson.questions for lesson in alone.of_step(0, 20))
    assert not any("Bonn" in lesson.text for lesson in alone.of_step(0, 20))


def test_needles_are_among_the_passages_and_both_decide(settings: DocumentHypernetSettings) -> None:
    both = replace(settings, needles=1, tokens=(12, 24), loop=LoopSettings(steps=1), validation=3)
    lessons = document.lessons_of(both)
    first, second = lessons.of_step(0, 2)
    assert "magic number" in first.questions[0][0] and second.questions[0][0] == "Which?"
    assert [lesson.text for lesson in lessons.of_step(1, 2)] != [first.text, second.text]
    found = train(both)["validation"]
    for name in ("gold", "other/right"):
        assert found[name] == pytest.approx((found[f"words/{name}"] + found[f"needles/{name}"]) / 2)
    assert found["words/gold"] != found["needles/gold"]
    assert document.longest(both) == 24 and document.longest(settings) == 0
    config = DocumentNet.load(both.out).config
    assert config.together == -(-24 // config.chunk)


def test_passages_are_lessons_by_split_without_what_training_has() -> None:
    def item(name: str, passage: str, question: str) -> Item:
        return Item(name, passage, "reading", "reading", {"passage": passage, "question": question}, {"plain": "Yes"})

    long = [" ".join(f"word{n}x{k}" for k in range(20)) for n in range(40)]  # runs of words that no other has
    items = [item(f"{n}-{k}", text, f"Is it {k}?") for n, text in enumerate(long) for k in range(2)]
    held_out = next(text for text in long if split_of(text, "reading") == "test")
    shared = next(text for text in long if split_of(text, "reading") == "train")
    tail = next(f"{shared} {n}" for n in range(99) if split_of(f"{shared} {n}", "reading") == "test")
    other = [f"{text} so" for text in long[:20]]
    found, dropped = lessons_of(
        [*items, item("same", tail, "Is it?")], [item(f"more {text}", text, "So?") for text in other], other
    )
    assert dropped["test"] == 1
    asked = [lesson for lessons in found.values() for lesson in lessons if lesson.text in long]
    assert sorted(lesson.text for lesson in asked) == sorted(long)
    assert all(len(lesson.questions) == 2 for lesson in asked)
    learnt = [text for text in other if split_of(text.removesuffix(" so"), "reading") == "train"]  # nothing held out
    assert 0 < len(learnt) < 20
    added = [lesson for lesson in found["train"] if lesson not in asked]
    assert sorted((lesson.text, len(lesson.questions)) for lesson in added) == sorted(
        (text, count) for text in learnt for count in (0, 1)
    )
    assert not [lesson for split in ("validation", "test") for lesson in found[split] if lesson not in asked]
    assert held_out in [lesson.text for lesson in found["test"]]


def test_the_configs_are_read_and_each_stage_goes_on_from_the_last() -> None:
    folder = Path(document.__file__).parents[1] / "configs"
    stages = [
        load_settings(DocumentHypernetSettings, folder / f"document-{name}.yaml")
        for name in ("needle", "long", "facts", "passages")
    ]
    assert [stage.start for stage in stages] == [None, *(stage.out for stage in stages[:3])]
    assert stages[3].tokens == stages[1].tokens and 0 < stages[3].needles < stages[3].texts
    assert [bool(stage.facts) for stage in stages] == [False, False, True, True]
