"""The metrics of LaMP and LongLaMP: accuracy and macro-F1, MAE and RMSE, ROUGE-1 and ROUGE-L.

What is measured by task, and what becomes of an answer that is no label or no number, is as in the evaluation that LaMP
publishes; only two labels that are both unknown do not count as equal here.
"""

from collections.abc import Mapping, Sequence

from molora.errors import DataError
from molora.personalize.history import Sample

LABELS: dict[str, tuple[str, ...]] = {
    "LaMP_1": ("[1]", "[2]"),
    "LaMP_2": (
        "sci-fi", "based on a book", "comedy", "action", "twist ending", "dystopia", "dark comedy", "classic",
        "psychology", "fantasy", "romance", "thought-provoking", "social commentary", "violence", "true story",
    ),
    "LaMP_2_news": (
        "food & drink", "sports", "education", "parents", "religion", "travel", "business", "crime",
        "science & technology", "culture & arts", "entertainment", "politics", "women", "style & beauty",
        "healthy living",
    ),
}  # fmt: skip
FEWEST_STARS, MOST_STARS = 1.0, 5.0


def score(task: str, samples: Sequence[Sample], predictions: Mapping[str, str]) -> dict[str, float]:
    """The metrics of a task: accuracy and f1, or mae and rmse, or rouge-1 and rouge-l.

    Args:
        task: as `molora.personalize.history.read_lamp` names it; labels of its first release's news are known by the
            gold answers.
        samples: with gold answers.
        predictions: an answer by id, for each sample and no other.

    Raises:
        DataError: there are no samples, a sample has no gold answer, the ids differ, or a gold answer is no label or no
            number of the task; the id is named.
    """
    if not samples:
        raise DataError("There are no samples to score.")
    golds = {sample.id: sample.output for sample in samples}
    differ = sorted(set(golds) ^ set(predictions))
    if differ:
        raise DataError(f"Samples and predictions differ in the id '{differ[0]}': predict each sample and no other.")
    nameless = [name for name, gold in golds.items() if gold is None]
    if nameless:
        raise DataError(f"The sample '{nameless[0]}' has no gold answer: score a split whose answers are public.")
    right = [(gold or "").strip() for gold in golds.values()]
    given = [predictions[name].strip() for name in golds]
    if task in LABELS:
        labels = LABELS["LaMP_2_news" if task == "LaMP_2" and set(right) <= set(LABELS["LaMP_2_news"]) else task]
        odd = [name for name, gold in zip(golds, right, strict=True) if gold not in labels]
        if odd:
            raise DataError(f"The gold answer of '{odd[0]}' is none of the labels of {task}.")
        return {"accuracy": accuracy(given, right), "f1": macro_f1(given, right, labels)}
    if task == "LaMP_3":
        try:
            numbers = [float(gold) for gold in right]
        except ValueError as error:
            raise DataError(f"A gold answer of {task} is no number ({error}).") from None
        read = [stars(text, gold) for text, gold in zip(given, numbers, strict=True)]
        return {"mae": mae(read, numbers), "rmse": rmse(read, numbers)}
    return rouge(given, right)


def accuracy(predictions: Sequence[str], golds: Sequence[str]) -> float:
    """The share of predictions that are the gold answer, letter by letter. Raises DataError for unequal numbers."""
    _check(predictions, golds)
    return sum(one == gold for one, gold in zip(predictions, golds, strict=True)) / len(golds)


def macro_f1(predictions: Sequence[str], golds: Sequence[str], labels: Sequence[str]) -> float:
    """The mean over `labels` of F1 = 2 TP / (2 TP + FP + FN), 0 for a label that neither side has.

    Raises DataError for unequal numbers.
    """
    _check(predictions, golds)
    pairs = list(zip(predictions, golds, strict=True))
    total = 0.0
    for label in labels:
        both = sum(one == label == gold for one, gold in pairs)
        either = sum((one == label) + (gold == label) for one, gold in pairs)  # 2 TP + FP + FN
        total += 2 * both / either if either else 0.0
    return total / len(labels)


def stars(text: str, gold: float) -> float:
    """The number that an answer is; what is none, or not finite, counts as far from the gold answer as stars can be."""
    try:
        found = float(text)
    except ValueError:
        found = float("nan")
    if found - found == 0:  # neither infinite nor NaN
        return found
    return FEWEST_STARS if abs(FEWEST_STARS - gold) > abs(MOST_STARS - gold) else MOST_STARS


def mae(predictions: Sequence[float], golds: Sequence[float]) -> float:
    """The mean absolute error. Raises DataError for unequal numbers."""
    _check(predictions, golds)
    return sum(abs(one - gold) for one, gold in zip(predictions, golds, strict=True)) / len(golds)


def rmse(predictions: Sequence[float], golds: Sequence[float]) -> float:
    """The root of the mean squared error. Raises DataError for unequal numbers."""
    _check(predictions, golds)
    return (sum((one - gold) ** 2 for one, gold in zip(predictions, golds, strict=True)) / len(golds)) ** 0.5


def rouge(predictions: Sequence[str], golds: Sequence[str]) -> dict[str, float]:
    """The mean F-measures of ROUGE-1 and ROUGE-L as `rouge-score` has them, without stemming.

    It knows Latin letters and digits only: of other scripts every text is empty to it, and scores 0.

    Raises DataError for unequal numbers.
    """
    _check(predictions, golds)
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    found = [scorer.score(gold, one) for one, gold in zip(predictions, golds, strict=True)]
    return {
        name: sum(each[key].fmeasure for each in found) / len(found)
        for name, key in (("rouge-1", "rouge1"), ("rouge-l", "rougeL"))
    }


def _check(predictions: Sequence[object], golds: Sequence[object]) -> None:
    if len(predictions) != len(golds) or not golds:
        raise DataError(f"There are {len(predictions)} predictions and {len(golds)} gold answers: give one for each.")
