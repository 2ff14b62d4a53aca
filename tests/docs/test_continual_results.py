"""The sections about updates say what their reports say."""

from pathlib import Path

from tools.render_continual import ARRIVALS, PICTURE, arrivals, draw, draw_arrivals, section, stream

HEAD = {"command": "molora eval", "machine": "A", "commit": "c", "date": "d", "data": "two tasks"}
LINE = {"name": "forgetting", "value": 1.0, "bar": 2.0, "better": "lower", "holds": True, "note": ""}


def test_a_sequence_of_tasks(tmp_path: Path) -> None:
    row = {
        "method": "replay", "keeps_text": True, "average": 60.0, "average_range": [59.0, 61.0], "forgetting": 1.0,
        "forgetting_range": [0.5, 1.5], "backward": -1.0, "forward": 2.0, "update_seconds": 12.4, "text_bytes": 1234.0,
        "peak_bytes": 3 * 2**29, "state_bytes": 0.0, "rank": 16, "curve": [50.0, 60.0],
    }  # fmt: skip
    report = {**HEAD, "rows": [{"method": "joint training", "average": 64.0}, row], "must": [LINE]}
    text = "\n".join(section(report))
    shown = "| replay | 60.00 [59.00, 61.00] | 93.8% | 1.00 [0.50, 1.50] | -1.00 | +2.00 | 12 | 1.5 | 1,234 | 0 | 16 |"
    assert (
        shown in text
        and "| joint training | 64.00 | 100.0% |" in text
        and "| forgetting | 1.000 | ≤ 2.0 | reached |" in text
    )
    draw(report, tmp_path)
    assert "<svg" in (tmp_path / PICTURE).read_text()


def test_arrivals(tmp_path: Path) -> None:
    points = [{"first": 0.9, "came": 0.0, "mixed": 0.8}, {"first": 0.7, "came": 0.6, "mixed": 0.5}]
    row = {"way": "sketches", "points": points, "update_seconds": 4.4, "text_bytes": 0, "sample_bytes": 1234.0}
    report = {**HEAD, "rows": [row]}
    assert "| sketches | 70.0% | 60.0% | 50.0% | 4 | 0 | 1,234 |" in "\n".join(arrivals(report))
    draw_arrivals(report, tmp_path)
    assert "<svg" in (tmp_path / ARRIVALS).read_text()


def test_users() -> None:
    row = {
        "user": "ada", "promoted": 9, "learnt": -0.04, "drift": 0.012, "general": -0.003, "update_seconds": 8.0,
        "text_bytes": 54321, "why_not": ["nothing was learnt"],
    }  # fmt: skip
    report = {**HEAD, "settings": {"updates": 10}, "rows": [row, {**row, "drift": None}], "must": [LINE]}
    text = "\n".join(stream(report))
    assert "| ada | 9 | -4.0% | +1.2% | -0.3% | 8 | 54,321 |" in text and "of 10" in text
    assert "| ada | 9 | -4.0% |  | -0.3% | 8 | 54,321 |" in text
