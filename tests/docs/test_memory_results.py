"""The section about a router's memory says what the measured file says."""

from tools.render_memory import section


def test_a_row_holds_every_seed() -> None:
    rows = [
        {"memory": name, "seed": seed, "right": {"turns": 0.5 + 0.125 * seed}, "validation": {"turns": 0.75 * seed},
         "parameters": 123456, "state": 640}
        for name in ("none", "GRU") for seed in (0, 1)
    ]  # fmt: skip
    about = {"command": "python -m benchmarks.router_memory", "machine": "CPU", "commit": "abc", "date": "2026-01-01"}
    text = "\n".join(section({**about, "seeds": [0, 1], "data": "some", "rows": rows}))
    assert "| GRU | 37.5% | 50.0%, 62.5% | 123,456 | 640 |" in text and "seeds 0, 1." in text
