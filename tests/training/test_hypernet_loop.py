"""The loop of the hypernetworks' trainings: which parameters it leaves."""

from pathlib import Path

import pytest
import torch

from molora_training.hypernet import loop as loop_module
from molora_training.hypernet.loop import Loop, LoopSettings
from molora_training.processes import Processes


def make(folder: Path, seen: list[float]) -> tuple[Loop, torch.nn.Parameter]:
    """Walks down a slope for ever, past the place that validates best."""
    place = torch.nn.Parameter(torch.tensor([3.0]))

    def validate() -> dict[str, float]:
        seen.append(float(place.detach()))
        return {"away": abs(seen[-1] - 1.0), "lowest": seen[-1]}

    settings = LoopSettings(steps=12, learning_rate=0.5, weight_decay=0.0, warmup=0.0, checkpoint_every=2)
    loop = Loop(
        lambda step: {"loss": place.sum()},
        {"place": place},
        validate,
        "away",
        folder,
        settings,
        "x",
        "walk",
        Processes(),
    )
    return loop, place


def test_what_validated_best_is_left(tmp_path: Path) -> None:
    seen: list[float] = []
    loop, place = make(tmp_path, seen)
    found = loop.run()
    best = min(seen, key=lambda one: abs(one - 1.0))
    assert best not in (seen[0], seen[-1]) and float(place.detach()) == best
    assert found["best"] == [2 * (seen.index(best) + 1), {"away": abs(best - 1.0), "lowest": best}]
    assert [step for step, _ in found["validation"]] == [2, 4, 6, 8, 10, 12]
    loop.done()
    assert not list(tmp_path.glob("*.safetensors"))


def test_no_process_takes_away_what_another_has_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    read, wait = loop_module.load_file, Processes.wait
    monkeypatch.setattr(loop_module, "load_file", lambda file: done.append("read") or read(file))
    monkeypatch.setattr(Processes, "wait", lambda own: done.append("wait") or wait(own))
    loop, _ = make(tmp_path, [])
    loop.run()
    assert done[-2:] == ["read", "wait"] and loop.best_file.is_file()


def test_it_is_left_also_where_the_training_went_on_later(tmp_path: Path) -> None:
    whole: list[float] = []
    found = make(tmp_path / "whole", whole)[0].run()
    seen: list[float] = []
    loop, _ = make(tmp_path / "parts", seen)

    def stop(step: int, loss: float) -> None:
        if step == found["best"][0] + 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        loop.run(on_step=stop)
    loop, place = make(tmp_path / "parts", seen)
    assert loop.run() == found and float(place.detach()) == found["best"][1]["lowest"]
