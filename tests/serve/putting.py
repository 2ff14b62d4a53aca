"""What several processes do to one store: here, so that each imports no more than it needs."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from molora.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from molora.serve.store import AdapterStore

EACH = 20  # names that each process puts


def work(url: str, cache: Path, folders: list[Path], mine: str, start: Any, failures: Any) -> None:
    """What each process does: names of its own, and one that all put; every one is read back at once."""
    try:
        store = AdapterStore(url, cache=cache)
        start.wait(120)
        for number in range(EACH):
            folder = folders[number % len(folders)]
            store.put("user", f"{mine}{number}", folder)
            assert_same(store.get("user", f"{mine}{number}"), folder)
            store.put("user", "all", folder)
            Adapter.load(store.get("user", "all"))
    except BaseException as error:
        failures.put(f"{type(error).__name__}: {error}")
        raise


def assert_same(found: Path, expected: Path) -> None:
    """Two folders of the smallest adapter."""
    left, right = load_file(found / WEIGHTS_FILE), load_file(expected / WEIGHTS_FILE)
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    assert (found / CONFIG_FILE).read_bytes() == (expected / CONFIG_FILE).read_bytes()
    assert Adapter.load(found).ranks == [2]
