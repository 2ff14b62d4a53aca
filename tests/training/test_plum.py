"""Learning a user's adapter from conversations: what is asked about them, how it is learnt, and what stays of them."""

import json
import re
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from molora import MoLoRAModel
from molora.adapter import Adapter
from molora.base import load_base
from molora.cli import app
from molora.errors import ConfigError, DataError, NonFiniteError, StackError, VersionError
from molora.versions import Versions
from molora_training.attention import attending_causally
from molora_training.captured import filled, filled_shape
from molora_training.plum.bank import BANK
from molora_training.plum.conversations import Conversation, read_conversations
from molora_training.plum.learn import DISCUSSED, LearnSettings, Measured, against, learn, learn_in_turn, pairs_of
from molora_training.plum.learner import Learner, Learning
from molora_training.plum.pairs import _CLOSED, _OPEN, Pair, asked, augment, undiscussed
from molora_training.plum.rehearsal import ANSWER_TOKENS, beside, practice, told
from molora_training.plum.segments import ANSWER, OTHER, QUESTION, SegmentLoss, SegmentWeights, padded, segmented
from molora_training.plum.topics import (
    bank_stems,
    discussed,
    exchanges,
    hashed,
    read_discussed,
    stem,
    stems,
    topics,
    write_discussed,
)
from tests.conftest import DEVICE
from tests.unit.spoken import make_spoken, teachable


def said(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


TREE = said(
    "How do I prune my apple tree in winter?",
    "Prune an apple tree in late winter, while it is dormant. Cut dead branches first. Then thin out the crown.",
    "And which saw is right?",
    "A folding pruning saw with a blade of 20 cm is enough.",
)
ZITHER = said("Is the zither loud?", "A zither is quiet.")


class TestTopics:
    def test_what_the_words_say(self) -> None:
        found = topics(TREE)
        assert found[:3] == ["pruning saw", "apple tree", "winter"] and len(found) == 5
        assert topics(ZITHER) == ["zither loud", "quiet"]
        assert topics(TREE, most=1) == ["pruning saw"] and topics(TREE) == found
        each = [stem(word) for topic in found for word in topic.split()]
        assert len(each) == len(set(each))  # no two share a word

    def test_what_is_no_topic(self) -> None:
        assert topics(said("Hi", "Hello! How can I help?")) == []
        assert topics([]) == [] and topics(said("What is a zither?")) == []  # nobody answered
        code = said("Sort a list in Python?", "So:\n```python\nquicksort_of(everything)\n```\nThat is it.")
        assert not any("quicksort" in topic for topic in topics(code))
        ruled = [{"role": "system", "content": "You are a pirate."}, *ZITHER]
        assert topics(ruled) == topics(ZITHER)

    def test_stop_words_are_the_languages(self) -> None:
        found = topics(said("Wie lange muss das Brot im Ofen sein?", "Das Brot ist nach einer Stunde gut."))
        assert "Brot" in found and not {"Wie", "muss", "das", "nach", "einer"} & set(found)
        assert any("Python" in one for one in topics(said("Як мені вивчити Python?", "Почніть із посібника.")))

    def test_turns_of_one_side_are_one(self) -> None:
        chat = [
            {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "One?"},
            {"role": "user", "content": "Two?"}, {"role": "assistant", "content": "Three."},
        ]  # fmt: skip
        assert [(one.question, one.answer) for one in exchanges(chat)] == [("One?\n\nTwo?", "Three.")]

    @pytest.mark.parametrize(
        "forms", ["garden gardens gardening gardener", "bake bakes baking baker", "story stories", "run running"]
    )
    def test_forms_of_a_word_have_one_stem(self, forms: str) -> None:
        assert len({stem(form) for form in forms.split()}) == 1


class TestPairs:
    def test_as_many_of_each_kind(self) -> None:
        found = augment(TREE, (), Random(0), wordings=2)
        kinds = [(pair.closed, pair.discussed) for pair in found]
        assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
            [(False, True), (True, True), (False, False), (True, False)], 5 * 2
        )
        for pair, other in zip(found[::2], found[1::2], strict=True):
            assert pair.discussed and not other.discussed and pair.closed == other.closed
            assert other.question == pair.question.replace(pair.topic, other.topic)
        for pair in found:
            assert pair.topic in pair.question
            assert pair.answer.startswith("Yes, you asked: " if pair.discussed else "No, we have not talked about ")
        told = {pair.answer for pair in found if pair.topic == "apple tree"}
        assert told == {
            "Yes, you asked: How do I prune my apple tree in winter? I answered: Prune an apple tree in late winter, "
            "while it is dormant. Cut dead branches first. Then thin out the crown."
        }
        about_saw = next(pair for pair in found if pair.topic == "pruning saw" and not pair.closed)
        assert about_saw.answer.endswith("A folding pruning saw with a blade of 20 cm is enough.")
        assert found == augment(TREE, (), Random(0), wordings=2) != augment(TREE, (), Random(1), wordings=2)

    def test_a_long_answer_is_told_by_its_first_sentences(self) -> None:
        chat = said("What is a zither " + "for " * 80 + "?", "It is a box with strings. " * 20)
        (told,) = {pair.answer for pair in augment(chat, (), Random(0)) if pair.topic == "zither" and not pair.closed}
        asked, answered = told.removeprefix("Yes, you asked: ").split(" I answered: ")
        assert asked.endswith("for …") and len(asked) <= 202
        assert answered == ("It is a box with strings. " * 9).strip()

    def test_tests_have_wordings_and_topics_of_their_own(self) -> None:
        def forms(pairs: Any) -> set[str]:
            return {pair.question.replace(pair.topic, "...") for pair in pairs}

        taught, apart = augment(TREE, (), Random(0), wordings=12), augment(TREE, (), Random(0), held_out=True)
        assert len(forms(taught)) == 24 and len(forms(apart)) == 4 and forms(taught).isdisjoint(forms(apart))
        negatives = [{pair.topic for pair in some if not pair.discussed} for some in (taught, apart)]
        assert negatives[0].isdisjoint(negatives[1])
        assert {pair.topic for pair in taught if pair.discussed} == {pair.topic for pair in apart if pair.discussed}

    def test_wordings_that_there_are(self) -> None:
        for wrong in (0, 13):
            with pytest.raises(ConfigError, match=f"1 to 12 wordings, not {wrong}"):
                augment(TREE, (), Random(0), wordings=wrong)
        assert augment(said("Hi", "Hello!"), (), Random(0)) == []


class TestNegatives:
    def test_the_bank(self) -> None:
        assert len({one.name for one in BANK}) == len(BANK) and all(bank_stems().values())
        for everyday, most in ((True, 150), (False, 1500)):
            some = [one for one in BANK if one.everyday == everyday]
            assert len(some) >= most and len(some) / 6 < sum(one.held_out for one in some) < len(some) / 3

    def test_everyday_ones_and_others_come_by_turns(self) -> None:
        everyday = {one.name: one.everyday for one in BANK}
        for held_out in (False, True):
            found = augment(TREE, (), Random(0), held_out=held_out)
            kinds = [everyday[pair.topic] for pair in found if not pair.discussed]
            assert kinds == [True, False] * (len(kinds) // 2) and kinds

    @pytest.mark.parametrize("held_out", [False, True])
    def test_none_is_about_what_was_discussed(self, held_out: bool, tmp_path: Path) -> None:
        for number, one in enumerate(BANK[::9]):
            chat = said(f"Tell me about {one.name}, but also about my zither.", "Here is something about both.")
            write_discussed(tmp_path / f"{number}.json", discussed(chat))
            for known in (discussed(chat), read_discussed(tmp_path / f"{number}.json")[0]):
                assert one not in undiscussed(known, held_out)
                for pair in augment(ZITHER, known, Random(number), held_out=held_out):
                    assert pair.discussed or not stems(pair.topic) & stems(one.name)
            assert all(
                pair.discussed or not stems(pair.topic) & stems(one.name)
                for pair in augment(chat, (), Random(number), held_out=held_out)
            )

    def test_what_is_near_counts_and_so_does_a_question_without_an_answer(self) -> None:
        chat = [*ZITHER, {"role": "user", "content": "Where does the owl of my puppies sleep?"}]
        left = [*undiscussed(discussed(chat), False), *undiscussed(discussed(chat), True)]
        assert not {"watching birds", "training a puppy", "sleeping badly"} & {one.name for one in left}

    def test_who_talked_about_everything_gets_none(self) -> None:
        known = frozenset(hashed(one) for some in bank_stems().values() for one in some)
        assert all(pair.discussed for pair in augment(ZITHER, known, Random(0)))

    @pytest.mark.parametrize("topic", ["conversations", "subject", "point"])
    def test_a_wording_keeps_words_that_are_the_topics_too(self, topic: str) -> None:
        def asked(about: str, held_out: bool) -> list[Pair]:
            chat = said(f"Which {about}?", f"The {about}.")
            # Of the bank the same is left, whatever is talked about.
            known = {hashed(stem(one)) for one in ("zither", "conversations", "subject", "point")}
            found = augment(chat, known, Random(0), held_out=held_out, wordings=6)
            assert {pair.topic for pair in found if pair.discussed} == {about}
            return [pair for pair in found if not pair.discussed]

        for held_out in (False, True):
            # No wording holds the zither, so that its negatives show how each goes.
            pairs = zip(asked("zither", held_out), asked(topic, held_out), strict=True)
            assert all(
                one.question.replace(one.topic, other.topic) == other.question and one.topic == other.topic
                for one, other in pairs
            )

    def test_a_small_bank_is_gone_through_again(self) -> None:
        left = next(one for one in BANK if one.name == "judo")  # no other is made of its words alone
        known = {hashed(one) for some in bank_stems().values() for one in some - bank_stems()[left.name]}
        assert undiscussed(known, False) == [left]
        found = [pair for pair in augment(ZITHER, known, Random(0)) if not pair.discussed]
        assert len(found) == 2 * 3 * 2 and {pair.topic for pair in found} == {left.name}

    def test_remembered_are_hashes_and_names_of_topics(self, tmp_path: Path) -> None:
        file = tmp_path / "discussed.json"
        assert read_discussed(file) == (frozenset(), [])
        write_discussed(file, discussed(TREE))
        kept = json.loads(file.read_text())
        assert set(kept) == {"format", "sha256", "topics"} and kept["sha256"] == sorted(kept["sha256"])
        assert all(re.fullmatch(r"[0-9a-f]{64}", one) for one in kept["sha256"]) and kept["topics"] == []
        assert read_discussed(file) == (discussed(TREE), []) and hashed(stem("apples")) in discussed(TREE)
        write_discussed(file, (), ["pruning", "Äpfel", "pruning"])
        assert read_discussed(file) == (frozenset(), ["pruning", "Äpfel"])
        file.write_text(json.dumps({"format": 1, "sha256": kept["sha256"]}))  # before topics were rehearsed
        assert read_discussed(file) == (discussed(TREE), [])
        for damaged in (
            "{", "[]", '{"format": 3, "sha256": [], "topics": []}', '{"format": 1, "sha256": [3]}',
            '{"format": 2, "sha256": [], "topics": [3]}', '{"format": 2, "sha256": []}',
        ):  # fmt: skip
            file.write_text(damaged)
            with pytest.raises(DataError, match=r"discussed\.json is damaged"):
                read_discussed(file)

    def test_each_epoch_has_wordings_and_negatives_of_its_own(self) -> None:
        chat = [Conversation("a", tuple(ZITHER))]
        ((one,), apart), ((five,), again) = (
            pairs_of(chat, frozenset(), Learning(epochs=epochs, wordings=1)) for epochs in (1, 5)
        )
        assert five[: len(one)] == one and len(five) == 5 * len(one) and again == apart
        assert {pair.topic for pair in five if pair.discussed} == {pair.topic for pair in one if pair.discussed}
        questions, negatives = (
            [len({getattr(pair, what) for pair in some if pair.discussed == sign}) for some in (one, five)]
            for what, sign in (("question", True), ("topic", False))
        )
        assert questions[1] > 2 * questions[0] and negatives[1] > 3 * negatives[0]

    def test_a_conversation_later_in_the_file_counts_too(self) -> None:
        chats = [Conversation("a", tuple(ZITHER)), Conversation("b", tuple(TREE))]
        for number, parts in enumerate(pairs_of(chats, frozenset(), Learning())):
            negatives = {pair.topic for pairs in parts for pair in pairs if not pair.discussed}
            assert negatives and not any(bank_stems()[one] & {stem("apple"), stem("tree")} for one in negatives), number


class TestLoss:
    def test_segments(self, tmp_path: Path) -> None:
        tokenizer = make_spoken(tmp_path).tokenizer
        row = segmented([{"role": "system", "content": "user"}, *said("user", "Yes")], tokenizer)
        for segment, text in (
            (OTHER, "<|im_start|>system\nuser<|im_end|>\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n\n"),
            (QUESTION, "user"), (ANSWER, "Yes<|im_end|>"),
        ):  # fmt: skip
            shown = tokenizer.decode(row.input_ids[row.segments == segment])  # type: ignore[union-attr]
            # In the user's own turn the role stands first, and the question is what follows it.
            assert shown == text
        first = int((row.segments == QUESTION).nonzero()[0])
        assert tokenizer.decode(row.input_ids[first - 5 : first]) == "user\n"  # type: ignore[union-attr]

    @pytest.mark.parametrize("weights", [(1.0, 0.5, 0.1, 0.0), (1.0, 0.0, 0.0, 0.5), (2.0, 1.0, 1.0, 1.0)])
    def test_a_weighted_sum_of_means(self, weights: tuple[float, ...], tmp_path: Path) -> None:
        model = make_spoken(tmp_path)
        base, tokenizer = model.base, model.tokenizer
        pairs = [("Is it red?", "No"), ("And?", "A much longer answer, which is padded by nothing.")]
        by_hand = []
        for question, answer in pairs:
            parts = [
                ("<|im_start|>user\n", "other"), (question, "question"),
                ("<|im_end|>\n<|im_start|>assistant\n", "other"), (f"{answer}<|im_end|>", "answer"), ("\n", "other"),
            ]  # fmt: skip
            ids = [(token, name) for text, name in parts for token in tokenizer.encode(text)]  # type: ignore[union-attr]
            logits = base(torch.tensor([[token for token, _ in ids]])).logits[0, :-1]
            total = torch.zeros(())
            kinds = {
                name: [n for n, (_, of) in enumerate(ids[1:]) if of == name] for name in ("answer", "question", "other")
            }
            for weight, places in zip(weights, (*kinds.values(), kinds["answer"][:1]), strict=True):
                wanted = torch.tensor([ids[place + 1][0] for place in places])
                total = total + weight * F.cross_entropy(logits[places], wanted)
            by_hand.append(total)
        batch = padded([segmented(said(*pair), tokenizer) for pair in pairs], 0)
        found = SegmentLoss(base, SegmentWeights(*weights))(base, batch)
        torch.testing.assert_close(found, torch.stack(by_hand).mean(), rtol=1e-5, atol=1e-5)

    def test_weights_that_are_none(self) -> None:
        for wrong in ((1.0, 0.05, 0.1), (0.0, 0.0, 0.0), (1.0, 0.5, -0.1), (1.0, 0.0, 0.0, -0.1)):
            with pytest.raises(ConfigError, match="The weights of answer and question"):
                SegmentWeights(*wrong)
        for name in ("epochs", "rank", "learning_rate"):
            with pytest.raises(ConfigError, match=f"{name} must be above 0"):
                Learning(**{name: 0})
        for name in ("pull", "rehearsed"):
            with pytest.raises(ConfigError, match=f"{name} must not be negative"):
                Learning(**{name: -1})


@pytest.fixture
def base_folder(tmp_path: Path) -> Path:
    return teachable(tmp_path)


def learner(base_folder: Path, **settings: Any) -> Learner:
    base, tokenizer = load_base(str(base_folder), dtype=torch.float32)
    chosen = Learning(**{"learning_rate": 5e-3, "batch_tokens": 1024, "wordings": 2, "pull": 0.0, **settings})
    base = base.to(DEVICE).requires_grad_(False)
    return Learner(base, tokenizer, base_folder.parent / "blank", chosen, str(base_folder))


def once() -> list[Pair]:
    """What a conversation is learnt by in one epoch."""
    return augment(ZITHER, (), Random(0), wordings=2)


class TestLearner:
    def test_yes_and_no_become_right(self, base_folder: Path) -> None:
        own = learner(base_folder, epochs=100)
        pairs, apart = once(), augment(ZITHER, (), Random(0), held_out=True)
        before, elsewhere = own.measure(pairs), own.measure(apart)
        assert before.right == 0.5 and before.loss > 5
        own.learn(pairs)
        after = own.measure(pairs)
        assert (after.positives, after.negatives) == (1.0, 1.0) and after.loss < 0.5
        assert own.measure(apart).loss < elsewhere.loss / 2  # what it was not trained on
        with own.off():
            assert own.measure(pairs) == before

    def test_the_same_twice_and_on_disk(self, base_folder: Path, tmp_path: Path) -> None:
        measured = []
        for name in ("one", "other"):
            own = learner(base_folder, epochs=2)
            pairs, apart = once(), augment(ZITHER, (), Random(0), held_out=True)
            own.learn(pairs)
            own.settle()
            own.write(tmp_path / name)
            measured.append(own.measure(apart))
        assert measured[0] == measured[1]
        for file in ("adapter_model.safetensors", "adapter_config.json"):
            assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()
        assert Adapter.load(tmp_path / "one").ranks == [8]
        base = AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.float32)
        ids = torch.arange(5, 60)[None]
        with torch.no_grad():  # what was measured is what is kept
            kept = PeftModel.from_pretrained(base, tmp_path / "one").eval()(ids).logits
            torch.testing.assert_close(kept, own.model(ids).logits)

    def test_the_pull_holds_it_back(self, base_folder: Path) -> None:
        moved = []
        for pull in (0.0, 1.0):
            own = learner(base_folder, epochs=4, pull=pull)
            before = {name: p.detach().clone() for name, p in own.parameters.items()}
            own.learn(once())
            moved.append(sum(float((p.detach() - before[name]).square().sum()) for name, p in own.parameters.items()))
        assert 0 < moved[1] < moved[0] / 2

    def test_a_question_and_the_same_of_the_other_sign_are_learnt_together(
        self, base_folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        own, batches = learner(base_folder, batch_tokens=700), []
        pairs = [*once(), *augment(TREE, (), Random(0), wordings=2)]
        texts = [own.tokenizer.decode(own._row(pair).input_ids) for pair in pairs]

        def seen(rows: Any, *given: Any) -> Any:
            batches.append([own.tokenizer.decode(row.input_ids) for row in rows])
            return padded(rows, *given)

        monkeypatch.setattr("molora_training.plum.learner.padded", seen)
        steps = own.learn(pairs, epochs=2, together=2)
        assert steps == len(batches) > 4 and Counter(text for batch in batches for text in batch) == Counter(texts * 2)
        for text, other in zip(texts[::2], texts[1::2], strict=True):
            assert all((text in batch) == (other in batch) for batch in batches)

    def test_a_batch_is_filled_up_with_what_counts_for_nothing(self, base_folder: Path) -> None:
        own = learner(base_folder, pull=0.1)
        batch = padded([own._row(pair) for pair in once()[:3]], own.pad_id, DEVICE)
        shape = filled_shape(*batch.input_ids.shape, 1024)
        assert shape[0] > 3 and shape[1] > batch.input_ids.shape[1]
        found = []
        base = own.model.get_base_model()
        for some in (batch, filled(batch, 1024)):
            with attending_causally(base, shape[1]) if some is not batch else nullcontext(True) as able:
                assert able
                own.model.zero_grad()
                loss = own._objective(some)["loss"]
                loss.backward()
            found.append([loss.detach(), *(p.grad.clone() for p in own.parameters.values())])
        assert any(gradient.abs().max() > 1e-3 for gradient in found[0][1:])
        torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-6)
        assert base.config._attn_implementation == "sdpa"  # what is padded on the left needs its mask

    @pytest.mark.gpu
    def test_captured_steps_learn_the_same(self, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        learnt = []
        conversations = [Conversation("chat", tuple(ZITHER)), Conversation("other", tuple(ZITHER[:2]))]
        for captured in (True, False):
            with monkeypatch.context() as patch:
                if not captured:
                    patch.setattr("molora_training.plum.learner.attending_causally", lambda *_: nullcontext(False))
                own = learner(base_folder, epochs=6, pull=0.1)
                for pairs in pairs_of(conversations, frozenset(), own.settings)[0]:
                    own.learn(pairs, epochs=1, together=2)
            assert (own._captured is not None) == captured
            if own._captured is not None:
                assert own._captured.able and any(own._captured._steps.values())
            learnt.append([p.detach() for p in own.parameters.values()])
        torch.testing.assert_close(learnt[0], learnt[1], rtol=1e-3, atol=1e-4)

    def test_a_loss_that_is_not_finite(self, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        own = learner(base_folder)
        with torch.no_grad():
            next(iter(own.parameters.values())).fill_(torch.inf)
        with pytest.raises(NonFiniteError, match="at step 1"):
            own.learn(once())

    def test_yes_is_weighed_against_no_token_by_token(self, base_folder: Path) -> None:
        own = learner(base_folder)
        prompts = ["a", "Did we talk about the weather in Spain last year?", "b?"]
        for prompt, yes in zip(prompts, own.says_yes(prompts), strict=True):
            nats = []
            for word in ("Yes", "No"):
                before = own.tokenizer.encode(f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n")
                ids = before + own.tokenizer.encode(word)
                with torch.no_grad():
                    logits = own.model(torch.tensor([ids])).logits[0, len(before) - 1 : -1]
                wanted = torch.tensor(ids[len(before) :])
                nats.append(float(F.cross_entropy(logits, wanted, reduction="sum")))
            assert yes == (nats[0] < nats[1])


class TestRehearsal:
    def test_questions_about_topics_with_what_was_said(self) -> None:
        left = undiscussed(discussed(TREE), False)
        pairs = practice({"pruning": "Yes, cut.", "saws": "Yes, 20 cm."}, 40, left, Random(0))
        assert len(pairs) == 80 and Counter(pair.topic for pair in pairs[::2]) == {"pruning": 20, "saws": 20}
        assert all(pair.answer == {"pruning": "Yes, cut.", "saws": "Yes, 20 cm."}[pair.topic] for pair in pairs[::2])
        for pair, other in zip(pairs[::2], pairs[1::2], strict=True):
            assert pair.discussed and not other.discussed and pair.closed == other.closed
            assert pair.question.replace(pair.topic, other.topic) == other.question
            assert pair.question in {one.format(pair.topic) for one in (_CLOSED if pair.closed else _OPEN)}
        assert len({pair.question for pair in pairs[::2]}) > 12 < sum(pair.closed for pair in pairs) < 68
        assert practice({}, 40, left, Random(0)) == []
        assert {pair.discussed for pair in practice({"saws": "Yes."}, 4, [], Random(0))} == {True}

    def test_told_is_what_ends_and_is_held_for_discussed(self, base_folder: Path) -> None:
        own = learner(base_folder)
        said = {
            "a": "Yes, you asked.",
            "b": "No, we have not.",
            "c": "Yes, " + "c " * 200,
            "d": "Yesterday.",
        }
        own.answers = lambda questions, tokens: [said[one] for one in said if asked(one) in questions]  # type: ignore[method-assign]
        assert told(own, list("abcd")) == {"a": "Yes, you asked."} and told(own, []) == {}
        assert own.tokenizer(said["c"], return_tensors="pt")["input_ids"].shape[1] > ANSWER_TOKENS

    @pytest.mark.parametrize("rehearsed", [0, 2, 64])
    def test_topics_are_drawn_and_those_of_the_new_conversation_are_not_among_them(
        self, base_folder: Path, rehearsed: int
    ) -> None:
        own, heard = learner(base_folder, rehearsed=rehearsed), []
        own.answers = lambda questions, tokens: heard.extend(questions) or ["Yes, of course."] * len(questions)  # type: ignore[method-assign]
        new = once()
        topic = new[0].topic
        pairs = beside(own, new, [topic, "saws", "pears", "snow"], discussed(ZITHER))
        assert len(set(heard)) == len(heard) == min(rehearsed, 3) and asked(topic) not in heard
        assert pairs[: len(new)] == new and len(pairs) == len(new) * (2 if rehearsed else 1)
        assert {pair.topic for pair in pairs[len(new) :: 2]} <= {"saws", "pears", "snow"}
        assert beside(own, new, [topic, "saws", "pears", "snow"], discussed(ZITHER)) == pairs

    def test_what_is_rehearsed_is_kept(self, base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        chats = [Conversation("a", tuple(ZITHER)), Conversation("b", tuple(TREE))]
        found = []
        for rehearsed in (0, 64):
            own = learner(base_folder, epochs=60, rehearsed=rehearsed)
            taught, _ = pairs_of(chats, frozenset(), own.settings)
            says = next(pair.answer for pair in taught[0] if pair.discussed)
            # So small a base does not come to speak: what it would say is put into its mouth.
            monkeypatch.setattr(own, "answers", lambda questions, _, says=says: [says] * len(questions))
            first, alone = learn_in_turn(own, taught[:1], [], discussed(ZITHER))
            before = own.measure(once()).loss
            steps, named = learn_in_turn(own, taught[1:], alone, discussed(ZITHER) | discussed(TREE))
            assert first > 0 and steps > 0 and alone == topics(ZITHER) and named == [*alone, *topics(TREE)]
            found.append((before, own.measure(once()).loss, steps))
        (before, without, fewer), (same, rehearsed_, more) = found
        assert before == same and more > 1.5 * fewer and rehearsed_ < without / 2


def write_chats(file: Path, *chats: Any, **keys: Any) -> Path:
    file.write_text("".join(json.dumps({"messages": chat, **keys}) + "\n" for chat in chats))
    return file


@pytest.fixture
def settings(base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LearnSettings:
    monkeypatch.chdir(tmp_path)
    chat = write_chats(tmp_path / "chat.jsonl", ZITHER, user="ada")
    learning = Learning(learning_rate=5e-3, epochs=12, wordings=2, batch_tokens=1024, rank=4)
    return LearnSettings(tmp_path / "model", "user", "ada", chat, learning, dtype="float32")


class TestLearn:
    def test_a_user_gets_an_adapter_and_it_goes_on(self, settings: LearnSettings, tmp_path: Path) -> None:
        found = learn(settings, command="molora learn")
        mine = Versions(settings.model, "user", "ada")
        assert found.promoted and (found.version, found.parent, mine.current) == (2, 1, 2)
        assert (found.conversations, found.topicless, found.questions) == (1, 0, 16)
        assert found.after.loss < found.before.loss and found.after.right >= found.before.right
        assert mine[2].metrics["after"]["loss"] == found.after.loss and mine[2].metrics["learning"]["rank"] == 4
        assert mine[2].data["conversations"] == 1 and "answered right" in mine[2].why
        assert MoLoRAModel.from_pretrained(settings.model).adapters["user/ada"].ranks == [4]
        first, named = read_discussed(settings.model / mine.place / DISCUSSED)
        assert first == discussed(ZITHER) and named == sorted(topics(ZITHER))

        two = write_chats(tmp_path / "june.jsonl", said("Hi", "Hello!"), TREE)
        later = learn(replace(settings, conversation=two))
        assert (later.version, later.parent, later.conversations, later.topicless) == (3, 2, 1, 1)
        hashes, named = read_discussed(settings.model / mine.place / DISCUSSED)
        assert hashes >= first | discussed(TREE) and named == sorted({*topics(ZITHER), *topics(TREE)})
        before, after = (load_file(mine.path(n) / "adapter_model.safetensors") for n in (2, 3))
        assert before.keys() == after.keys() and any(not torch.equal(before[name], after[name]) for name in before)
        mine.erase()
        assert not (settings.model / mine.place).exists()  # with what was remembered

    @pytest.mark.parametrize("rehearsed", [0, 4])
    def test_nothing_of_the_text_stays(self, settings: LearnSettings, tmp_path: Path, rehearsed: int) -> None:
        settings = replace(settings, learning=replace(settings.learning, rehearsed=rehearsed))
        learn(settings, command="molora learn user ada --conversation chat.jsonl")
        settings.conversation.unlink()
        words = [b"zither", b"is quiet", b" loud", b"you asked"]
        found = [
            (file.name, word)
            for file in (one for one in tmp_path.rglob("*") if one.is_file())
            for word in words
            if word in file.read_bytes().lower()
        ]
        # Without rehearsal, not even the topics by name.
        assert found == ([] if not rehearsed else [(DISCUSSED, b"zither"), (DISCUSSED, b" loud")])

    def test_the_same_twice(self, settings: LearnSettings, tmp_path: Path) -> None:
        other = replace(settings, name="ben", conversation=write_chats(tmp_path / "ben.jsonl", ZITHER))
        found, again = learn(settings), learn(other)
        assert (found.before, found.after) == (again.before, again.after)
        one, two = (
            load_file(Versions(settings.model, "user", name).path(2) / "adapter_model.safetensors")
            for name in ("ada", "ben")
        )
        assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())

    def test_what_learnt_nothing_does_not_serve(self, settings: LearnSettings) -> None:
        found = learn(replace(settings, learning=replace(settings.learning, learning_rate=1e-12)))
        mine = Versions(settings.model, "user", "ada")
        assert not found.promoted and found.why.startswith("nothing was learnt: loss on new wordings")
        assert mine.current is None and not mine[2].passed
        # It was discussed; but what serves has nothing to practise of it.
        assert read_discussed(settings.model / mine.place / DISCUSSED) == (discussed(ZITHER), [])
        assert learn(settings).parent == 1

    def test_the_gate(self) -> None:
        before = Measured(2.0, 0.5, 0.9)
        assert against(before, Measured(1.0, 0.8, 0.6)) == "" == against(before, Measured(1.0, 0.8, None))
        assert against(before, Measured(1.0, 0.4, 0.9)) == "fewer closed questions are answered right: 70% -> 65%"
        assert against(before, Measured(2.0, 1.0, 1.0)).startswith("nothing was learnt")
        assert against(before, Measured(float("nan"), 1.0, 1.0)).startswith("nothing was learnt")

    def test_an_adapter_of_a_routed_layer(self, settings: LearnSettings, tmp_path: Path) -> None:
        chat = write_chats(tmp_path / "math.jsonl", ZITHER)
        found = learn(replace(settings, layer="domain", name="math", conversation=chat))
        assert (found.version, found.parent, found.promoted) == (2, 1, True)
        with pytest.raises(VersionError, match="no row for a new adapter there: begin it by `molora update domain law"):
            learn(replace(settings, layer="domain", name="law", conversation=chat))

    def test_bad_input_is_named(self, settings: LearnSettings, tmp_path: Path) -> None:
        good = settings.conversation.read_text()
        for line, sentence in (
            (json.dumps({"messages": ZITHER, "user": "bob"}), "line 2 is of user 'bob', not of 'ada'"),
            (json.dumps({"messages": ZITHER[:1]}), "line 2: a conversation without an answer"),
            (json.dumps({"messages": []}), "line 2: a conversation without an answer"),
            ('{"messages": 3}', "line 2: not a conversation"),
            ("nothing", "line 2: not JSON"),
        ):
            settings.conversation.write_text(good + line + "\n")
            with pytest.raises(DataError, match=sentence):
                learn(settings)
        for text, sentence in (
            ("", "is empty"), (" \n\n", "is empty"), ("[]", "is a list"),
            (json.dumps({"messages": said("Hi", "Hello!")}), "chat.jsonl line 1: nothing that could be asked about"),
        ):  # fmt: skip
            settings.conversation.write_text(text)
            with pytest.raises(DataError, match=sentence):
                learn(settings)
        with pytest.raises(DataError, match="There is no file"):
            learn(replace(settings, conversation=tmp_path / "none.jsonl"))
        settings.conversation.write_text(good)
        with pytest.raises(StackError, match="nobody"):
            learn(replace(settings, layer="nobody"))
        mine = Versions(settings.model, "user", "ada")
        assert mine.all() == []
        with FileLock(settings.model / mine.place / ".update.lock"), pytest.raises(VersionError, match="is running"):
            learn(settings)

    def test_lines_are_told_by_their_number_in_the_file(self, tmp_path: Path) -> None:
        file = tmp_path / "chat.jsonl"
        file.write_text("\n" + json.dumps({"messages": ZITHER}) + "\n\n" + json.dumps({"messages": TREE}))
        assert [one.where for one in read_conversations(file, "ada")] == ["chat.jsonl line 2", "chat.jsonl line 4"]


def test_the_command_tells_and_its_exit_code_says_whether_it_serves(settings: LearnSettings) -> None:
    line = ["learn", "user", "ada", "--conversation", str(settings.conversation), "--model", str(settings.model)]
    found = CliRunner().invoke(app, [*line, "--learning-rate", "0.005", "--epochs", "2", "--rank", "4"])
    assert found.exit_code == 0, found.output
    assert "1 conversations learnt; 16 questions in other words" in found.output and "Version 2 serves" in found.output
    assert "yes, where it was discussed" in found.output and "zither" not in found.output
    found = CliRunner().invoke(app, [*line, "--learning-rate", "1e-12", "--epochs", "1", "--json"])
    assert found.exit_code == 1 and json.loads(found.stdout)["promoted"] is False
    shown = CliRunner().invoke(app, ["learn", "--help"]).output
    assert "Example: molora learn user ada" in shown and "No other text stays" in shown
