"""The section about a larger model says what the measured file says."""

from tools.render_headline import section


def test_a_row_says_what_was_measured() -> None:
    accuracy = {"base": 0.25, "MoLoRA": 0.5, "large, our prompts": 0.375, "large, its own template": 0.125}
    row = {"benchmark": "piqa", "questions": 1234, "accuracy": accuracy, "against": "large, our prompts",
           "difference": 0.125, "difference_interval": [-0.01, 0.25]}  # fmt: skip
    line = {"name": "ahead", "value": 1.0, "bar": 4, "better": "higher", "holds": False, "note": ""}
    about = {"command": "molora eval headline", "machine": "A GPU", "commit": "abc", "date": "2026-01-01", "seed": 0}
    report = {
        **about,
        "data": "some",
        "parameters": dict.fromkeys(accuracy, 134_500_000),
        "rows": [row],
        "must": [line],
    }
    text = "\n".join(section(report))
    assert "| piqa | 1,234 | 25.0% | 50.0% | 37.5% | 12.5% | +12.5% [-1.0%, +25.0%] |" in text
    assert "| ahead | 1.000 | ≥ 4 | **missed** |" in text and "base 134 million" in text
