"""What a sequence of tasks has taught and cost, as the field defines it.

R[i, j] is the score on task j after task i was learnt, b[j] that before any was; higher is better. Average, backward
and forward transfer after arXiv 1706.08840 (equations 2 to 4), forgetting after arXiv 1801.10112.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from molora.errors import DataError


@dataclass(frozen=True)
class Measures:
    """All in the scores' unit.

    average: mean over tasks of the last row: what is known in the end.
    backward: mean over all tasks but the last of what later tasks changed; below 0 is lost.
    forgetting: mean over all tasks but the last of the best score it ever had, before the end, less that of the end.
    forward: mean over all tasks but the first of what earlier ones brought before it was learnt.
    """

    average: float
    backward: float
    forgetting: float
    forward: float


def measures(after: Sequence[Sequence[float]], before: Sequence[float]) -> Measures:
    """Measures of one sequence.

    Args:
        after: R, [T, T], T from 2.
        before: b, [T].

    Raises:
        DataError: other shapes.
    """
    tasks = len(before)
    if tasks < 2 or len(after) != tasks or any(len(row) != tasks for row in after):
        shape = f"{len(after)} rows of {sorted({len(row) for row in after})} scores"
        raise DataError(f"{tasks} tasks, two or more, need as many rows of as many scores; here are {shape}.")
    last = after[-1]
    earlier, later = range(tasks - 1), range(1, tasks)
    return Measures(
        average=_mean(last),
        backward=_mean([last[j] - after[j][j] for j in earlier]),
        forgetting=_mean([max(after[i][j] for i in earlier) - last[j] for j in earlier]),
        forward=_mean([after[j - 1][j] - before[j] for j in later]),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
