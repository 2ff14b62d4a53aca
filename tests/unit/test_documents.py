"""Documents of every kind that is read, what is refused, and how a text is cut."""

from pathlib import Path

import pytest
from pypdf import PdfWriter
from pypdf.generic import DecodedStreamObject, DictionaryObject, NameObject

from molora.errors import DocumentError
from molora.personalize.documents import chunks, read_document
from tests.unit.spoken import make_tokenizer


def write_pdf(path: Path, lines: list[str], password: str | None = None) -> Path:
    """A page with a line of text each."""
    writer = PdfWriter()
    page = writer.add_blank_page(300, 200)
    font = DictionaryObject(
        {NameObject("/Type"): NameObject("/Font"), NameObject("/Subtype"): NameObject("/Type1"),
         NameObject("/BaseFont"): NameObject("/Helvetica")}
    )  # fmt: skip
    page[NameObject("/Resources")] = DictionaryObject(
        {NameObject("/Font"): DictionaryObject({NameObject("/F1"): font})}
    )
    stream = DecodedStreamObject()
    said = "".join(f"({line}) Tj 0 -20 Td " for line in lines)
    stream.set_data(f"BT /F1 12 Tf 10 150 Td {said}ET".encode())
    page[NameObject("/Contents")] = stream
    if password:
        writer.encrypt(password)
    writer.write(path)
    return path


def test_each_kind_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffDie Füße sind groß.\n", encoding="utf-8")
    (tmp_path / "a.MD").write_text("# Title\n\nText.\n")
    (tmp_path / "a.html").write_text(
        "<html><head><style>p {}</style><script>let x = 1;</script></head>"
        "<body><h1>Title</h1><p>One &amp;\n two.</p></body>"
    )
    assert read_document(tmp_path / "a.txt") == "Die Füße sind groß."
    assert read_document(tmp_path / "a.MD") == "# Title\n\nText."
    assert read_document(tmp_path / "a.html") == "Title\nOne &\ntwo."
    assert read_document(write_pdf(tmp_path / "a.pdf", ["The code is 42.", "It is secret."])).split("\n") == [
        "The code is 42.",
        "It is secret.",
    ]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("none.txt", None, "There is no document"),
        ("a.docx", b"PK", r"a\.docx is none of \.txt, \.md"),
        ("empty.txt", b" \n", "holds no text"),
        ("binary.txt", b"abc\0def", "is a binary file"),
        ("latin.txt", b"caf\xe9", r"is not UTF-8 text \(byte 3\)"),
        ("broken.pdf", b"%PDF-1.4 and no more", "is no readable PDF"),
        ("empty.html", b"<script>1</script>", "holds no text"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, content: bytes | None, sentence: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DocumentError, match=sentence):
        read_document(tmp_path / name)


def test_an_encrypted_or_empty_pdf_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="is encrypted"):
        read_document(write_pdf(tmp_path / "secret.pdf", ["No."], "password"))
    with pytest.raises(DocumentError, match="pictures of pages"):
        read_document(write_pdf(tmp_path / "scan.pdf", []))


@pytest.mark.parametrize("size", [8, 20, 50, 1000])
def test_chunks_hold_the_whole_text(size: int) -> None:
    text = (
        "Mr. Fox ran. He hid! Why?\nBecause of the hounds, who had been running all day long without a rest. The end."
    )
    tokenizer = make_tokenizer()  # a token a byte
    found = chunks(text, tokenizer, size)
    assert "".join(found) == text
    assert all(0 < len(part) <= size for part in found)
    assert len(found) <= 2 * -(-len(text) // size)


def test_chunks_end_with_sentences_where_they_can() -> None:
    sentences = [f"This is sentence number {number}. " for number in range(20)]
    found = chunks("".join(sentences), make_tokenizer(), 100)
    assert all(part.startswith("This is") for part in found)
    assert max(map(len, found)) - min(map(len, found)) <= 40  # even, as far as sentences allow


def test_an_empty_text_has_no_chunks() -> None:
    with pytest.raises(DocumentError, match="is empty"):
        chunks(" \n", make_tokenizer(), 10)
