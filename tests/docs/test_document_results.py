"""The sections about documents, people and the choice of a router say what the measured files say."""

from typing import Any

from tools import render_choice, render_conversations, render_documents, render_people

ABOUT = {"machine": "A GPU", "commit": "abc", "date": "2026-01-01", "seed": 0, "data": "some"}


def test_needles_and_questions_are_what_was_measured() -> None:
    row = {"contender": "base", "f1": 0.25, "f1_interval": [0.2, 0.3], "rouge_l": 0.5, "rouge_l_interval": [0.4, 0.6]}
    report: dict[str, Any] = {
        **ABOUT,
        "command": "molora eval documents net",
        "parameters": 9_510_000,
        "network": {"rank": 4, "chunk": 128},
        "cost": {"tokens": 2000.0, "seconds": 0.0522, "bytes": 20_300_000.0, "bytes at rank 4": 1_020_000.0},
        "needles": [{"tokens": 1024, "rank": 72, "recall": 0.9375, "recall at rank 4": 0.5}],
        "rows": [
            {"kind": "words", **row},
            {"kind": "yes or no", **row, "f1": 0.125},
            {"kind": "facts of other kinds", **row, "f1": 0.75},
        ],
        "must": [{"name": "recall", "value": 0.5, "bar": 0.95, "better": "higher", "holds": False, "note": ""}],
    }
    text = "\n".join(render_documents.section(report))
    assert "| 1,024 tokens | 72 | 93.8% | 50.0% |" in text
    tables = text.split("questions about passages")[1:]
    assert tables[0].startswith(", answered in words |") and tables[1].startswith(", answered by yes or no |")
    assert "| base | 25.0% [20.0%, 30.0%] | 50.0% [40.0%, 60.0%] |" in tables[0] and "25.0%" not in tables[1]
    assert "| base | 12.5% [20.0%, 30.0%] |" in tables[1] and "| questions for facts of other kinds | F1" in tables[1]
    assert text.startswith("## What does an adapter")
    assert "| recall | 0.500 | ≥ 0.95 | **missed** |" in text
    assert "9.5 million" in text and "52 ms" in text and "20.3 MB" in text and "rank 4 1.0 MB" in text


def test_people_and_what_their_adapters_cost_are_what_was_measured() -> None:
    def row(name: str, loss: float, **metrics: float) -> dict[str, Any]:
        figures = {"loss": loss, **metrics}
        return {"contender": name, **figures, **{f"{k}_interval": [v - 0.1, v + 0.1] for k, v in figures.items()}}

    report = {
        **ABOUT,
        "command": "molora eval people",
        "people": 141,
        "rows": [row("base", 7.1314, accuracy=0.25, mae=3.0), row("search", 3.0, accuracy=0.5, mae=1.0)],
        "unrelated": {"base": 1.8183},
        "cost": {
            "own": {"seconds": 0.535, "adapter_bytes": 1.88e6},
            "pieces": {"seconds": 0.2, "adapter_bytes": 5e6, "kept_bytes": 1584.0},
        },
        "must": [{"name": "kept", "value": 1584.0, "bar": 2048, "better": "lower", "holds": True, "note": ""}],
    }
    text = "\n".join(render_people.section(report))
    assert text.startswith("## What does an adapter of one's own bring? 141 raters of films\n")
    assert "| | nats | right | away from right | unrelated |" in text and "on one A GPU, commit abc" in text
    assert "| base | 7.131 [7.031, 7.231] | 0.250 [0.150, 0.350] | 3.000 [2.900, 3.100] | 1.818 |" in text
    assert "| search | 3.000 [2.900, 3.100] | 0.500 [0.400, 0.600] | 1.000 [0.900, 1.100] | |" in text
    assert "| own | 0.535 | 1.9 | |" in text and "| pieces | 0.200 | 5.0 | 1,584 |" in text
    said = render_people.section({**report, "people": 11, "rows": [row("base", 3.0, rouge_1=0.2, rouge_l=0.1)]})
    assert said[0].endswith("11 presidents") and "| | nats | ROUGE-1 | ROUGE-L | unrelated |" in said


def test_a_router_is_shown_with_what_it_keeps_and_what_it_loses() -> None:
    def row(name: str, kind: str, closed: float, math: float, law: float) -> dict[str, Any]:
        return {
            "contender": name,
            "kind": kind,
            "sets": {"turns": {"gap_closed": closed}},
            "single": {"math": math, "law": law},
        }

    rows = [
        row("base", "base", 0.0, 3.0, 4.0),
        row("label oracle", "oracle", 1.0, 1.0, 2.0),
        row("math alone", "adapter", 0.4, 1.0, 3.9),
        row("MoLoRA one", "router", 0.95, 1.02, 2.1),  # of gains of 2.0 it keeps 99% and 95%
    ]
    lines = render_choice.section({**ABOUT, "command": "molora eval quality", "rows": rows})
    assert lines[-2] == "| MoLoRA one | 95.0% | 97.0% | law, 0.100 |"
    assert [line for line in lines if line.startswith("| MoLoRA") or "alone" in line] == [lines[-2]]


def test_conversations_have_closed_and_open_questions_apart() -> None:
    row = {"accuracy": 0.721, "accuracy_interval": [0.7, 0.75], "positives": 0.998, "negatives": 0.444}
    row |= {"open_positives": 0.122, "open_negatives": 0.226}
    report = {
        **ABOUT,
        "command": "molora eval conversations",
        "seconds": 3.97,
        "rows": [
            {"contender": "adapter", **row, "negatives_unseen": 0.024},
            {"contender": "search", **row, "negatives_unseen": None},
        ],
        "must": [{"name": "right", "value": 0.5, "bar": 0.8, "better": "higher", "holds": False, "note": ""}],
    }
    text = "\n".join(render_conversations.section(report))
    assert "| adapter | 72.1% [70.0%, 75.0%] | 99.8% | 44.4% | 2.4% | 0.122 | 22.6% |" in text
    assert "| search | 72.1% [70.0%, 75.0%] | 99.8% | 44.4% | | 0.122 | 22.6% |" in text
    assert "4.0 s each" in text and "| right | 0.500 | ≥ 0.8 | **missed** |" in text
