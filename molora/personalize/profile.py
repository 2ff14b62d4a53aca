"""The text that stands for a user: what a hypernetwork, or a model in its prompt, is told about them.

It says how much the user has asked and how long the answers are, which words the answers come back to, what is nearest
to a question at hand (BM25), and which interactions are the most central: nearest to the mean of all by embedding.
"""

from collections import Counter
from collections.abc import Sequence

import torch

from molora.errors import ConfigError
from molora.personalize.bm25 import bm25s
from molora.personalize.history import Interaction
from molora.personalize.retrieval import Encoder, Retriever, text_of, words

FEWEST_CHARACTERS = 200
NOBODY = "Nothing is known of this user: there are no interactions yet."

_NEAREST = 2
_FREQUENT_WORDS = 12
_SHORTEST_WORD = 3
_LABEL_WORDS = 3  # of an answer in the mean; "4.5" has two
_ELLIPSIS = "…"
_DECIMALS = 5


def profile_text(
    history: Sequence[Interaction],
    query: str | None = None,
    *,
    encoder: Encoder | None = None,
    embeddings: torch.Tensor | None = None,
    limit: int = 2000,
    central: int = 3,
) -> str:
    """The profile of a user, the same for the same history and query.

    Args:
        history: of one user; from an empty one comes `NOBODY`, which a caller should treat as no profile.
        query: a question at hand; without one nothing is retrieved.
        encoder: for the central interactions; None loads the default one. Give one to write several profiles.
        embeddings: [N, D], the interactions' unit vectors where they are known already; then no encoder is needed.
        limit: characters that the text has at most.
        central: interactions to show, fewer where the history has fewer or the room is used up.

    Raises:
        ConfigError: the limit is below `FEWEST_CHARACTERS`, `central` is negative, or there is not one embedding for
            each interaction.
        EncoderError: the default encoder cannot be had.
    """
    if limit < FEWEST_CHARACTERS or central < 0:
        raise ConfigError(
            f"A profile needs {FEWEST_CHARACTERS} characters or more and 0 central interactions or more, not {limit} "
            f"and {central}."
        )
    if not history:
        return NOBODY
    parts = [statistics(history)]
    near = Retriever(history).places(query, _NEAREST) if query else []
    shown = [("Nearest to the question", place) for place in near]
    if central:
        if embeddings is None:
            embeddings = (encoder or _default()).encode([text_of(one) for one in history])
        if len(embeddings) != len(history):
            raise ConfigError(f"There are {len(history)} interactions and {len(embeddings)} embeddings: give one each.")
        wanted = [place for place in most_central(embeddings) if place not in near][:central]
        shown += [("Typical", place) for place in wanted]
    room = limit - len(parts[0])
    for number, (title, place) in enumerate(shown):
        # Each gets an equal share of what those before it have left over.
        share = room // (len(shown) - number)
        part = _shown(title, history[place], share)
        room -= len(part)
        parts.append(part)
    return "".join(parts)


def statistics(history: Sequence[Interaction]) -> str:
    """Number, mean lengths in words and frequent words of the answers; at most `FEWEST_CHARACTERS` long.

    Where answers are ratings or labels, how often each was given stands in place of their words.
    """
    questions = [len(words(one.question)) for one in history]
    answers = [len(words(one.answer)) for one in history]
    text = (
        f"{len(history)} interactions. A question has {sum(questions) / len(history):.1f} words in the mean, an answer "
        f"{sum(answers) / len(history):.1f}."
    )
    frequent = frequent_words([one.answer for one in history], _FREQUENT_WORDS)
    if sum(answers) <= _LABEL_WORDS * len(history):
        counts = Counter(one.answer for one in history)
        often = sorted(counts, key=lambda answer: (-counts[answer], answer))[:_FREQUENT_WORDS]
        text += f" Answers: {', '.join(f'{answer} ({counts[answer]} times)' for answer in often)}."
    elif frequent:
        text += f" Frequent in answers: {', '.join(frequent)}."
    return _cut(text, FEWEST_CHARACTERS)


def frequent_words(texts: Sequence[str], count: int) -> list[str]:
    """The words that come most often, without stop words, numbers and words of one or two letters; ties by alphabet."""
    stopwords = bm25s("bm25s.stopwords")
    stops = {word for name, listed in vars(stopwords).items() if name.startswith("STOPWORDS_") for word in listed}
    found = Counter(
        word
        for text in texts
        for word in words(text)
        if len(word) >= _SHORTEST_WORD and word not in stops and not word[0].isdigit()
    )
    return sorted(found, key=lambda word: (-found[word], word))[:count]


def most_central(embeddings: torch.Tensor) -> list[int]:
    """The indices of unit vectors [N, D], the nearest to their mean first; of equals the earlier."""
    # The last digits depend on the batch that a text was in; a tie must not be decided by them.
    near = (embeddings @ embeddings.mean(0)).mul(10**_DECIMALS).round().long().tolist()  # [N]
    return sorted(range(len(near)), key=lambda place: (-near[place], place))


def _default() -> Encoder:
    from molora.personalize.embeddings import SentenceEncoder

    return SentenceEncoder()


def _shown(title: str, one: Interaction, room: int) -> str:
    """An interaction within `room` characters; nothing where that is too few to tell anything."""
    frame = f"\n{title}. Asked: {{}} Answered: {{}}"
    free = room - len(frame.format("", ""))
    if free < 2 * len(_ELLIPSIS) + 20:
        return ""
    question, answer = " ".join(one.question.split()), " ".join(one.answer.split())
    # What a short question leaves goes to the answer, and the other way round.
    asked = _cut(question, max(free // 2, free - len(answer)))
    return frame.format(asked, _cut(answer, free - len(asked)))


def _cut(text: str, length: int) -> str:
    """The text, or as many whole words of it as `length` characters hold."""
    if len(text) <= length:
        return text
    kept = text[: length - len(_ELLIPSIS)]
    return (kept.rsplit(" ", 1)[0] if " " in kept else kept) + _ELLIPSIS
