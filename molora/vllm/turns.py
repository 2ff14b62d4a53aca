"""In which order a step's requests are routed."""

import numpy as np


def turns(before: np.ndarray, slots: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Of each request the turn in which it is routed, [n] from 0 on: after the one that reads the token before it.

    vLLM's prefix cache hands a block on as soon as its tokens are scheduled. So a request may go on from a token that
    another reads in the same step, of whatever place in the batch.

    Args:
        before: [n] int64, KV slot of the token before each request's, -1 where there is none.
        slots: [tokens] int64, KV slots of the step's tokens, no slot twice, request after request.
        starts: [n + 1], where each request's begin.
    """
    order = np.argsort(slots)
    place = np.minimum(np.searchsorted(slots, before, sorter=order), len(slots) - 1)
    token = order[place]
    waits = np.flatnonzero(slots[token] == before)
    found = np.zeros(len(before), dtype=np.int64)
    for_whom = np.searchsorted(starts, token[waits], side="right") - 1
    for _ in waits:  # as often as the longest chain is long
        later = found[for_whom] + 1
        if np.array_equal(found[waits], later):
            break
        found[waits] = later
    return found
