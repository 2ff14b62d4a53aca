"""The pages say what the measured files say."""

import json
import re
import shutil
from pathlib import Path

from tools.render_results import LATER, main, page, read_report, readme_table

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "results"


def read(name: str) -> dict:
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def test_the_results_page_is_rendered_from_the_files() -> None:
    later = {name: read_report(name) for name in LATER}
    expected = page(read("main.json"), read("decode.json"), read_report("kernels"), later)
    assert (ROOT / "docs" / "results.md").read_text(encoding="utf-8") == expected


def test_the_readme_table_is_rendered_from_the_files() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme_table(read("main.json"), read("decode.json")) in text


def test_rendering_again_changes_nothing(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docs", tmp_path / "docs")  # other tests read the pages meanwhile
    shutil.copy(ROOT / "README.md", tmp_path)
    files = [*(tmp_path / "docs" / "images").glob("*.svg"), tmp_path / "docs" / "results.md", tmp_path / "README.md"]
    before = {file: file.read_bytes() for file in files}
    assert len(files) > 5
    for file in files[:-1]:
        file.write_text("old", encoding="utf-8")
    main(tmp_path / "docs")
    drawn = {file for file in files if file.read_bytes() != b"old"}
    assert {file: file.read_bytes() for file in drawn} == {file: before[file] for file in drawn}
    assert tmp_path / "docs" / "results.md" in drawn and len(drawn) > 5


def test_links_and_pictures_exist() -> None:
    for page_file in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page_file.read_text(encoding="utf-8")):
            assert (page_file.parent / target).exists(), f"{page_file.name}: {target}"


def test_the_starter_stack_is_small_and_safe() -> None:
    files = [path for path in (ROOT / "starter").rglob("*") if path.is_file()]
    networks = [path for path in files if "hypernets" in path.parts]
    stack = sum(path.stat().st_size for path in files if path not in networks)
    assert 0 < stack < 16 * 2**20 and 0 < sum(path.stat().st_size for path in networks) < 32 * 2**20
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".md"}
