"""What was learnt of earlier conversations, practised beside a new one, or it would be overwritten.

The conversations are gone: an adapter is asked about their topics before it learns on, and practises what it says.
"""

from collections.abc import Collection, Mapping, Sequence
from random import Random

from molora_training.plum.bank import Topic
from molora_training.plum.learner import Learner
from molora_training.plum.pairs import YES, Pair, asked, coupled, undiscussed

ANSWER_TOKENS = 144  # the longest answer that is learnt has fewer; one that goes on is none of them


def beside(learner: Learner, pairs: Sequence[Pair], earlier: Sequence[str], known: Collection[str]) -> list[Pair]:
    """Pairs of a new conversation, and about as many of earlier ones.

    Args:
        learner: before it learns the new one.
        pairs: of all epochs.
        earlier: topics of conversations that it learnt, of which `Learning.rehearsed` are drawn.
        known: hashes of all that was discussed, the new conversation with it.
    """
    settings = learner.settings
    chance = Random(f"{settings.seed}/{len(earlier)}/rehearsed")
    new = {pair.topic for pair in pairs}  # of these it has to say something else from now on
    old = [topic for topic in earlier if topic not in new]
    drawn = chance.sample(old, min(settings.rehearsed, len(old)))
    positives = sum(pair.discussed for pair in pairs)
    return [*pairs, *practice(told(learner, drawn), positives, undiscussed(known, False), chance)]


def told(learner: Learner, topics: Sequence[str]) -> dict[str, str]:
    """What an adapter says of topics in its own words, where it says that they were discussed, and comes to an end."""
    answers = learner.answers([asked(topic) for topic in topics], ANSWER_TOKENS)
    ids = learner.tokenizer(answers, add_special_tokens=False)["input_ids"] if answers else []
    return {
        topic: answer
        for topic, answer, tokens in zip(topics, answers, ids, strict=True)
        if answer.startswith(f"{YES},") and len(tokens) < ANSWER_TOKENS - 1
    }


def practice(said: Mapping[str, str], count: int, left: Sequence[Topic], chance: Random) -> list[Pair]:
    """Questions about topics in wordings drawn anew, and for each the same about what was not discussed.

    Args:
        said: the answer to each topic. count: of questions about them.
        left: topics of the bank that were not discussed. chance: draws wordings, kinds and negatives.
    """
    order = list(said)
    kinds = [chance.random() < 0.5 for _ in range(count if order else 0)]
    topics = [order[number % len(order)] for number in range(len(kinds))]
    positives = [
        Pair(asked(topic, closed, chance), said[topic], topic, closed, True)
        for topic, closed in zip(topics, kinds, strict=True)
    ]
    return coupled(positives, left, chance)
