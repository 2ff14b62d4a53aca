"""Tokens as HTML: what is escaped, which colour an adapter has, what the hover text and the shares say."""

import re
from pathlib import Path

import pytest

import molora_demo
from molora.stack import StackLayer
from molora_demo.render import (
    FILLS,
    LINES,
    Palette,
    Stats,
    conversation_html,
    escape,
    failed_html,
    legend_html,
    running_html,
    shares,
    shares_html,
    speaker,
    stats_text,
    tokens_html,
    turn_html,
)
from tests.demo.fake_model import FakeModel, FakeToken

HOSTILE = "<script>alert(1)</script> \" ' & ${1+1} {{value}}"
PALETTE = Palette(FakeModel().stack.layers)


def token(text: str, domain: str | None = None, weight: float = 1.0, personality: str | None = None) -> FakeToken:
    return FakeToken(0, text, [("personality", personality, 1.0), ("domain", domain, weight), ("user", None, 0.0)])


def test_escape_leaves_no_markup_and_no_template_syntax():
    assert not set("<>\"'${}") & set(escape(HOSTILE).replace("&#36;", "").replace("&#x27;", ""))


@pytest.mark.parametrize(
    "page",
    [
        turn_html(HOSTILE, [token(HOSTILE, "math")], Stats(1, 0.1, 0.0), PALETTE, HOSTILE),
        running_html(HOSTILE, [token(HOSTILE)], PALETTE),
        failed_html(HOSTILE, HOSTILE),
    ],
)
def test_every_page_part_escapes_what_people_and_models_write(page):
    assert "<script" not in page and "${" not in page and "{{" not in page
    assert "&lt;script&gt;" in page


def test_the_speaking_layer_is_the_routed_one_wherever_it_stands():
    assert PALETTE.speaking.name == "domain"
    told = [StackLayer("user", {"ada": "a"}, shared=True), StackLayer("style", {"sage": "s"}, default=None)]
    assert Palette(told).speaking.name == "style"
    assert Palette(told[:1]).speaking.name == "user"


def test_colours_are_distinct_and_the_same_in_every_answer():
    fills = [PALETTE.css_class("domain", name) for name in ("math", "code", "medicine", "law")]
    assert fills == ["fill-0", "fill-1", "fill-2", "fill-3"]
    assert 'class="run fill-1"' in tokens_html([token("a", "code")], PALETTE)
    assert 'class="run fill-1"' in tokens_html([token("b", "law"), token("a", "code")], PALETTE)
    marks = {PALETTE.css_class(layer, name) for layer, name in (("personality", "pirate"), ("user", "ada"))}
    assert marks == {"line-1", "dots-2"}
    assert PALETTE.css_class("domain", None) == ""


def test_an_adapter_that_comes_later_has_the_next_colour():
    palette = Palette([StackLayer("domain", {"math": "m"}), StackLayer("user", {"ada": "a"}, default=None)])
    assert [palette.css_class("domain", name) for name in ("math", "law", "code", "law")] == [
        "fill-0", "fill-1", "fill-2", "fill-1"
    ]  # fmt: skip
    lines = [palette.css_class("user", name) for name in ("ada", "grace", "ada")]
    assert lines[0] == lines[2] != lines[1]


def test_more_adapters_than_colours_go_round_again():
    many = Palette([StackLayer("domain", {f"d{n}": "x" for n in range(FILLS + 1)})])
    assert many.css_class("domain", f"d{FILLS}") == many.css_class("domain", "d0")


def test_personality_underlines_and_domain_fills():
    assert 'class="run fill-0 line-0"' in tokens_html([token("x", "math", personality="sage")], PALETTE)


def test_hover_shows_every_layer_with_its_weight():
    page = tokens_html([token("x", "math", 0.756, "sage")], PALETTE)
    assert 'data-route="domain: math 0.76\npersonality: sage 1.00\nuser: none"' in page


def test_two_adapters_of_one_layer_both_show_and_the_heavier_colours():
    route = [("domain", "math", 0.3), ("domain", "law", 0.7)]
    page = tokens_html([FakeToken(0, "x", route)], PALETTE)
    assert "domain: math 0.30, law 0.70" in page and "run fill-3" in page
    assert speaker(route, "domain") == "law" and speaker(route, "user") is None


def test_neighbours_with_one_route_share_a_span_and_keep_newlines():
    page = tokens_html([token("a\n", "math"), token("", "math"), token(" b", "math"), token("c", "math", 0.5)], PALETTE)
    assert page.count("<span") == 2
    assert ">a\n b</span>" in page


def test_shares_sum_to_one_and_count_tokens():
    tokens = [token("a", "math"), token("b", "math"), token("c"), token("", "math")]
    assert shares(tokens, "domain") == [("math", 0.75), (None, 0.25)]
    page = shares_html(tokens, PALETTE)
    assert "math 75%" in page and "no domain adapter 25%" in page and "flex-grow:0.7500" in page
    assert "personality" not in page
    assert "sage 100%" in shares_html([token("a", personality="sage")], PALETTE)
    assert shares_html([], PALETTE) == ""


def test_stats_in_words():
    assert stats_text(Stats(41, 0.314, 2.0)) == "41 tokens, 20.0 tokens/s, first token in 0.31 s"
    assert stats_text(Stats(1, 0.5, 0.0)) == "1 token, first token in 0.50 s"
    assert stats_text(Stats(0, None, 0.0)) == ""


def test_legend_names_every_adapter_in_words():
    page = legend_html(PALETTE)
    for name in ("math", "code", "medicine", "law", "sage", "pirate", "ada", "grace", "none: the base model alone"):
        assert f"</span>{name}</li>" in page
    for drawn in ("background", "underline", "dotted underline"):
        assert f"<small>{drawn}</small>" in page


def test_an_empty_conversation_welcomes_and_a_busy_one_says_so():
    assert "welcome" in conversation_html([])
    assert 'aria-busy="true"' in conversation_html(["x"], busy=True)


def _luminance(colour: str) -> float:
    parts = [int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one: str, other: str) -> float:
    bright, dim = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


@pytest.mark.parametrize("scheme", [":root", ".dark"])
def test_text_and_underlines_can_be_seen_on_every_fill(scheme):
    css = Path(molora_demo.__file__).with_name("style.css").read_text(encoding="utf-8")
    block = css[css.index(f"{scheme} {{") :].split("}", 1)[0]
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block))
    fills = [colours[f"fill-{n}"] for n in range(FILLS)]
    for ground in [*fills, colours["paper"], colours["soft"]]:
        assert _contrast(colours["ink"], ground) >= 4.5
        for n in range(LINES):
            assert _contrast(colours[f"line-{n}"], ground) >= 3
    assert _contrast(colours["faint"], colours["paper"]) >= 4.5
