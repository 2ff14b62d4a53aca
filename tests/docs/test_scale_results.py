"""The section about more and more adapters says what the measured file says."""

from pathlib import Path
from typing import Any

from tools.pictures import pyplot
from tools.render_scale import PICTURE, draw, section


def row(adapters: int, closed: float) -> dict[str, Any]:
    part = {"base": 2.0, "oracle": 1.0, "router": 2 - closed, "gap_closed": closed,
            "gap_closed_interval": [closed - 0.01, closed + 0.01]}  # fmt: skip
    return {"adapters": adapters, "parameters": 1234567, "seconds": 41.6, "machine": "A GPU", "own": part,
            "shared": {**part, "gap_closed": 0.5}, "right": 0.75, "right_family": 0.875}  # fmt: skip


REPORT = {"command": "molora eval scale runs/many/routers", "machine": "A GPU", "commit": "abc", "date": "2026-01-01",
          "seed": 0, "data": "some", "fewest": ["a", "b"], "rows": [row(2, 0.95), row(128, 0.8)]}  # fmt: skip


def test_a_row_says_what_was_measured() -> None:
    text = "\n".join(section(REPORT))
    assert (
        "| 128 | 80.0% [79.0%, 81.0%] | 2.000, 1.000, 1.200 | 50.0% [79.0%, 81.0%] | 75.0% | 87.5% | 1,234,567, 42 "
        "(A GPU) |" in text
    )
    assert "gap closed on text of the 2 |" in text and f"images/{PICTURE}" in text


def test_the_picture_is_drawn_and_the_same_again(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        draw(REPORT, tmp_path / folder)
    found = (tmp_path / "a" / PICTURE).read_bytes()
    assert b"<svg" in found and found == (tmp_path / "b" / PICTURE).read_bytes()
    assert not pyplot().get_fignums()
