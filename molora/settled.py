"""A process that answers people is spared the longest pauses of Python's garbage collector."""

import gc


def settle() -> None:
    """What is loaded by now stays: the collector looks at it once more, and then no more.

    The libraries' and the model's objects are so many that a whole collection stops everything for a quarter of a
    second. For a process that serves, once all is loaded; a library has no say in its caller's collector.
    """
    gc.collect()
    gc.freeze()
