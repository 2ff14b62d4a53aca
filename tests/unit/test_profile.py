"""The text that stands for a user: what it says, how long it is, and that it is always the same."""

from collections.abc import Sequence

import pytest
import torch

from molora.errors import ConfigError
from molora.personalize import profile
from molora.personalize.history import Interaction
from molora.personalize.profile import (
    FEWEST_CHARACTERS,
    NOBODY,
    frequent_words,
    most_central,
    profile_text,
    statistics,
)

HISTORY = [
    Interaction("What do you eat?", "Green apples and green pears."),
    Interaction("What do you drink?", "Green tea, with apples in it."),
    Interaction("Which rocket?", "The one that burns methane, of course: it is cheaper to run."),
    Interaction("Which fruit?", "Apples, and the green ones at that."),
]
# The mean of the four is nearest to the second, then to the third.
VECTORS = torch.nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 2.0], [0.0, 1.0]]), dim=-1)


class Fixed:
    """An encoder that knows the vectors of HISTORY, and what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        self.asked.append(list(texts))
        return VECTORS[: len(texts)]


def test_the_numbers_and_frequent_words_stand_first() -> None:
    text = profile_text(HISTORY, encoder=Fixed())
    assert text.splitlines()[0] == statistics(HISTORY)
    assert statistics(HISTORY).startswith(
        "4 interactions. A question has 3.0 words in the mean, an answer 7.5. Frequent in answers: green, apples, "
    )


def test_frequent_words_leave_out_stop_words_numbers_and_short_words() -> None:
    texts = ["the and of with 1984 1984 1984 ox ox ox duck", "Zebra duck duck! the, THE", "emu zebra emu"]
    assert frequent_words(texts, 9) == ["duck", "emu", "zebra"]
    assert frequent_words(texts, 1) == ["duck"]
    assert frequent_words(["і в на що качка качка"], 5)[0] == "качка"
    assert frequent_words([], 3) == []


def test_of_ratings_it_is_said_how_often_each_was_given() -> None:
    rated = [Interaction("?", stars) for stars in ("4.5", "1", "4.5", "5", "1", "4.5")]
    assert statistics(rated).endswith("Answers: 4.5 (3 times), 1 (2 times), 5 (1 times).")
    assert len(statistics([Interaction("?", f"label {number}") for number in range(99)])) <= FEWEST_CHARACTERS


def test_the_most_central_are_the_nearest_to_the_mean() -> None:
    mean = VECTORS.mean(0)
    wanted = sorted(range(4), key=lambda place: float((VECTORS[place] - mean / mean.norm()).norm()))
    assert most_central(VECTORS) == wanted == [1, 2, 3, 0]
    assert most_central(torch.ones(3, 2)) == [0, 1, 2]
    typical = [line for line in profile_text(HISTORY, embeddings=VECTORS, central=2).splitlines() if "Typical" in line]
    assert [place for line in typical for place, one in enumerate(HISTORY) if one.question in line] == [1, 2]


def test_a_question_brings_its_two_nearest_which_are_not_shown_twice() -> None:
    encoder = Fixed()
    lines = profile_text(HISTORY, "Is methane for rocket tea?", encoder=encoder, central=4).splitlines()
    near = [line for line in lines if line.startswith("Nearest")]
    assert len(near) == 2 and "Which rocket?" in near[0] and "Green tea" in near[1]
    assert len(lines) == 5
    for one in HISTORY:
        assert sum(one.answer in line for line in lines) == 1
    assert encoder.asked == [[f"{one.question}\n{one.answer}" for one in HISTORY]]
    assert "Nearest" not in profile_text(HISTORY, "zebra", encoder=Fixed())
    assert "Typical" not in profile_text(HISTORY, "tea", central=0)


@pytest.mark.parametrize("limit", [FEWEST_CHARACTERS, 251, 333, 1000, 5000])
def test_it_is_never_longer_than_asked_for(limit: int) -> None:
    long = [
        Interaction(f"question {n} {{}} " * 40, f"answer{n} about " + "ducks geese swans " * n) for n in range(1, 30)
    ]
    vectors = torch.nn.functional.normalize(torch.randn(29, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    text = profile_text(long, "answer7", embeddings=vectors, limit=limit, central=5)
    assert len(text) <= limit
    assert text == profile_text(long, "answer7", embeddings=vectors, limit=limit, central=5)
    assert limit < 1000 or ("answer7" in text and len(text) > limit / 2)


def test_what_is_cut_ends_at_a_word() -> None:
    long = [Interaction("ask", "longword " * 400)]
    text = profile_text(long, embeddings=torch.ones(1, 2), limit=400)
    assert text.endswith(" longword…") and 350 < len(text) <= 400
    assert "longword longword" in text and "\n" in text


def test_an_empty_history_says_so() -> None:
    assert profile_text([]) == NOBODY
    assert profile_text([], "query", limit=FEWEST_CHARACTERS) == NOBODY


def test_without_an_encoder_the_default_one_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Fixed()
    monkeypatch.setattr(profile, "_default", lambda: encoder)
    assert profile_text(HISTORY) == profile_text(HISTORY, embeddings=VECTORS)
    assert len(encoder.asked) == 1


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="200 characters"):
        profile_text(HISTORY, embeddings=VECTORS, limit=199)
    with pytest.raises(ConfigError, match="-1"):
        profile_text(HISTORY, embeddings=VECTORS, central=-1)
    with pytest.raises(ConfigError, match="4 interactions and 3 embeddings"):
        profile_text(HISTORY, embeddings=VECTORS[:3])
