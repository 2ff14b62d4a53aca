"""A mail taken apart: what its sender wrote, what they quote, the subject, the sender and the day."""

import email
import email.errors
import email.header
import email.message
import re
from dataclasses import dataclass
from email.utils import parseaddr, parsedate_to_datetime

from .text import approx_tokens, collapse

QUOTED_TOKENS, ANSWER_TOKENS = 150, 220
# Initials may stand before a mark, as some mail programs write it.
_QUOTE = re.compile(r"^\s{0,8}(?:[A-Za-z]{0,4}>|\|\s|--\])")
_MARKS = re.compile(r"^(?:\s{0,8}(?:[A-Za-z]{0,4}>|\||--\])\s?)+")
_WHO_WROTE = re.compile(r"\b(?:wrote|writes?|said|says|schrieb)[^\w\n]*:\s*$")
# What a mailing list, a signature or a forwarded message begins with: nothing after it is the sender's own.
_END = re.compile(r"^\s*(?:--\s*$|[-_=*~]{8,}|-{4,}\s?(?:begin pgp sig|original|forward)|\S*mailman/listinfo)", re.I)
_ARMOUR = re.compile(r"^-----BEGIN PGP SIGNED MESSAGE-----\s*\nHash:[^\n]*\n", re.M)
_ADDRESS = re.compile(r"<?\b[\w.+-]+@[\w-]+(?:\.[\w-]+)+\b>?")
_LABEL = re.compile(r"^\s*(?:(?:re|fwd?|aw)(?:\[\d+\])?\s*:|\[[^\]]{1,30}\])\s*", re.I)


@dataclass(frozen=True)
class Mail:
    """One mail. `sender` is an address in lower case; addresses within the texts are blotted out."""

    sender: str
    subject: str
    own: str
    quoted: str
    day: str | None


def read_mail(text: str) -> Mail | None:
    """A mail from its source; None when it has no sender or no plain text."""
    message = email.message_from_string(text)
    sender = parseaddr(_header(message, "From"))[1].lower()
    body = _plain(message)
    if "@" not in sender or body is None:
        return None
    own, quoted = _apart(_ARMOUR.sub("", body.replace("\r\n", "\n")))
    return Mail(sender, _subject(_header(message, "Subject")), _within(own), quoted, _day(message))


def _header(message: email.message.Message, name: str) -> str:
    try:
        parts = email.header.decode_header(collapse(str(message.get(name, ""))))
        return str(email.header.make_header(parts))
    except (email.errors.HeaderParseError, LookupError, ValueError):
        return str(message.get(name, ""))


def _plain(message: email.message.Message) -> str | None:
    for part in message.walk():
        if part.get_content_type() == "text/plain" and not part.is_multipart():
            if str(part.get("Content-Transfer-Encoding", "")).lower() in ("quoted-printable", "base64"):
                data = part.get_payload(decode=True)
                assert isinstance(data, bytes)  # of a part that is not multipart
                try:
                    return data.decode(part.get_content_charset() or "latin-1", errors="replace")
                except LookupError:  # a charset that nobody knows
                    return data.decode("latin-1")
            return str(part.get_payload())
    return None


def _subject(text: str) -> str:
    """The subject without marks of replies and lists."""
    text = _blotted(collapse(text))
    while (shorter := _LABEL.sub("", text)) != text:
        text = shorter
    return text


def _apart(body: str) -> tuple[str, str]:
    """What is the sender's own, line by line, and what is quoted, on one line and cut to its first words."""
    own: list[str] = []
    quoted: list[str] = []
    for line in body.split("\n"):
        if _QUOTE.match(line):
            quoted.append(_MARKS.sub("", line))
        elif _END.match(line):
            break
        elif _WHO_WROTE.search(line):
            if own and re.match(r"\s*(?:On|At|In)\b", own[-1]):  # such a line in two
                own.pop()
        else:
            own.append(line.rstrip())
    lines = [line for line in quoted if not _WHO_WROTE.search(line)]
    return _blotted("\n".join(own)).strip(), _first_words(_blotted(collapse(" ".join(lines))), QUOTED_TOKENS)


def _first_words(text: str, tokens: int) -> str:
    kept: list[str] = []
    size = 0
    for word in text.split():
        size += approx_tokens(word)
        if size > tokens:
            break
        kept.append(word)
    return " ".join(kept)


def _within(text: str) -> str:
    """Whole paragraphs from the start, as many as fit; without the white space of more than one empty line."""
    kept: list[str] = []
    size = 0
    for paragraph in re.split(r"\n\s*\n", text):
        size += approx_tokens(paragraph)
        if size > ANSWER_TOKENS:
            break
        kept.append(paragraph.strip("\n"))
    return "\n\n".join(kept)


def _blotted(text: str) -> str:
    return _ADDRESS.sub("<address>", text)


def _day(message: email.message.Message) -> str | None:
    try:
        return parsedate_to_datetime(str(message.get("Date"))).date().isoformat()
    except (TypeError, ValueError):
        return None
