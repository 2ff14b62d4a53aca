"""What `make docs` needs: each page has its place, the reference names what is there, nothing comes from elsewhere."""

import importlib
import re
from pathlib import Path

from tools.check_site import foreign
from tools.docs_hooks import on_page_markdown

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"


def test_every_page_is_in_the_navigation_once() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:")[2]
    there = {str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md") if page.parts[-2] != "results"}
    assert sorted(re.findall(r"[\w/-]+\.md", navigation)) == sorted(there)


def test_the_reference_names_what_is_there() -> None:
    asked = 0
    for page in sorted((DOCS / "api").glob("*.md")):
        for name in re.findall(r"^::: (\S+)", page.read_text(encoding="utf-8"), re.M):
            module, _, last = name.rpartition(".")
            found = getattr(importlib.import_module(module), last, None) or importlib.import_module(name)
            assert found.__doc__, f"{page.name}: {name}"
            asked += 1
    assert asked


def test_what_comes_from_elsewhere_is_found(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(
        '<link rel="canonical" href="https://here.org/"><a href="https://there.org">x</a>'
    )
    assert foreign(tmp_path) == []
    (tmp_path / "bad.html").write_text('<script src="//cdn.org/a.js"></script><pre class="mermaid">a --> b</pre>')
    (tmp_path / "bad.css").write_text("@font-face { src: url(https://fonts.org/a.woff) }")
    assert foreign(tmp_path) == [
        "bad.html: <script> //cdn.org/a.js", "bad.css: https://fonts.org/a.woff", "bad.html: a diagram",
    ]  # fmt: skip


def test_a_link_out_of_the_pages_says_where_the_file_is() -> None:
    found = on_page_markdown("See [code](../molora/layer.py) and [there](routing.md#a).")
    assert found == "See code (`molora/layer.py`) and [there](routing.md#a)."
