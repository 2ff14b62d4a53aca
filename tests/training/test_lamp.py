"""LaMP's metrics against rouge-score, numpy and sums done by hand."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from molora.errors import DataError
from molora.personalize.history import Sample
from molora_training.lamp import LABELS, accuracy, macro_f1, mae, rmse, rouge, score, stars


def samples(*outputs: str | None) -> list[Sample]:
    return [Sample(str(number), "?", (), output) for number, output in enumerate(outputs)]


def answers(*texts: str) -> dict[str, str]:
    return {str(number): text for number, text in enumerate(texts)}


def test_macro_f1_is_the_mean_over_all_labels() -> None:
    golds = ["a", "a", "b", "b", "c"]
    given = ["a", "b", "b", "no label", "a"]
    # a: TP 1, FP 1, FN 1 -> 1/2; b: TP 1, FP 1, FN 1 -> 1/2; c: TP 0, FN 1 -> 0; d: neither side has it -> 0
    assert macro_f1(given, golds, ["a", "b", "c", "d"]) == pytest.approx((1 / 2 + 1 / 2 + 0 + 0) / 4)
    assert macro_f1(golds, golds, ["a", "b", "c"]) == 1
    assert accuracy(given, golds) == pytest.approx(2 / 5)


def test_citations_are_scored_by_their_labels() -> None:
    found = score("LaMP_1", samples("[1]", "[2]", "[2]", "[1]"), answers(" [1]", "[1]", "[2]\n", "the first"))
    # [1]: TP 1, FP 1, FN 1 -> 1/2; [2]: TP 1, FN 1 -> 2/3
    assert found == {"accuracy": pytest.approx(0.5), "f1": pytest.approx((1 / 2 + 2 / 3) / 2)}


def test_films_and_the_first_releases_news_have_fifteen_labels_each() -> None:
    assert {task: len(set(labels)) for task, labels in LABELS.items()} == {"LaMP_1": 2, "LaMP_2": 15, "LaMP_2_news": 15}
    film = score("LaMP_2", samples("twist ending", "comedy"), answers("twist ending", "drama"))
    assert film == {"accuracy": 0.5, "f1": pytest.approx(1 / 15)}
    news = score("LaMP_2", samples("politics", "women"), answers("politics", "women"))
    assert news == {"accuracy": 1, "f1": pytest.approx(2 / 15)}


def test_stars_are_scored_as_numbers_and_what_is_none_as_far_away() -> None:
    golds = np.array([5.0, 1.0, 3.0, 4.0])
    found = score("LaMP_3", samples("5", "1", "3", "4"), answers("4", "great", " 2.5 ", "nan"))
    given = np.array([4.0, 5.0, 2.5, 1.0])
    assert found["mae"] == pytest.approx(np.abs(given - golds).mean())
    assert found["rmse"] == pytest.approx(np.sqrt(((given - golds) ** 2).mean()))
    assert [stars(text, 2.0) for text in ("inf", "-inf", "", "two", "1e0")] == [5.0, 5.0, 5.0, 5.0, 1.0]
    assert stars("?", 3.0) == 5.0 and stars("?", 3.1) == 1.0
    assert mae([1.0], [3.0]) == rmse([1.0], [3.0]) == 2.0


def test_texts_are_scored_by_rouge() -> None:
    golds = ["the cat sat on the mat", "ducks are back", "a b c d"]
    given = ["the cat lay on a mat", "", "d c b a"]
    found = score("LaMP_7", samples(*golds), answers(*given))
    scorer = RougeScorer(["rouge1", "rougeL"])
    each = [scorer.score(gold, one) for gold, one in zip(golds, given, strict=True)]
    assert found["rouge-1"] == pytest.approx(np.mean([one["rouge1"].fmeasure for one in each]))
    assert found["rouge-l"] == pytest.approx(np.mean([one["rougeL"].fmeasure for one in each]))
    # 4 of 6 and 6 words; nothing; the same words, of which one is in order
    assert found["rouge-1"] == pytest.approx((4 / 6 + 0 + 1) / 3)
    assert found["rouge-l"] == pytest.approx((4 / 6 + 0 + 1 / 4) / 3)
    assert rouge(golds, golds) == {"rouge-1": 1.0, "rouge-l": 1.0}
    assert score("LongLaMP_review", samples(*golds), answers(*given)) == found


@pytest.mark.parametrize(
    ("task", "golds", "given", "sentence"),
    [
        ("LaMP_7", (), (), "no samples"),
        ("LaMP_7", ("a", "b"), ("a",), "differ in the id '1'"),
        ("LaMP_7", ("a",), ("a", "b"), "differ in the id '1'"),
        ("LaMP_7", ("a", None), ("a", "b"), "'1' has no gold answer"),
        ("LaMP_1", ("[1]", "[3]"), ("[1]", "[1]"), "'1' is none of the labels"),
        ("LaMP_3", ("5", "good"), ("5", "5"), "no number"),
    ],
)
def test_bad_sets_are_refused(task: str, golds: tuple, given: tuple, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        score(task, samples(*golds), answers(*given))


def test_unequal_numbers_are_refused() -> None:
    for measure in (accuracy, mae, rmse, rouge):
        with pytest.raises(DataError, match="2 predictions and 1 gold"):
            measure([1, 2], [1])  # type: ignore[operator]
    with pytest.raises(DataError, match="0 predictions and 0 gold"):
        macro_f1([], [], ["a"])
