"""What the controls mean, which history fits, and how an answer grows and ends."""

import threading

import pytest

from molora.errors import MoLoRAError
from molora_demo.controls import choice, settle
from molora_demo.render import Palette, Stats
from molora_demo.session import Tally, answer
from molora_demo.source import LocalSource, Settings, Turn, fitting_messages
from tests.demo.fake_model import ENDLESS, FakeModel, FakeToken

TURNS = [Turn("first", "one", ""), Turn("second", "two", "")]
GREEDY = Settings(64, 0.0)
SELECTION = {"personality": None, "domain": "auto", "user": None}
SHARED = ("messages", "selection")  # of a call, which other tests look at


@pytest.mark.parametrize(
    ("picked", "shown"),
    [
        ([], ["none"]),
        (["auto", "math"], ["math"]),
        (["math", "code"], ["math", "code"]),
        (["math", "code", "auto"], ["auto"]),
        (["math", "none"], ["none"]),
        (["none", "law"], ["law"]),
    ],
)
def test_the_last_pick_wins(picked, shown):
    assert settle(picked) == shown


@pytest.mark.parametrize(
    ("value", "meaning"),
    [
        (["sage"], "sage"),
        (["auto"], "auto"),
        (["none"], None),
        ([], None),
        (["math"], "math"),
        (["math", "law"], ["math", "law"]),
    ],
)
def test_control_values_become_selections(value, meaning):
    assert choice(value) == meaning


def _words(messages: list[dict[str, str]]) -> int:
    return sum(len(message["content"].split()) for message in messages)


def test_history_loses_its_oldest_pairs_first():
    whole = fitting_messages(TURNS, "third", 5, _words)
    assert [message["content"] for message in whole] == ["first", "one", "second", "two", "third"]
    assert [message["role"] for message in whole] == ["user", "assistant", "user", "assistant", "user"]
    short = fitting_messages(TURNS, "third", 4, _words)
    assert [message["content"] for message in short] == ["second", "two", "third"]


def test_a_message_longer_than_the_model_reads_is_refused_in_words():
    with pytest.raises(MoLoRAError, match="3 tokens and this model can read 2"):
        fitting_messages(TURNS, "far too long", 2, _words)


@pytest.mark.parametrize(
    ("value", "strength", "decided", "meaning"),
    [
        (["math"], 0.5, True, {"math": 0.5}),
        (["math", "law"], 0.5, True, {"math": 0.5, "law": 0.5}),
        (["math", "law"], 1.0, False, {"math": 1.0, "law": 1.0}),
        (["auto"], 0.5, True, "auto"),
        (["none"], 0.5, True, None),
    ],
)
def test_named_adapters_act_as_strongly_as_is_said(value, strength, decided, meaning):
    assert choice(value, strength, decided) == meaning


def test_greedy_is_the_default_and_temperature_samples():
    model = FakeModel()
    for settings in (GREEDY, Settings(8, 0.7)):
        list(LocalSource(model).ask([], "hello", SELECTION, settings))
    greedy, sampled = ({name: call[name] for name in call if name not in SHARED} for call in model.calls)
    assert greedy == {"max_new_tokens": 64, "do_sample": False}
    assert sampled == {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7}


def test_what_one_browser_was_taught_is_counted_without_its_name():
    model = FakeModel()
    tally = Tally(Palette(model.stack.layers), lambda layer: list(layer.adapters))
    tokens = [FakeToken(0, "a", [("domain", name, 1.0)]) for name in ("math", "math", "me-1234", None)]
    tally.add(tokens, Stats(4, 0.1, 0.3))
    assert tally.spoken["domain"] == {"math": 2, Tally.OWN: 1, None: 1} and tally.answers == 1


def _ask(model: FakeModel, prompt: str, stop: threading.Event):
    return answer(lambda: LocalSource(model).ask([], prompt, SELECTION, GREEDY), stop)


def test_an_answer_grows_to_its_end_and_closes_the_stream():
    model = FakeModel(delay_s=0.005)
    lengths = [len(now.tokens) for now in _ask(model, "hello", threading.Event())]
    assert lengths == sorted(lengths) and lengths[-1] == 64 and len(lengths) > 2
    assert model.closed == 1


def test_stop_ends_an_answer_early_and_keeps_what_was_said():
    model, stop = FakeModel(delay_s=0.01), threading.Event()
    growing = _ask(model, ENDLESS, stop)
    next(growing)
    stop.set()
    *_, last = growing
    assert 0 < len(last.tokens) < 64 and last.text.startswith(" tick")
    assert model.closed == 1


def test_leaving_an_answer_closes_the_stream():
    model = FakeModel()
    growing = _ask(model, ENDLESS, threading.Event())
    next(growing)
    growing.close()
    assert model.closed == 1
