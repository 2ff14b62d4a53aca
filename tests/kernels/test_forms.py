"""Which form is taken, from what was measured."""

import pytest

from molora_kernels import forms, tiles


@pytest.mark.parametrize(
    ("measured", "most"),
    [
        ({8: (1.0, 2.0), 16: (1.0, 2.0), 32: (2.0, 1.0)}, 16),
        ({32: (2.0, 1.0), 8: (1.0, 2.0)}, 8),  # in any order
        ({8: (1.0, 2.0), 16: (2.0, 1.0), 32: (1.0, 2.0)}, 8),  # a limit, beyond which no later win counts
        ({8: (1.0, 2.0), 16: (0.99, 1.0)}, 8),  # as much as two runs differ
        ({8: (2.0, 1.0)}, 0),
    ],
)
def test_a_form_is_taken_up_to_where_it_stops_winning(
    measured: dict[int, tuple[float, float]], most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    entries = [{"form": "one", "size": s, "us": us, "other_us": other} for s, (us, other) in measured.items()]
    entries.append({"form": "another", "size": 1 << 20, "us": 1.0, "other_us": 9.0})
    monkeypatch.setattr(tiles, "_table", lambda: {"forms": entries})
    assert tiles.fastest_up_to("one") == most


def test_the_table_has_every_form() -> None:
    for name in ("by_token", "together", "hot_trained"):
        sizes = [entry["size"] for entry in tiles._table()["forms"] if entry["form"] == name]
        assert len(sizes) >= 4 and tiles.fastest_up_to(name) in sizes
    assert forms.by_token(forms.BY_TOKEN) and not forms.by_token(forms.BY_TOKEN + 1)
    assert forms.together(forms.TOGETHER) and not forms.together(forms.TOGETHER + 1)
    assert forms.hot_trained(forms.HOT_TRAINED) and not forms.hot_trained(forms.HOT_TRAINED + 1)
