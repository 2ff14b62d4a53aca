"""What a model's name stands for, and that the users of a shared layer stay private."""

import re

import pytest

from molora.errors import RequestError, StackError
from molora.serve.names import UnknownNameError, confine, models, parse_model
from molora.stack import Stack, StackLayer
from tests.serve.fake_engine import make_stack

STACK = make_stack()
OFF = {"personality": None, "domain": None, "user": None}


@pytest.mark.parametrize(
    ("name", "selection"),
    [
        ("molora", {}),
        ("base", OFF),
        ("org/a+b", OFF),
        ("org/a+b+sage", {**OFF, "personality": "sage"}),
        ("base+sage+auto+user/ada", {"personality": "sage", "domain": "auto", "user": "ada"}),
        ("base+auto", {"personality": "auto", "domain": "auto", "user": None}),
        ("base+domain/pirate", {**OFF, "domain": "pirate"}),
        ("base+math+code", {**OFF, "domain": {"math": 1.0, "code": 1.0}}),
        ("base+math+math", {**OFF, "domain": "math"}),
        ("molora+ben", {"user": "ben"}),
    ],
)
def test_a_name_is_a_selection(name, selection):
    assert parse_model(name, STACK, "org/a+b") == selection


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("gpt-4", "There is no model 'gpt-4'.*domain/code"),
        ("base+law", "no such adapter: 'law'.*domain/math"),
        ("base+domain/law", "'domain' has no adapter 'law'; it has math, code, pirate"),
        ("base+weather/rain", "no layer 'weather'.*personality, domain, user"),
        ("base+", "no such adapter: ''"),
        ("", "There is no model ''"),
        ("molora+user/eve", "no such adapter: user/'eve'"),
    ],
)
def test_unknown_names_say_what_exists_and_no_users(name, says):
    with pytest.raises(UnknownNameError, match=says) as error:
        parse_model(name, STACK, "org/small")
    assert not re.search(r"\b(ada|ben)\b", str(error.value))


def test_a_name_of_two_layers_says_where():
    with pytest.raises(RequestError, match=r"'personality/pirate', 'domain/pirate'"):
        parse_model("base+pirate", STACK, "org/small")


@pytest.mark.parametrize("form", ["base+user/{}", "base+{}", "molora+auto+user/{}"])
def test_another_user_is_as_one_who_is_not_there(form):
    told = []
    for name in ("ben", "eve"):
        with pytest.raises(UnknownNameError) as error:
            parse_model(form.format(name), STACK, "org/small", user="ada")
        told.append(str(error.value).replace(name, "NAME"))
    assert told[0] == told[1]
    assert parse_model(form.format("ada"), STACK, "org/small", user="ada")["user"] == "ada"


@pytest.mark.parametrize("choice", ["ben", ["ben"], ["ada", "ben"], {"ada": 0.5, "ben": 0.5}])
def test_no_form_of_a_selection_reaches_another_user(choice):
    with pytest.raises(UnknownNameError):
        confine({"user": choice}, STACK, "ada")
    assert confine({"user": choice}, STACK)["user"] == choice


def test_the_router_is_not_asked_about_users():
    with pytest.raises(RequestError, match="tell users apart"):
        confine({"user": "auto"}, STACK)


def test_another_users_default_does_not_act():
    stack = Stack([StackLayer("user", {"ada": "x", "ben": "x"}, shared=True, default="ben")])
    assert parse_model("molora", stack, "b", user="ada") == {"user": None}
    assert parse_model("molora", stack, "b", user="ben") == {}
    assert parse_model("molora+ada", stack, "b", user="ada") == {"user": "ada"}


def test_a_pooled_layer_takes_any_plain_name_of_ones_own():
    assert parse_model("base+user/eve", STACK, "b", "eve", {"user"})["user"] == "eve"
    for name in ("base+user/zoe", "base+eve", "base+domain/eve"):
        with pytest.raises(UnknownNameError):
            parse_model(name, STACK, "b", "eve", {"user"})
    with pytest.raises(StackError):
        confine({"user": "../eve"}, STACK, None, {"user"})


def test_only_the_own_adapter_is_listed_of_a_shared_layer():
    assert [name for name in models(STACK) if "user" in name] == []
    assert models(STACK, "ada")[-1] == "base+user/ada" and "base+user/ben" not in models(STACK, "ada")
    assert models(STACK, "eve") == models(STACK)
