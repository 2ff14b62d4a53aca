"""A request is routed after the one that reads, in the same step, the token before it."""

import numpy as np
import pytest

from molora.vllm.turns import turns

SEQUENCES = {  # tokens of each request before the step, and in it
    "nobody waits": ([0, 5, 9], [3, 1, 2], {}),
    "one waits": ([0, 4, 7], [8, 3, 1], {1: 0}),
    "its place in the batch says nothing": ([4, 7, 0], [3, 1, 8], {0: 2}),
    "two wait for one": ([0, 4, 8], [9, 5, 1], {1: 0, 2: 0}),
    "a chain, backwards, beside one that has nothing to read": ([12, 8, 5, 4, 0], [3, 4, 0, 4, 4], {0: 1, 1: 3, 3: 4}),
}


@pytest.mark.parametrize("case", SEQUENCES)
def test_after_what_they_go_on_from(case: str) -> None:
    computed, lengths, after = SEQUENCES[case]
    own = [100 * request + np.arange(20) for request in np.random.default_rng(0).permutation(len(computed))]
    for request in sorted(after, key=lambda request: computed[request]):  # what it has of another lies there
        own[request][: computed[request]] = own[after[request]][: computed[request]]
    steps = zip(own, computed, lengths, strict=True)
    slots = np.concatenate([line[first : first + length] for line, first, length in steps])
    before = np.array([line[first - 1] if first else -1 for line, first in zip(own, computed, strict=True)])
    found = turns(before, slots, np.concatenate([[0], np.cumsum(lengths)]))
    assert found.tolist() == [depth(request, after) for request in range(len(computed))]


def depth(request: int, after: dict[int, int]) -> int:
    return 1 + depth(after[request], after) if request in after else 0
