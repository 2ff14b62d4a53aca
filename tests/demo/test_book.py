"""Conversations as a browser keeps them."""

import pytest

from molora_demo import book
from molora_demo.source import Turn


def turns(*prompts: str) -> list[Turn]:
    return [Turn(prompt, "yes", "<p>yes</p>") for prompt in prompts]


def test_the_newest_comes_first_and_is_read_again():
    kept = book.saved(book.saved([], "a", turns("one")), "b", turns("two", "three"))
    kept = book.saved(kept, "a", turns("one", "more"))
    assert book.listed(kept, "a") == [("one", "a"), ("two", "b")]
    assert book.opened(kept, "a") == turns("one", "more") and book.opened(kept, "c") == []
    assert book.listed(kept, "c")[0] == ("New conversation", "c")
    assert book.saved(kept, "a", []) == book.saved([], "b", turns("two", "three"))


def test_a_title_is_the_beginning_of_the_first_question():
    assert book.title(turns("a\n  b")) == "a b"
    long = book.title(turns("word " * 50))
    assert len(long) <= book.TITLE and long.endswith("wo…")


def test_the_oldest_go_where_there_is_no_room():
    kept: list = []
    for number in range(book.MOST_CHATS + 3):
        kept = book.saved(kept, str(number), turns("short"))
    assert len(kept) == book.MOST_CHATS and kept[0]["id"] == str(book.MOST_CHATS + 2)
    kept = book.saved(kept, "large", turns("x" * book.MOST_CHARACTERS))
    assert [entry["id"] for entry in kept] == ["large"]


@pytest.mark.parametrize(
    "stored",
    [None, "text", {"id": "a"}, [7], [{"id": "a"}], [{"id": 1, "title": "t", "turns": []}],
     [{"id": "a", "title": "t", "turns": [["p", "a"]]}], [{"id": "a", "title": "t", "turns": [["p", "a", 3]]}]],
)  # fmt: skip
def test_what_was_changed_in_the_browser_is_left_out(stored):
    assert book.checked(stored) == [] and book.opened(stored, "a") == []
    assert book.saved(stored, "b", turns("new"))[0]["title"] == "new"
