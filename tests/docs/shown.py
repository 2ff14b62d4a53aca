"""What README.md and the pages show: their blocks, and the commands in these, as a shell would read them."""

import re
import shlex
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHELL = ("bash", "console")
_FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^\1```", re.S | re.M)
_ASSIGNED = re.compile(r"[A-Z_][A-Z0-9_]*=")


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line on which it begins, its language ("" where none is named) and its text."""

    page: str
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a line: ``cat FILE | COMMAND < FILE > FILE`` in its parts, and as it is listed (`text`)."""

    text: str
    words: list[str]
    stdin: str | None = None
    stdout: str | None = None
    variables: dict[str, str] = field(default_factory=dict)

    @property
    def program(self) -> str:
        return self.words[0]


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in these languages; of none: all."""
    found = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for match in _FENCE.finditer(text):
            if not languages or match[2] in languages:
                inside = re.sub(rf"^{match[1]}", "", match[3], flags=re.M)
                line = text[: match.start()].count("\n") + 1
                found.append(Block(str(page.relative_to(ROOT)), line, match[2], inside))
    return found


def commands(block: Block) -> list[Command]:
    """The commands of a shell block, in order. In a console block only lines with a prompt are commands."""
    text = block.text
    if block.language == "console":
        text = "\n".join(line[2:] for line in text.splitlines() if line.startswith("$ "))
    joined = re.sub(r"\\\n\s*", "", text)
    return [command for line in joined.splitlines() for command in _of_line(line)]


def in_text() -> list[tuple[str, str]]:
    """Commands of MoLoRA that stand in the prose, as `molora update`; with the page of each."""
    found = []
    for page in pages():
        prose = _FENCE.sub("", page.read_text(encoding="utf-8"))
        for match in re.finditer(r"`((?:molora |python -m |benchmarks/|tools/|make )[^`]+)`", prose):
            found.append((str(page.relative_to(ROOT)), " ".join(match[1].split())))
    return found


def _of_line(line: str) -> list[Command]:
    reader = shlex.shlex(line, posix=True, punctuation_chars="|&<>;")
    reader.whitespace_split = True
    reader.commenters = "#"
    found: list[Command] = []
    words: list[str] = []
    stdin: str | None = None
    for token in [*reader, "&&"]:
        if token in ("&&", "||", ";", "&"):
            if words:
                found.append(_command(words, stdin))
            words, stdin = [], None
        elif token == "|":
            if len(words) != 2 or words[0] != "cat":
                raise ValueError(f"Only `cat FILE |` is known before a command: {line}")
            stdin, words = words[1], []
        else:
            words.append(token)
    return found


def _command(words: list[str], stdin: str | None) -> Command:
    text = (f"cat {stdin} | " if stdin else "") + " ".join(
        word if word in "<>" else shlex.quote(word) if re.search(r"[\s\"']", word) or not word else word
        for word in words
    )
    variables, stdout, kept = {}, None, []
    rest = iter(words)
    for word in rest:
        if word == "<":
            stdin = next(rest)
        elif word == ">":
            stdout = next(rest)
        elif not kept and _ASSIGNED.match(word):
            name, _, variables[name] = word.partition("=")
        else:
            kept.append(word)
    return Command(text, kept, stdin, stdout, variables)
