"""Whether the built site asks no other host for anything: scripts, styles, fonts and pictures are its own.

python tools/check_site.py site
"""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

LOADED = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LOCAL_LINKS = {"canonical", "next", "prev", "alternate"}  # told, not fetched
FOREIGN = re.compile(r"^(?:https?:)?//")


class Page(HTMLParser):
    """Collects what a browser would fetch from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        url = given.get(LOADED.get(tag, ""))
        if url and FOREIGN.match(url) and not (tag == "link" and given.get("rel") in LOCAL_LINKS):
            self.found.append(f"<{tag}> {url}")


def foreign(site: Path) -> list[str]:
    """What the pages and styles of ``site`` would fetch from another host."""
    found = []
    for file in sorted(site.rglob("*.html")):
        page = Page()
        page.feed(file.read_text(encoding="utf-8"))
        found += [f"{file.relative_to(site)}: {one}" for one in page.found]
    for file in sorted(site.rglob("*.css")):
        for url in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^)\"']+)", file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: {url}")
    # The theme's script draws diagrams by one from another host, where a page has such an element.
    for file in sorted(site.rglob("*.html")):
        if re.search(r"class=\"mermaid\"", file.read_text(encoding="utf-8")):
            found.append(f"{file.relative_to(site)}: a diagram")
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    if not (folder / "index.html").is_file():
        sys.exit(f"There is no site in {folder}.")
    if asked := foreign(folder):
        sys.exit("Asked of other hosts:\n" + "\n".join(asked))
    print(f"{folder}: {len(list(folder.rglob('*.html')))} pages, and nothing is asked of another host.")
