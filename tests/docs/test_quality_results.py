"""The sections about routing by token say what the measured files say."""

from pathlib import Path
from typing import Any

from tools.pictures import pyplot
from tools.render_quality import PICTURES, draw, section

SETS = ("turns", "documents")


def row(name: str, kind: str, loss: float, right: dict[str, float] | None = None) -> dict[str, Any]:
    closed = 2 - loss
    cell = {"loss": loss, "gap_closed": closed, "gap_closed_interval": [closed - 0.01, closed + 0.01],
            "accuracy": 0.25}  # fmt: skip
    return {"contender": name, "kind": kind, "sets": dict.fromkeys(SETS, cell), "single": {"math": loss, "code": loss},
            "right": right or {}}  # fmt: skip


def report() -> dict[str, Any]:
    rows = [
        row("base", "base", 2.0), row("label oracle", "oracle", 1.0), row("math alone", "adapter", 1.0),
        row("code alone", "adapter", 1.0), row("uniform merge", "merge", 1.5),
        row("MoLoRA saved, top-1 unit", "router", 1.025, {"answer 17+": 0.97}),
        row("MoLoRA saved, held by 2 nats", "router", 1.02, {"answer 17+": 0.98}),
        row("MoLoRA saved, top-2 softmax", "router", 1.02, {"answer 17+": 0.99}),
    ]  # fmt: skip
    line = {"name": "turns: closed", "value": 0.975, "bar": 0.965, "better": "higher", "holds": True, "note": ""}
    about = {"command": "molora eval quality", "machine": "A GPU", "commit": "abc", "date": "2026-01-01", "seed": 0}
    return {**about, "data": "some", "missing": ["X-LoRA"], "rows": rows, "must": [line]}


def test_a_table_says_what_was_measured() -> None:
    text = "\n".join(section(report(), None))
    assert "| **MoLoRA saved, top-1 unit** | 97.5% [96.5%, 98.5%] | 97.5% [96.5%, 98.5%] | 97.5% | 25.0% |" in text
    assert "| uniform merge | 50.0% [49.0%, 51.0%] | 50.0% [49.0%, 51.0%] | 50.0% | 25.0% |" in text
    assert "\nNot measured: X-LoRA.\n" in text
    assert "| math | 2.000 | 1.000 | 1.025 | +0.0250 |" in text
    assert "| turns: closed | 0.975 | ≥ 0.965 | reached |" in text
    assert "| MoLoRA saved, top-1 unit | 97.0% |" in text
    assert "| MoLoRA saved, held by 2 nats | 98.0% |" in text and "top-2 softmax | 99.0% |" not in text


def test_other_seeds_stand_beside() -> None:
    other = {**report(), "command": "molora eval quality again"}
    other["must"] = [
        {**report()["must"][0], "value": 0.9, "holds": False},
        {**report()["must"][0], "name": "of one alone"},
    ]
    text = "\n".join(section(report(), None, [other, report()]))
    assert "| turns: closed | ≥ 0.965 | **0.975** | 0.900 | **0.975** |" in text
    assert "| | bar | seed 0 | seed 1 | seed 2 |" in text and "of one alone" not in text
    assert "`molora eval quality again` (commit abc)" in text
    assert "other seeds" not in "\n".join(section(report(), None))


def test_the_integration_stands_beside() -> None:
    line = {**report()["must"][0], "value": 0.95, "holds": False}
    whole = {**report(), "integrated": [line]}
    whole["rows"].append(row("MoLoRA saved, integrated, top-1 unit", "integrated", 1.05, {"answer 17+": 0.96}))
    text = "\n".join(section(whole, None))
    assert "| | bar | seed 0 | seed 0, integrated |" in text
    assert "| turns: closed | ≥ 0.965 | **0.975** | 0.950 |" in text
    assert "| **MoLoRA saved, top-1 unit** | 97.5%" in text and "| MoLoRA saved, integrated, top-1 unit | 95.0%" in text


def test_later_adapters_are_told() -> None:
    about = {key: value for key, value in report().items() if key not in ("rows", "must")}
    rows = [
        {
            "contender": name,
            "right": {"math": 0.9, "law": right},
            "mixed": {"all": 1.5, "old": 1.25},
            "mixed_right": {"all": 0.91},
        }
        for name, right in (("trained on all", 0.95), ("before", 0.0), ("128 examples", 0.925))
    ]
    text = "\n".join(section(report(), {**about, "new": ["law"], "rows": rows, "must": []}))
    assert "| 128 examples | 92.5% | 90.0% | 91.0% | 1.2500 | 1.5000 |" in text
    assert "trained without law;" in text


def test_pictures_are_drawn_and_the_same_again(tmp_path: Path) -> None:
    draw(report(), tmp_path / "a")
    draw(report(), tmp_path / "b")
    for name in PICTURES:
        found = (tmp_path / "a" / name).read_bytes()
        assert b"<svg" in found and found == (tmp_path / "b" / name).read_bytes()
    assert not pyplot().get_fignums()
