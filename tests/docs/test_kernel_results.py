"""From what the GPU benchmarks leave in a folder to the section of the results page, with made-up figures."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks import plots
from benchmarks.results import gather, keep
from tools.render_kernels import section
from tools.render_results import main

ROOT = Path(__file__).parents[2]
GPU = "Made-up GPU"


def decode_row(count: int, batch: int, top: int, added: float) -> dict[str, Any]:
    what = {"shape": "1.7B", "batch": batch, "adapters": count, "top": top, "rank": 16}
    return {**what, "routed_ms": 2.5 + added, "added_ms": added, "route_us": 10.0}


def prefill_row(count: int, top: int, popularity: str, added: float) -> dict[str, Any]:
    what = {"shape": "1.7B", "tokens": 2048, "adapters": count, "rank": 16, "top": top, "popularity": popularity}
    times = {"base_ms": 22.0, "our_base_ms": 20.0, "ms": 20 + added, "added_ms": added, "limit_ms": 1.0}
    modules = {"modules_ms": 22 + 2 * added, "modules_added_ms": 2 * added, "modules_over": added / 11}
    return {**what, **times, **modules, "over": (20 + added) / 22 - 1, "added_over": added / 22}


ROWS: dict[str, list[dict[str, Any]]] = {
    "step": [
        {"shape": "1.7B", "batch": 1, "limit_ms": 1.2, "base_ms": 2.5},
        decode_row(8, 1, 1, 0.4),
        decode_row(8, 1, 2, 0.6),
        decode_row(64, 1, 1, 0.5),
        {**decode_row(8, 8, 1, 9.0), "rank": 64},  # no bar is for it
    ],
    "prefill": [
        {"shape": "1.7B", "tokens": 2048, "base_ms": 22.0, "our_base_ms": 20.0, "route_us": 44.0},
        prefill_row(2, 1, "uniform", 2.0),
        prefill_row(8, 1, "uniform", 2.1),
        prefill_row(8, 1, "zipf", 2.2),
        prefill_row(64, 1, "uniform", 3.0),
        prefill_row(1024, 1, "uniform", 1.7),
    ],
    "train": [
        {"shape": "1.7B", "sequences": 8, "tokens": 512, "rank": 16, "adapters": 8, "base_ms": 100.0,
         "routed_ms": 130.0, "ratio": 1.3, "base_peak_gib": 10.0, "routed_peak_gib": None}
    ],
    "peers": [
        {"shape": "1.7B", "batch": 1, "context": 512, "rank": 16, "adapters": 4, "ours_step_ms": 3.0,
         "ours_generate_ms": 4.0, "base_step_ms": 30.0, "peft_step_ms": 70.0, "peft_generate_ms": 75.0,
         "xlora_ms": 270.0, "xlora_over_ours": 90.0, "xlora_over_ours_generate": 67.5}
    ],
    "smollm": [
        {"batch": 1, "base_tokens_per_s": 50.0, "routed_tokens_per_s": 400.0, "routed_over_base": 8.0,
         "answers_equal": 8, "answers": 8}
    ],
}  # fmt: skip
CSV = (
    "shape,adapters,tokens,top,rank,popularity,order,base,limit,ours,dense,device\n"
    f"1.7B,8,1,1,16,uniform,5.5,48.0,0.5,14.0,51.0,{GPU}\n"
    f"1.7B,8,64,1,16,uniform,5.5,53.0,5.6,16.0,nan,{GPU}\n"
)


def write(folder: Path, *names: str, device: str = GPU) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps({"device": device, "seed": 0, "rows": ROWS[name]}))
    return folder


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    folder = write(tmp_path / "gpu", *ROWS)
    (folder / "kernels.csv").write_text(CSV)
    return folder


def test_each_bar_has_its_value(everything: Path) -> None:
    must = {line["name"]: line for line in gather(everything)["must"]}
    expected = {
        "decode step, added by 8 adapters, batch 1, ms": (0.4, 0.40, True),
        "decode step, added by 64 adapters, batch 1, ms": (0.5, 0.75, True),
        "whole routed step, batch 1, ms": (2.9, 3.0, True),
        "router, memory and plan, batch 1, us": (10.0, 12.0, True),
        "top-2 against top-1, decode, 8 adapters, batch 1": (1.5, 1.25, False),
        "prefill of 2,048, added over base, 8 adapters": (2.1 / 22, 0.11, True),
        "prefill of 2,048, added over base, 64 adapters": (3 / 22, 0.17, True),
        "prefill of 2,048 over 1,024 adapters, of its own limit": (1.7, 1.6, False),
        "added time against K from 2 to 64, 2,048 tokens": (1.5, 1.4, False),
        "skew, prefill: uniform, zipf; 8 adapters": (2.2 / 2.1, 1.25, True),
        "router, memory and plan, prompt of 2,048, us": (44.0, 45.0, True),
        "training step of the router over the base's forward and backward": (1.3, 1.35, True),
        "X-LoRA's token over our step, 4 adapters, batch 1": (90.0, 100.0, False),
    }
    assert set(must) == set(expected)
    for name, (value, bar, holds) in expected.items():
        line = must[name]
        assert (line["value"], line["bar"], line["holds"]) == (pytest.approx(value), bar, holds), name
    assert must["X-LoRA's token over our step, 4 adapters, batch 1"]["better"] == "higher"
    note = must["prefill of 2,048, added over base, 8 adapters"]["note"]
    assert "by our own kernels 10.5%" in note and "takes 100% of" in note


def test_runs_of_other_sizes_are_put_together(everything: Path) -> None:
    more = [{"shape": "1.7B", "batch": 1, "base_ms": 2.6}, {"shape": "8B", "batch": 1, "base_ms": 9.0}]
    (everything / "step-8b.json").write_text(json.dumps({"device": GPU, "seed": 0, "rows": more}))
    rows = [row for row in gather(everything)["rows"] if row["what"] == "decode" and "adapters" not in row]
    assert [(row["shape"], row["base_ms"]) for row in rows] == [("1.7B", 2.6), ("8B", 9.0)]


def test_what_was_not_measured_again_stays_with_its_commit(everything: Path, tmp_path: Path) -> None:
    before = {**gather(everything), "commit": "0ld"}
    after = keep(gather(write(tmp_path / "new", "step")), before)
    assert {row["what"] for row in after["rows"] if row.get("commit") == "0ld"} == {
        "prefill", "train", "peers", "smollm", "layer",
    }  # fmt: skip
    assert len(after["rows"]) == len(before["rows"]) and len(after["must"]) == len(before["must"])
    notes = {line["name"]: line["note"] for line in after["must"]}
    assert notes["training step of the router over the base's forward and backward"] == "commit 0ld"
    assert notes["whole routed step, batch 1, ms"] == ""
    text = "\n".join(section(after))
    assert "asterisk are of an earlier commit (0ld)" in text and "| 1.7B* | 2048 |" in text
    assert "forward and backward, commit 0ld" in text
    again = keep(gather(write(tmp_path / "more", "train")), after)
    assert {row["what"] for row in again["rows"] if row.get("commit") == "0ld"} == {
        "prefill",
        "peers",
        "smollm",
        "layer",
    }
    with pytest.raises(ValueError, match="one machine"):
        keep(after, {**before, "machine": "Another GPU"})


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    report = gather(write(tmp_path / "gpu", "train"))
    assert {row["what"] for row in report["rows"]} == {"train"}
    assert len(report["must"]) == 1
    text = "\n".join(section(report))
    assert "### A whole decode step" not in text and "images/" not in text


def test_figures_of_two_machines_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "step")
    write(tmp_path, "train", device="Another GPU")
    with pytest.raises(ValueError, match="one machine"):
        gather(tmp_path)
    with pytest.raises(ValueError, match="holds none"):
        gather(tmp_path / "nothing")


def test_the_page_shows_bars_rows_and_pictures(everything: Path, tmp_path: Path) -> None:
    docs = tmp_path / "copy" / "docs"
    shutil.copytree(ROOT / "docs", docs)
    shutil.copy(ROOT / "README.md", docs.parent)
    report = json.dumps(gather(everything), allow_nan=False)  # what was not run is null
    (docs / "results" / "kernels.json").write_text(report)
    main(docs)
    text = (docs / "results.md").read_text(encoding="utf-8")
    for line in (
        "| whole routed step, batch 1, ms | 2.900 | ≤ 3.0 | reached |",
        "| X-LoRA's token over our step, 4 adapters, batch 1 (X-LoRA takes 270 ms; over a token of our generate: 68) "
        "| 90.000 | ≥ 100.0 | **missed** |",
        "| 1.7B | 1 | 1.200 | 2.500 | |",
        "| 1.7B | 8 | 16 | 2 | 1 | 3.100 | 0.600 | 10.0 |",
        "| 1.7B | 2048 | 22.000 | 20.000 | 44.0 |",
        "| 1.7B | 2048 | 8 | 16 | 1 | zipf | 22.200 | 2.200 | 26.400 | 4.400 | 1.000 | 0.9% |",
        "| 1.7B | 8 | 16 | 64 | 1 | uniform | 53.0 | 5.6 | 16.0 | |",
        "| 8 | 8 x 512 | 100.000 | 130.000 | 1.300 | 10.000 | |",
        "| PEFT X-LoRA, `generate` | 270.000 |",
        "| 1 | 50 | 400 | 8.00 |",
    ):
        assert f"\n{line}\n" in text, line
    assert text.index("## On a GPU") < text.index("## What the figures do not say")
    pictures = ("kernels-layer.svg", "kernels-decode.svg")
    before = {}
    for name in pictures:
        assert f"(images/{name})" in text
        before[name] = (docs / "images" / name).read_bytes()
        assert before[name].startswith(b"<?xml")
    main(docs)
    assert {name: (docs / "images" / name).read_bytes() for name in pictures} == before
    assert (docs / "results.md").read_text(encoding="utf-8") == text


def test_a_picture_is_of_the_shape_that_was_measured_most() -> None:
    other = {**decode_row(8, 1, 1, 0.1), "shape": "8B"}
    rows = [{"what": "decode", **row} for row in (other, decode_row(8, 1, 1, 0.4), decode_row(64, 1, 1, 0.5))]
    assert plots.pictures(rows) == {plots.DECODE: rows[1:]}
