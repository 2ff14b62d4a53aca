"""The sections about merged and compressed adapters say what their reports say."""

from typing import Any

from tools.render_composition import compress, merges, pace, unrelated

HEAD: dict[str, Any] = {"command": "molora x", "machine": "A", "commit": "c", "date": "d", "seed": 0, "data": "text"}
LINE = {"name": "kept", "value": 0.9, "bar": 0.8, "better": "higher", "holds": True, "note": ""}


def test_merges_of_few_and_of_many_stand_side_by_side() -> None:
    def row(way: str, count: int, kept: float, **more: float | None) -> dict[str, Any]:
        return {"way": way, "adapters": count, "gain_kept": kept, "gain_kept_interval": [kept - 0.01, kept], **more}

    rows = [
        row("routed", 2, 0.99), row("knots", 2, 0.8, seconds=1.0, bytes=1e6, error=0.1),
        row("soup", 2, 0.9, seconds=1.0, bytes=1e6, error=None),
        row("routed", 4, 0.98), row("knots", 4, 0.7, seconds=3.21, bytes=2.4e6, error=0.25),
        row("soup", 4, 0.85, seconds=9.0, bytes=3e6, error=None),
    ]  # fmt: skip
    text = "\n".join(merges({**HEAD, "names": ["a", "b"], "rows": rows, "must": [LINE]}))
    assert "| way | 2 adapters, kept | 4 adapters, kept | error | s | MB |" in text
    assert "| routed | 99.0% [98.0%, 99.0%] | 98.0% [97.0%, 98.0%] | | | |" in text
    assert "| knots | 80.0% [79.0%, 80.0%] | 70.0% [69.0%, 70.0%] | 0.25 | 3.2 | 2 |" in text
    assert "| soup | 90.0% [89.0%, 90.0%] | 85.0% [84.0%, 85.0%] | | 9.0 | 3 |" in text
    assert "| kept | 0.900 | ≥ 0.8 | reached |" in text and "hort answers" not in text
    for one in rows:
        one["short_answers"] = None if one["way"] == "soup" else 0.25
    text = "\n".join(merges({**HEAD, "names": ["a", "b"], "rows": rows, "must": [LINE]}))
    assert "| knots | 80.0% [79.0%, 80.0%] | 70.0% [69.0%, 70.0%] | 25.0% | 0.25 | 3.2 | 2 |" in text
    assert "| soup | 90.0% [89.0%, 90.0%] | 85.0% [84.0%, 85.0%] | | | 9.0 | 3 |" in text


def test_what_is_lost_and_how_fast_it_runs() -> None:
    row = {"basis": 32, "share of the bytes": 0.05, "error, median": 0.2871, "error, worst": 0.3,
           "gain kept, mean": 1.0018, "gain kept, least": 0.999, "seconds": 1968.0}  # fmt: skip
    for section in (compress, unrelated):
        text = "\n".join(section({**HEAD, "threads": 2, "rows": [row], "must": [LINE]}))
        assert "| 32 | 5.0% | 0.287, 0.300 | 100.2% | 99.9% | 1,968 |" in text and "one A, 2 threads" in text
    paces = [
        {"kind": kind, "batch": batch, "tokens a second": number * batch, "bytes of adapters": 43e7}
        for kind, number in (("one ordinary adapter", 1000.4), ("9 compressed adapters", 900.0))
        for batch in (1, 8)
    ]
    text = "\n".join(pace({**HEAD, "rows": paces, "must": [LINE]}))
    assert "| one ordinary adapter | 1,000 | 8,003 | 430 |" in text and "| | batch 1 | batch 8 |" in text
