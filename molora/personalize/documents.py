"""Documents as plain text, and texts in chunks."""

import re
from bisect import bisect_left, bisect_right
from pathlib import Path
from typing import Any

from molora.errors import DocumentError

MOST_BYTES = 64 * 2**20
EXAMPLE_TOKENS, EXAMPLES = 48, 32  # of the pieces that a document's row of the router is fitted to
KINDS = (".txt", ".md", ".markdown", ".html", ".htm", ".pdf")
_SENTENCE = re.compile(r"(?<=[.!?…])\s+|\n+")


def read_document(path: str | Path) -> str:
    """The text of a file: plain text, Markdown, HTML or PDF.

    Raises:
        DocumentError: there is none, it is empty, binary, encrypted, damaged, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise DocumentError(f"There is no document {path}.")
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise DocumentError(f"{path.name} is none of {', '.join(KINDS)}: save it as one of these.")
    size = path.stat().st_size
    if size > MOST_BYTES:
        raise DocumentError(f"{path.name} has {size >> 20} MiB; {MOST_BYTES >> 20} are the most that is read.")
    data = path.read_bytes()
    text = _pdf(path) if kind == ".pdf" else _decoded(data, path)
    if kind in (".html", ".htm"):
        text = _html(text)
    text = text.strip()
    if not text:
        why = " It may hold pictures of pages alone: recognise their text first." if kind == ".pdf" else ""
        raise DocumentError(f"{path.name} holds no text.{why}")
    return text


def chunks(text: str, tokenizer: Any, size: int) -> list[str]:
    """A text in pieces of at most ``size`` tokens, as even as may be, cut between sentences where one ends in time.

    Raises:
        DocumentError: the text is empty.
    """
    if not text.strip():
        raise DocumentError("The document is empty.")
    offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)["offset_mapping"]
    starts = [match.end() for match in _SENTENCE.finditer(text)]
    # The space before a sentence may belong to its first token.
    borders = [
        index
        for index, (start, end) in enumerate(offsets)
        if (at := bisect_left(starts, start)) < len(starts) and starts[at] < max(end, start + 1)
    ]
    found, first = [], 0
    while first < len(offsets):
        left = len(offsets) - first
        last = first + -(-left // -(-left // size))  # even pieces of what is left
        if last < len(offsets):
            near = borders[bisect_right(borders, first) : bisect_right(borders, first + size)]
            last = min(near, key=lambda border: abs(border - last)) if near else last
        found.append(text[offsets[first][0] : offsets[last - 1][1]])
        first = last
    return found


def examples_of(text: str, tokenizer: Any) -> list[str]:
    """Pieces of a document that stand for all of it, evenly taken."""
    pieces = chunks(text, tokenizer, EXAMPLE_TOKENS)
    return pieces[:: -(-len(pieces) // EXAMPLES)]


def _decoded(data: bytes, path: Path) -> str:
    if b"\0" in data:
        raise DocumentError(f"{path.name} is a binary file, not text.")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DocumentError(f"{path.name} is not UTF-8 text (byte {error.start}); save it as UTF-8.") from error


def _html(text: str) -> str:
    from bs4 import BeautifulSoup

    page = BeautifulSoup(text, "html.parser")
    for part in page(["script", "style", "noscript", "template"]):
        part.decompose()
    lines = (" ".join(line.split()) for line in page.get_text("\n").splitlines())
    return "\n".join(line for line in lines if line)


def _pdf(path: Path) -> str:
    from pypdf import PdfReader
    from pypdf.errors import PyPdfError

    try:
        reader = PdfReader(path)
        if reader.is_encrypted:
            raise DocumentError(f"{path.name} is encrypted: save a copy without a password.")
        return "\n".join(page.extract_text() for page in reader.pages)
    except (PyPdfError, ValueError, KeyError, OSError) as error:
        if isinstance(error, DocumentError):
            raise
        raise DocumentError(f"{path.name} is no readable PDF: {error}") from error
