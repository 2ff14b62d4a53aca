"""The Routes tab: its numbers against plain computations, its files read back, and browsers that stay apart."""

import csv
import io
import re
import socket
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("gradio")

import gradio as gr
from gradio_client import Client
from PIL import Image

import molora_demo
from molora import MoLoRAModel, Stack, StackLayer
from molora.errors import DataError
from molora_demo import app, routes
from molora_demo.measured import LIMIT, Guess, Measured, Reading, csv_text, guarded, measure, table, unguarded
from molora_demo.picture import MOST_LINES, SCALE, WIDTH, Piece, draw
from molora_demo.render import Palette, speaker
from molora_demo.route_view import CONVENTION, EMPTY, curve_svg, detail_html, facts, palette_for, reading_html
from tests.conftest import SMALL, write_adapter
from tests.demo.fake_model import FakeModel
from tests.demo.test_render import _contrast
from tests.unit.spoken import make_spoken, make_tokenizer

TEXT = "def f(x):\n    return 3 * x  # Київ, =1+1 and <b>more</b> of the words that a router reads"
HOSTILE = "<script>alert(1)</script> \" ' & ${1+1} {{value}}"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    return make_spoken(tmp_path_factory.mktemp("routes"))


@pytest.fixture(scope="module")
def reading(model: MoLoRAModel) -> Reading:
    return measure(model, TEXT, {})


@pytest.fixture(scope="module")
def ids(model: MoLoRAModel) -> torch.Tensor:
    return model.tokenizer(TEXT, return_tensors="pt").input_ids


@pytest.fixture
def palette(model: MoLoRAModel) -> Palette:
    return Palette(model.stack.layers)


@torch.no_grad()
def losses(model: Any, ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    logits = model(input_ids=ids, **kwargs).logits[0, :-1].float()
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")


def test_losses_are_those_of_the_plain_base_and_of_the_routed_model(model, reading, ids):
    torch.manual_seed(0)  # as make_spoken does: the same base, which no adapter has touched
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": 261})).eval()
    base = torch.tensor([token.base for token in reading.predicted])
    routed = torch.tensor([token.routed for token in reading.predicted])
    torch.testing.assert_close(base, losses(plain, ids))
    torch.testing.assert_close(routed, losses(model, ids))
    assert (base - routed).abs().max() > 0.01
    first = reading.tokens[0]
    assert (first.routed, first.base, first.gain, list(first.route), dict(first.odds)) == (None, None, None, [], {})
    gains = [token.gain for token in reading.predicted]
    assert gains == pytest.approx((base - routed).tolist(), abs=1e-6)


def test_colour_distribution_and_loss_are_of_the_position_before(model, reading, ids):
    with torch.no_grad():
        out = model(input_ids=ids, output_routes=True)
    found = set()
    for place, token in enumerate(reading.predicted, 1):
        assert list(token.route) == out.routes.at(0, place - 1)
        odds = dict(token.odds["domain"])
        assert list(odds) == ["math", "code", None] and sum(odds.values()) == pytest.approx(1, abs=1e-5)
        assert max(odds, key=odds.__getitem__) == speaker(token.route, "domain")
        found.add(speaker(token.route, "domain"))
        assert token.guesses[0].probability == pytest.approx(float(out.logits[0, place - 1].softmax(-1).max()))
        assert token.after[0].probability == pytest.approx(float(out.logits[0, place].softmax(-1).max()))
        assert len(token.guesses) == len(token.base_guesses) == len(token.after) == 3
    assert found == {"math", "code", None}
    assert list(reading.tokens[1].odds) == ["domain"]  # the other layer has no adapters to decide among


def test_texts_join_to_the_text_and_a_part_of_a_character_is_empty(reading):
    assert "".join(token.text for token in reading.tokens) == TEXT
    parts = [place for place, token in enumerate(reading.tokens) if not token.text]
    assert len(parts) == len("Київ")
    assert all(reading.tokens[place + 1].text in "Київ" for place in parts)


def test_a_forced_layer_is_not_asked_and_acts_everywhere(model, palette):
    reading = measure(model, TEXT, {"domain": "code"})
    assert all(dict(token.odds) == {} for token in reading.tokens)
    assert {speaker(token.route, "domain") for token in reading.predicted} == {"code"}
    assert "domain (code, for the whole text)" in detail_html(reading, 3, palette)
    off = measure(model, TEXT, {"domain": None})
    assert [token.routed for token in off.tokens] == [token.base for token in off.tokens]


def test_a_long_text_is_cut_and_says_so(model):
    reading = measure(model, "word " * 400, {}, limit=40)
    assert len(reading.tokens) == 40 and "only its first 40 tokens are shown" in reading.notes[0]
    longest = measure(model, "word " * 40 * LIMIT, {})
    assert len(longest.tokens) == SMALL["max_position_embeddings"]  # this base reads fewer than the view shows


def test_a_single_token_has_no_loss(model, palette):
    reading = measure(model, "x", {})
    assert facts(reading) == "1 token. A loss needs a token before it."
    assert "<svg" not in reading_html(reading, palette, palette)
    assert "no loss and no route" in detail_html(reading, 0, palette)


@pytest.mark.parametrize("text", ["", "  \n\t "])
def test_no_text_is_refused_in_words(model, text):
    with pytest.raises(DataError, match="no text yet"):
        measure(model, text, {})


def test_a_stack_without_a_router_and_a_keyed_layer_work_and_say_so(tmp_path):
    torch.manual_seed(0)
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, "vocab_size": 261})).eval()
    paths = {name: write_adapter(base, tmp_path / name, seed) for seed, name in enumerate(("low", "high"))}
    stack = Stack([StackLayer("task", paths, keyed=True), StackLayer("domain", {"low": paths["low"]})])
    model = MoLoRAModel.from_base(base, stack, tokenizer=make_tokenizer()).eval()
    for sign, name in ((1, "low"), (-1, "high")):
        model.keys.put("task", name, sign * torch.rand(8, SMALL["hidden_size"]))
    reading = measure(model, TEXT, {})
    belongs = model.find(TEXT)["task"]
    assert {speaker(token.route, "task") for token in reading.predicted} == {belongs}
    assert {speaker(token.route, "domain") for token in reading.predicted} == {None}
    assert f"the text as a whole belongs to {belongs}" in reading.notes[0] and "no router" in reading.notes[1]
    assert f"task ({belongs}, for the whole text)" in detail_html(reading, 2, Palette(model.stack.layers))


def test_the_table_comes_back_from_the_csv(reading):
    header, *rows = csv.reader(io.StringIO(csv_text(reading), newline=""))
    assert (header, [[row[0], unguarded(row[1]), *row[2:]] for row in rows]) == table(reading)
    assert header == ["index", "token", "domain adapter", "domain weight", "user adapter", "user weight",
                      "loss routed", "loss base"]  # fmt: skip
    assert rows[0][2:] == [""] * 6 and float(rows[5][-1]) == pytest.approx(reading.tokens[5].base, abs=1e-6)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2", "@SUM(A1)", "\t=1", "\r", " =HYPERLINK()", "'=1", "''=", "＝1"])
def test_a_spreadsheet_takes_no_token_for_a_formula(text):
    assert guarded(text) == f"'{text}" and unguarded(guarded(text)) == text


@pytest.mark.parametrize("text", ["word", "'s", "", " 3", 'say "a, b"', "a\nb", "''"])
def test_other_tokens_stay_as_they_are(text):
    assert guarded(text) == text == unguarded(text)
    reading = Reading([Measured(text)], ["domain"], [])
    assert list(csv.reader(io.StringIO(csv_text(reading), newline="")))[1][1] == text


def test_the_view_has_an_element_for_each_token_and_escapes_it(palette):
    route = [("domain", "math", 1.0)]
    odds = {"domain": [("math", 0.75), ("code", 0.2496), (None, 0.0004)]}
    guess = (Guess(HOSTILE, 0.5),)
    token = Measured(HOSTILE, route, odds, 1.0, 3.0, guess, guess, guess)
    reading = Reading([Measured(HOSTILE), token, Measured("", route, odds, 2.0, 1.0)], ["domain", "user"], [HOSTILE])
    for page in (reading_html(reading, palette, palette, 1), detail_html(reading, 1, palette)):
        assert "<script" not in page and "${" not in page and "{{" not in page and "&lt;script&gt;" in page
    view, detail = reading_html(reading, palette, palette, 1), detail_html(reading, 1, palette)
    assert view.count('role="option"') == 3 and view.count('aria-selected="true"') == 1 and CONVENTION in view
    assert 'class="run tok fill-0"' in view and 'class="run tok fill-0 part"' in view
    assert "Mean loss 1.500 nats with adapters and 2.000 by the base alone: 0.500 better" in view
    assert "1 of 2 tokens are predicted better" in view and "math 100%" in view
    assert "2.000 better" in detail and "<b>75.0%</b>" in detail and "<b>&lt;0.1%</b>" in detail
    assert "none: the base alone" in detail and "math\u00a0✓" in detail


def test_the_curve_draws_every_loss_and_difference(reading):
    svg = curve_svg(reading.tokens, 2)
    lines = re.findall(r'<polyline class="(\w+)" points="([^"]+)"', svg)
    assert [name for name, _ in lines] == ["base", "routed"]
    assert all(len(points.split()) == len(reading.predicted) for _, points in lines)
    better = sum((token.gain or 0) > 0 for token in reading.predicted)
    assert svg.count('<rect class="better"') == better and 'x1="2.5"' in svg


def test_another_layer_colours_with_its_own_fills():
    fake = FakeModel()
    chat = Palette(fake.stack.layers)
    assert palette_for(chat, fake.stack["domain"]) is chat
    own = palette_for(chat, fake.stack["personality"])
    assert own.css_class("personality", "pirate") == "fill-1"


def test_the_picture_has_room_for_every_line(reading):
    pieces = [Piece(token.text, None, token.routed, token.base) for token in reading.tokens]
    image = draw(pieces, [("math 50%", 0), ("none 50%", None)], "Routes", "Facts.")
    assert image.width == WIDTH * SCALE and image.height > 300
    taller = draw([Piece("\n", 0, 1.0, 2.0)] * 2000, [("math", 0)], "Routes", "Facts.")
    assert image.height < taller.height < (MOST_LINES + 30) * 30 * SCALE
    fill = draw([Piece("x" * 500, 2, None, None)], [], "", "").getcolors(1 << 20)
    assert (0xCE, 0xF9, 0xC8) in {colour for _, colour in fill}


def test_the_files_are_one_browsers_and_go_with_the_next(model, palette, reading, monkeypatch, tmp_path):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    handlers = routes.Handlers(model, palette)
    one, other = (handlers.files("domain", reading, None) for _ in range(2))
    paths = [Path(update["value"]) for update in one[:2]]
    assert [path.name for path in paths] == [routes.CSV, routes.PNG]
    assert paths[0].parent == paths[1].parent != Path(other[0]["value"]).parent
    assert paths[0].read_text("utf-8-sig").startswith("index,token,domain adapter")
    with Image.open(paths[1]) as image:
        assert image.format == "PNG" and min(image.size) > 0
    gone = handlers.files("domain", None, one[2])
    assert not paths[0].parent.exists() and gone[0]["interactive"] is False and Path(other[0]["value"]).exists()
    routes.remove(other[2])


def test_a_refused_text_is_a_toast_and_an_unknown_place_is_nothing(model, palette, reading, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(routes.gr, "Warning", said.append)
    handlers = routes.Handlers(model, palette)
    assert handlers.show("", " ", "domain") == (EMPTY, "", None, None) and "no text yet" in said[0]
    assert handlers.recolour("domain", None, None) == EMPTY
    for data in ({"index": len(reading.tokens)}, {"index": -1}, {"index": "0"}, {}, None, "x"):
        assert handlers.pick(gr.EventData(None, data), reading) == ("", None)
    page, place = handlers.pick(gr.EventData(None, {"index": 4}), reading)
    assert place == 4 and "Token 5 of" in page
    assert handlers.pick(gr.EventData(None, {"index": 4}), None) == ("", None)


def test_what_is_other_browsers_is_not_used(model, palette):
    asked: list[Any] = []

    def visible(key: str, selection: dict[str, Any]) -> dict[str, Any]:
        asked.append((key, selection))
        return {**selection, "domain": ["math"]}

    reading = routes.Handlers(model, palette, visible).show("mine", TEXT, "domain")[2]
    assert asked == [("mine", {"domain": "auto", "user": None})]
    assert {name for name, _ in reading.tokens[1].odds["domain"]} == {"math", None}


def test_layers_that_the_router_leaves_are_told_by_a_person():
    fake = FakeModel()
    assert [layer.name for layer in routes.told_layers(fake)] == ["personality", "user"]
    fake.router = None
    assert [layer.name for layer in routes.told_layers(fake)] == ["personality", "domain", "user"]
    fake.stack["domain"].keyed = True
    assert "domain" not in [layer.name for layer in routes.told_layers(fake)]


@pytest.fixture(scope="module")
def address(model: MoLoRAModel) -> Iterator[str]:
    with gr.Blocks(analytics_enabled=False) as page, gr.Tab("Routes"):
        routes.build(model, Palette(model.stack.layers))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    yield app.serve(page, port=port, open_browser=False, block=False)
    page.close(verbose=False)


def test_two_browsers_do_not_see_each_others_text(address):
    one, other = Client(address, verbose=False), Client(address, verbose=False)
    view = one.predict("my secret", "domain", api_name="/routes")[0]
    assert "9 tokens" in view and view.count('role="option"') == 9
    assert other.predict("domain", api_name="/routes_by") == EMPTY
    other.predict("hers", "domain", api_name="/routes")
    assert "9 tokens" in one.predict("domain", api_name="/routes_by")
    assert "4 tokens" in other.predict("domain", api_name="/routes_by")
    assert "secret" not in unescape(re.sub("<[^>]+>", "", other.predict("domain", api_name="/routes_by")))


def test_a_tab_of_a_stack_that_is_told_and_routed_can_be_built():
    with gr.Blocks(analytics_enabled=False) as page, gr.Tab("Routes"):
        routes.build(FakeModel(), Palette(FakeModel().stack.layers))
    labels = {getattr(block, "label", None) for block in page.blocks.values()}
    assert {"Text", "Colour by", "Personality", "What am I looking at?"} <= labels
    waiting = [fn for fn in page.fns.values() if fn.concurrency_id == "generate"]
    assert len(waiting) == 1 + len(routes.EXAMPLES) and all(fn.concurrency_limit == 1 for fn in waiting)


@pytest.mark.parametrize(("scheme", "paper"), [(":root", "#ffffff"), (".dark", "#18181b")])
def test_the_curves_colours_stand_out(scheme, paper):
    css = Path(molora_demo.__file__).with_name("routes.css").read_text(encoding="utf-8")
    colours = re.findall(r"--[\w-]+: (#[0-9a-f]{6})", css[css.index(f"{scheme} {{") :].split("}", 1)[0])
    assert len(colours) == 4
    assert all(_contrast(colour, paper) >= 4.5 for colour in colours)
