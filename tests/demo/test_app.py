"""The served demo over its API: streaming, stop, errors, and two browsers that know nothing of each other."""

import re
import socket
import threading
import time
from collections.abc import Iterator
from html import unescape
from urllib.request import urlopen

import pytest

pytest.importorskip("gradio")

from gradio_client import Client
from gradio_client.exceptions import AppError

from molora.errors import MoLoRAError
from molora_demo.app import build, serve
from molora_demo.monitor import monitor_html
from molora_demo.page import Page
from molora_demo.render import Palette
from molora_demo.source import LocalSource, Settings
from tests.demo.fake_model import BROKEN, ENDLESS, HISTORY, FakeModel

KEY = "0" * 32
KNOBS = (KEY, 256, 0, ["none"], ["auto"], ["none"], 1, 1, 1)  # key, new tokens, temperature, layers, strengths


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def model() -> FakeModel:
    return FakeModel(delay_s=0.01, positions=400)


@pytest.fixture(scope="module")
def news() -> list[Exception | list[str]]:
    """What the next turns find changed."""
    return []


@pytest.fixture(scope="module")
def address(model: FakeModel, news: list[Exception | list[str]]) -> Iterator[str]:
    def catch_up() -> list[str]:
        found = news.pop() if news else []
        if isinstance(found, Exception):
            raise found
        return found

    page = build(LocalSource(model, catch_up))
    yield serve(page, port=free_port(), open_browser=False, block=False)
    page.close(verbose=False)


def connect(address: str) -> Client:
    return Client(address, verbose=False)


def shown(page: str) -> str:
    """The text of a page part."""
    return unescape(re.sub(r"<[^>]+>", "", page))


def ask(client: Client, prompt: str, *knobs) -> str:
    past, now = client.predict(prompt, *(knobs or KNOBS), api_name="/ask")[:2]
    return past + now


def test_an_answer_streams_in_growing_pieces(address):
    job = connect(address).submit("hello", *KNOBS, api_name="/ask")
    *growing, (whole, rest, _) = job
    lengths = [len(shown(now)) for _, now, _ in growing]
    assert len(growing) > 4 and lengths == sorted(lengths) and lengths[0] < lengths[-1] and rest == ""
    assert "20 kg × 15 mg/kg = 300 mg." in shown(whole)
    assert re.search(r"64 tokens, \d+\.\d tokens/s, first token in 0\.\d\d s", whole)


def test_what_is_promoted_serves_at_the_next_turn_and_a_broken_one_does_not_end_it(address, news):
    news.append(["user/ada"])
    assert "20 kg" in shown(ask(connect(address), "hello")) and news == []
    news.append(MoLoRAError("The adapter is damaged."))
    assert "20 kg" in shown(ask(connect(address), "hello")) and news == []


def test_history_is_plain_text_and_stays_with_its_browser(address, model):
    one, two = connect(address), connect(address)
    ask(one, "I am <Ada>")
    assert "nothing" in shown(ask(two, HISTORY))
    ask(one, HISTORY)
    past = [message["content"] for message in model.calls[-1]["messages"]]
    assert past[0] == "I am <Ada>" and past[1].startswith("The dose is") and past[2] == HISTORY
    assert "Ada" not in ask(two, "hello again")


def test_the_controls_reach_the_model(address, model):
    client = connect(address)
    ask(client, "hello", KEY, 32, 0.5, ["sage"], ["math", "code"], ["ada"], 1, 1, 1)
    call = model.calls[-1]
    assert call["selection"] == {"personality": "sage", "domain": ["math", "code"], "user": "ada"}
    assert (call["max_new_tokens"], call["do_sample"], call["temperature"]) == (32, True, 0.5)
    ask(client, "hello", KEY, 16, 0, ["none"], [], ["none"], 1, 1, 1)
    assert model.calls[-1]["selection"] == {"personality": None, "domain": None, "user": None}
    ask(client, "hello", KEY, 16, 0, ["sage", "pirate"], ["math", "code"], ["ada"], 1, 0.5, 1.5)
    both = {"personality": {"sage": 1.0, "pirate": 1.0}, "domain": {"math": 0.5, "code": 0.5}, "user": {"ada": 1.5}}
    assert model.calls[-1]["selection"] == both


def test_stop_ends_only_its_own_browsers_answer(address, model):
    client, other = connect(address), connect(address)
    closed = model.closed
    job = client.submit(ENDLESS, *KNOBS, api_name="/ask")
    while len(job.outputs()) < 3:
        time.sleep(0.02)
    other.predict(api_name="/stop")
    time.sleep(0.3)
    assert not job.done()
    client.predict(api_name="/stop")
    page = job.result(timeout=5)[0]
    assert "· stopped" in page and 0 < shown(page).count("tick") < 250
    assert model.closed == closed + 1


def test_retry_answers_again_edit_takes_back_and_new_begins_anew(address, model):
    client = connect(address)
    ask(client, "first")
    ask(client, "second")
    client.predict("draft", *KNOBS, api_name="/retry")
    said = [message["content"] for message in model.calls[-1]["messages"]]
    assert said[0::2] == ["first", "second"]
    page, _, box = client.predict("draft", api_name="/edit")
    assert box == "second" and "first" in shown(page) and "second" not in shown(page)
    client.predict([], api_name="/new")
    ask(client, "third")
    assert len(model.calls[-1]["messages"]) == 1


def test_an_error_of_the_model_is_a_sentence_on_the_page_and_leaves_the_prompt(address):
    client = connect(address)
    ask(client, "hello")
    _, page, box = client.predict(BROKEN, *KNOBS, api_name="/ask")
    assert "The adapter &lt;b&gt;math&lt;/b&gt; is gone: add it again." in page and 'role="alert"' in page
    assert "Traceback" not in page and box == BROKEN
    assert BROKEN not in shown(ask(client, "go on"))


def test_a_message_that_cannot_fit_is_refused_in_words(address):
    assert "Shorten it" in ask(connect(address), "word " * 200)


def test_an_old_history_is_trimmed_to_what_fits(address, model):
    client = connect(address)
    for number in range(4):
        ask(client, f"turn {number}")
    said = [message["content"] for message in model.calls[-1]["messages"]]
    assert said[-1] == "turn 3" and "turn 0" not in said and "turn 2" in said


def layer_drops(model: FakeModel) -> list:
    titles = [layer.name.capitalize() for layer in model.stack.layers]
    blocks = build(LocalSource(model)).blocks.values()
    return [block for block in blocks if getattr(block, "multiselect", None) and block.label in titles]


def test_without_a_router_nothing_offers_auto():
    model = FakeModel()
    model.router = None
    drops = layer_drops(model)
    assert [drop.value for drop in drops] == [["none"]] * 3
    assert not any("auto" in dict(drop.choices).values() for drop in drops)


def test_a_keyed_layer_offers_auto_without_a_router():
    model = FakeModel()
    model.router, model.stack["domain"].keyed = None, True
    drops = layer_drops(model)
    assert [drop.value for drop in drops] == [["none"], ["auto"], ["none"]]
    assert "the question picks one" in drops[1].info


def test_four_ways_are_compared(address, model):
    client = connect(address)
    panes = client.predict("hello", KEY, "code", ["math", "law"], 32, api_name="/compare")
    assert len(panes) == 4 and all("32 tokens" in shown(pane) for pane in panes)
    off = {"personality": None, "user": None}
    wanted = [off | {"domain": domain} for domain in (None, "code", {"math": 0.5, "law": 0.5}, "auto")]
    assert [call["selection"] for call in model.calls[-4:]] == wanted
    assert "math 50%" in shown(panes[2]) and "fill-many" in panes[2]
    panes = client.predict("hello", KEY, None, [], 32, api_name="/compare")
    assert ["Nothing is chosen." in shown(pane) for pane in panes] == [False, True, True, False]


def test_figures_are_counted_and_no_text_is_among_them():
    page = Page(LocalSource(FakeModel()), Palette(FakeModel().stack.layers))
    selection = {"personality": None, "domain": "auto", "user": None}
    list(page.answer(KEY, [], "a <secret>", selection, Settings(32, 0.0), threading.Event()))
    told = monitor_html(page, page.source.numbers())
    assert "domain, in the model4" in shown(told) and "Answers on this page since its start1" in shown(told)
    assert "medicine75%" in shown(told) and "math25%" in shown(told) and "secret" not in told and "dose" not in told


def test_an_unknown_adapter_is_refused_in_words(address):
    with pytest.raises(AppError, match="lawyer"):
        ask(connect(address), "hello", KEY, 64, 0, ["none"], ["lawyer"], ["none"], 1, 1, 1)


def test_two_browsers_wait_for_each_other(address):
    jobs = [connect(address).submit("hello", *KNOBS, api_name="/ask") for _ in range(2)]
    assert all("64 tokens" in job.result(timeout=20)[0] for job in jobs)


def test_the_page_asks_no_other_host(address):
    page = urlopen(address, timeout=5).read().decode()
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["'](?:https?:)?//([^/"']+)""", page)
    assert set(loaded) <= {address.split("/")[2]}


def test_a_taken_port_is_named(model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(MoLoRAError, match=str(port)):
            serve(build(LocalSource(model)), port=port, open_browser=False, block=False)
