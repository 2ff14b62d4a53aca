"""Every command in README.md and docs/ is run in miniature, or stands in one list with the reason why it is not.

Each command of MoLoRA is also held against the command line itself: it has these options, of these types and choices,
and these settings. The models are tiny and random, so what is run is only shown to run, not to be useful.
"""

import argparse
import ast
import importlib
import os
import re
import shutil
import tomllib
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
import typer
import uvicorn
from typer.testing import CliRunner

from molora import MoLoRAModel, Stack, StackLayer, bench
from molora.base import DEFAULT_BASE, load_base
from molora.cli import app
from molora.commands import serve as serve_command
from molora.personalize import embeddings
from molora.serve.app import build_app
from molora.serve.engine import Engine
from molora.serve.store import AdapterStore
from molora_training.settings import load_settings
from tests.docs import workshop
from tests.docs.not_run import LISTED, NOT_RUN, PYTHON_NOT_RUN
from tests.docs.shown import ROOT, SHELL, Block, Command, blocks, commands, in_text, pages

# What is added to a command so that it takes a second here; the command itself stays as it is.
LESS: dict[str, list[str]] = {
    "molora generate": ["--max-new-tokens", "4"],
    "molora train router": ["mixed=8", "documents=0", "in_a_turn=0", "asides=0", "epochs=1"],
    "molora train soup": ["steps=2"],
    "molora bench simulate": ["--requests", "500"],
    "molora learn": ["--epochs", "1"],
}
# Slow also in miniature: run where it stands first, and not again on other pages.
ONCE = ("molora update router", "molora learn", "molora bench decode", "molora bench simulate")
# Ends with 1 where what was learnt fails its gate, which text of a random model may do.
JUDGED = ("molora update", "molora learn")

SETTINGS = {
    "train adapter": "molora_training.adapter_settings.AdapterTrainSettings",
    "train router": "molora_training.router_settings.RouterTrainSettings",
    "train pieces": "molora_training.pieces.PiecesSettings",
    "train soup": "molora_training.soup_run.SoupSettings",
    "train starter": "molora_training.starter.StarterSettings",
    "train hypernet doc": "molora_training.hypernet.document.DocumentHypernetSettings",
    "train hypernet text": "molora_training.hypernet.text_settings.TextHypernetSettings",
    "train hypernet profile": "molora_training.hypernet.text_settings.TextHypernetSettings",
    "eval people": "molora_training.people_settings.PeopleSettings",
    "eval merges": "molora_training.merge_table.MergeTableSettings",
    "federate run": "molora_training.federated.settings.FederateSettings",
    "federate app": "molora_training.federated.settings.FederateSettings",
}
UsageError = typer.BadParameter.__mro__[1]  # typer carries a click of its own
MOLORA: Any = typer.main.get_command(app)
SHOWN = [(block, command) for block in blocks(*SHELL) for command in commands(block)]


def words_of(command: Command) -> list[str] | None:
    """The arguments of ``molora``, also where several processes are started; None of another command."""
    if command.program == "molora":
        return command.words[1:]
    at = command.words.index("-m") + 1 if "-m" in command.words else 0
    return command.words[at + 1 :] if at and command.words[at] == "molora" else None


def parse(words: list[str]) -> tuple[str, dict[str, Any]]:
    """Reads a command line as ``molora`` does, without running it: the command's name, and what was given.

    Raises:
        UsageError: it would be refused.
    """
    command = MOLORA
    context = command.make_context("molora", list(words))
    path: list[str] = []
    while hasattr(command, "resolve_command"):
        name, command, rest = command.resolve_command(context, [*context._protected_args, *context.args])
        context = command.make_context(name, rest, parent=context)
        path.append(name)
    return " ".join(path), context.params


def check_settings(name: str, given: dict[str, Any]) -> None:
    """Reads KEY=VALUE and --config of a training, without training."""
    module, _, kind = SETTINGS[name].rpartition(".")
    config = given["config"]
    if config is not None and not (ROOT / config).is_file():
        assert len(Path(config).parts) == 1, f"{config} is no file of the repository"
        return  # a file of the reader's own
    overrides = list(given["overrides"] or ())
    if name == "train starter" and config is None:
        config = importlib.import_module("molora_training.starter").CONFIG
    if name == "train hypernet profile":
        overrides.append("data.folder=x")
    load_settings(getattr(importlib.import_module(module), kind), config and ROOT / config, overrides)


@pytest.mark.parametrize(
    "command", [pytest.param(one, id=f"{block.place} {one.text}") for block, one in SHOWN if words_of(one) is not None]
)
def test_the_command_line_takes_it(command: Command) -> None:
    words = words_of(command) or []
    try:
        name, given = parse(words)
    except typer.Exit as ended:  # --help
        assert ended.exit_code == 0
        return
    if name in SETTINGS:
        check_settings(name, given)


def names_of(settings: Any) -> Iterator[str]:
    """Every setting, as its own last word: "rank" of lora.rank."""
    hints = get_type_hints(settings)
    for entry in fields(settings):
        kinds = [hints[entry.name], *get_args(hints[entry.name])]
        inner = next((kind for kind in kinds if is_dataclass(kind)), None)
        yield from names_of(inner) if inner else [entry.name]


# These are told to have the settings of another command.
@pytest.mark.parametrize("name", sorted(set(SETTINGS) - {"train hypernet profile", "federate app"}))
def test_help_names_every_setting(name: str) -> None:
    command = MOLORA
    for word in name.split():
        command = command.commands[word]
    module, _, kind = SETTINGS[name].rpartition(".")
    told = set(re.findall(r"\w+", command.help))
    assert set(names_of(getattr(importlib.import_module(module), kind))) - told == set()


@pytest.mark.parametrize(
    ("name", "given"),
    [("train adapter", ["out=x", "data.train=x", "data.validation=x"]), ("train router", ["model=x", "out=x"])],
)
def test_help_tells_the_defaults_that_there_are(name: str, given: list[str]) -> None:
    command = MOLORA
    for word in name.split():
        command = command.commands[word]
    told = re.findall(r"([\w.]+)=(\[[^]]*\]|[^\s,;:]+)", command.help[: command.help.index("Example:")])
    module, _, kind = SETTINGS[name].rpartition(".")
    settings = getattr(importlib.import_module(module), kind)
    assert len(told) > 10
    assert load_settings(settings, None, [*given, *map("=".join, told)]) == load_settings(settings, None, given)


def test_commands_in_the_text_exist() -> None:
    """In the prose a command may be cut short; what is there is right."""
    for page, text in in_text():
        words = text.split("...")[0].split()
        if words[0] != "molora":
            continue
        if "COMMAND" in words:
            words = ["molora", "--help"]
        try:
            parse(words[1:])
        except typer.Exit as ended:
            assert ended.exit_code == 0, (page, text)
        except UsageError as error:
            # It may name a command alone, and not its whole line.
            cut = ("MissingParameter", "NoArgsIsHelpError", "BadOptionUsage")
            assert type(error).__name__ in cut and "No such" not in error.message, (page, text, error.message)


class Parsed(Exception):
    """An argparse command line was read."""


def read_module(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Reads the arguments of ``python -m name`` by its own parser, and ends there."""
    honest = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, *_: Any) -> None:
        honest(self, words)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    source = (ROOT / Path(*name.split("."))).with_suffix(".py").read_text(encoding="utf-8")
    if "ArgumentParser" not in source:
        assert not words or name == "benchmarks.fuzz", f"{name} takes no arguments"  # atheris reads its own
        return
    with pytest.raises(Parsed):
        importlib.import_module(name).main()


IN_BLOCKS = {" ".join(command.words) for _, command in SHOWN if command.words[:2] == ["python", "-m"]}
MODULES = sorted(IN_BLOCKS | {text for _, text in in_text() if text.startswith("python -m ")})


@pytest.mark.parametrize("line", MODULES)
def test_scripts_take_their_arguments(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, *words = line.split()[2:]
    assert name.split(".")[0] in ("benchmarks", "tools", "pytest"), line
    if name == "pytest":
        assert all((ROOT / word).exists() for word in words), line
        return
    if words[-1:] == ["..."]:
        words[-1:] = ["x"] if words[-2].startswith("--out") else []
    if words[-1:] == ["--memories"]:
        words.pop()
    if words or line in IN_BLOCKS:
        read_module(name, words, monkeypatch)
    else:  # the prose names it; what it needs its --help says
        assert (ROOT / Path(*name.split("."))).with_suffix(".py").is_file()


def test_files_targets_and_extras_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    every = [command.words for _, command in SHOWN] + [text.split() for _, text in in_text()]
    for words in every:
        if words[0] == "make":
            assert words[1].strip("'") in targets, words
        elif words[0].startswith(("benchmarks/", "tools/")):
            assert (ROOT / words[0]).is_file(), words
            assert words[0].endswith(".py") or os.access(ROOT / words[0], os.X_OK), words
        elif words[:2] == ["pip", "install"] and words[2].startswith("molora["):
            assert words[2][len("molora[") : -1] in project["optional-dependencies"], words


def test_what_is_not_run_is_listed_once_and_still_shown() -> None:
    shown = {command.text for _, command in SHOWN}
    assert len(LISTED) == sum(map(len, NOT_RUN.values()))
    assert sorted(LISTED - shown) == [], "no page shows these any more"
    others = {command.text for _, command in SHOWN if command.program != "molora"}
    assert sorted(others - LISTED) == [], "neither run nor listed"


def test_blocks_say_what_they_are() -> None:
    """A block without a language is not read, so none may be without."""
    assert [block.place for block in blocks("")] == []
    known = {*SHELL, "python", "text", "yaml", "toml", "json"}
    assert {block.language for block in blocks()} <= known


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("workshop")
    before = Path.cwd()
    os.chdir(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOLORA_CACHE", str(folder / "cache"))
        workshop.build(folder)
    os.chdir(before)
    yield folder


@pytest.fixture
def place(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the workshop for one block, which is the working folder and where every variable points."""
    folder = tmp_path / "here"
    shutil.copytree(built, folder)
    monkeypatch.chdir(folder)
    for name, value in {"MOLORA_CACHE": "cache", "MOLORA_STARTER": "starter", "DATA": "cache/data"}.items():
        monkeypatch.setenv(name, str(folder / value))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(serve_command, "KEYS_FILE", folder / "keys.json")
    monkeypatch.setattr(embeddings, "SentenceEncoder", workshop.encoder)
    monkeypatch.setattr(bench, "TOKENS", dict.fromkeys(bench.TOKENS, 2))
    monkeypatch.setattr(uvicorn, "run", lambda *_, **__: None)  # it would wait for requests
    return folder


def local(word: str, folder: Path) -> str:
    """A word as it is here: a bucket is a folder, and a version that a page leaves open is one that is there."""
    word = os.path.expandvars(word.replace("s3://bucket", str(folder / "bucket")))
    if word == "VERSION":
        store = AdapterStore(str(folder / "bucket" / "adapters"))
        word = store.versions("user", "ada")[0].version
        store.close()
    return word


def answers(command: Command) -> str:
    if command.stdin is not None:
        return Path(command.stdin).read_text(encoding="utf-8")
    return "/quit\n" if command.words[1] == "chat" else "y\n"


def again(block: Block, command: Command) -> bool:
    """Whether it is slow, and one like it was run on an earlier place."""
    start = next((one for one in ONCE if command.text.startswith(one)), None)
    return start is not None and block != next(
        one for one, other in SHOWN if other.text.startswith(start) and other.text not in LISTED
    )


RUN = [
    (block, todo)
    for block in blocks(*SHELL)
    if (todo := [one for one in commands(block) if one.text not in LISTED and not again(block, one)])
]


@pytest.mark.parametrize(("block", "todo"), [pytest.param(*one, id=one[0].place) for one in RUN])
def test_the_commands_of_a_block_run(block: Block, todo: list[Command], place: Path) -> None:
    for command in todo:
        less = next((more for start, more in LESS.items() if f" {start} " in f" {command.text} "), [])
        help_only = "--help" in command.words
        for word in command.words:
            if word.startswith("out=") and f"model={word[4:]}" not in command.words:
                shutil.rmtree(word[4:], ignore_errors=True)  # the reader has none yet
        words = [local(word, place) for word in command.words[1:]] + less * (not help_only)
        found = CliRunner().invoke(app, words, input=answers(command))
        fine = (0, 1) if command.text.startswith(JUDGED) and "does not serve" in found.output else (0,)
        assert found.exit_code in fine, (command.text, found.output, repr(found.exception))
        if command.stdout is not None:
            (place / command.stdout).write_text(found.stdout)


def test_routes_that_curl_asks_for_exist(place: Path) -> None:
    model = MoLoRAModel.from_pretrained("my-molora", dtype=torch.float32)
    served = build_app(Engine(model, rows=1, longest=64))
    paths = served.openapi()["paths"]
    routes = {re.sub(r"{\w+}", "[^/]+", path): {one.upper() for one in methods} for path, methods in paths.items()}
    asked = 0
    for _, command in SHOWN:
        if command.program != "curl":
            continue
        words = command.words
        method = words[words.index("-X") + 1] if "-X" in words else "POST" if {"-F", "-d"} & set(words) else "GET"
        (path,) = (word.partition("8000")[2].partition("?")[0] for word in words if "localhost:8000" in word)
        assert any(re.fullmatch(known, path) and method in methods for known, methods in routes.items()), command.text
        asked += 1
    assert asked


# What a page's Python blocks need from a command of the same page.
MADE = {"docs/composition.md": ["compress", "adapters", "--basis", "64", "--out", "compressed"]}
PAGES = sorted({block.page for block in blocks("python")})


@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, place: Path) -> None:
    """Its blocks one after the other, as a reader would run them; what they take for granted is there."""
    if page in MADE:
        assert CliRunner().invoke(app, MADE[page]).exit_code == 0
    model = MoLoRAModel.from_pretrained("my-molora", dtype=torch.float32)
    base, tokenizer = load_base(DEFAULT_BASE, dtype=torch.float32)
    encoded = model.encode("2 + 2 =")
    names: dict[str, Any] = {
        "MoLoRAModel": MoLoRAModel, "Stack": Stack, "StackLayer": StackLayer, "model": model, "base": base,
        "tokenizer": tokenizer, "inputs": {**encoded, "max_new_tokens": 2}, "ids": encoded["input_ids"][0].tolist(),
    }  # fmt: skip
    for block in blocks("python"):
        if block.page != page:
            continue
        code = compile("\n" * block.line + block.text.replace("s3://bucket", str(place / "bucket")), page, "exec")
        if not any(block.text.startswith(start) for start in PYTHON_NOT_RUN):
            exec(code, names)
    for name in ("engine", "store"):
        if hasattr(names.get(name), "close"):
            names[name].close()


def test_python_that_is_not_run_is_still_shown() -> None:
    every = [block.text for block in blocks("python")]
    assert [start for start in PYTHON_NOT_RUN if sum(text.startswith(start) for text in every) != 1] == []


SOURCES = ("molora", "kernels", "training", "demo", "benchmarks")


def told_by_the_code() -> list[str]:
    """Every text of the sources, with … for what is put in."""
    found = []
    for file in [file for folder in SOURCES for file in (ROOT / folder).rglob("*.py")]:
        source = file.read_text(encoding="utf-8")
        if any(word in source for word in ("raise ", "sys.exit(", "Error(")):
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.JoinedStr):
                    parts = [str(one.value) if isinstance(one, ast.Constant) else "…" for one in node.values]
                    found.append("".join(parts))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_that_pages_explain_are_there() -> None:
    """A table of messages names those of the code, with … for what differs."""
    told, asked = told_by_the_code(), 0
    for page in pages():
        table = page.read_text(encoding="utf-8").partition("| message |")[2].partition("\n\n")[0]
        for line in table.splitlines()[2:]:
            for message in re.findall(r"`([^`]+)`", line.split(" | ")[0]):
                wanted = re.compile(".*".join(map(re.escape, message.rstrip("….").split("…"))), re.S)
                assert any(wanted.search(text) for text in told), (page.name, message)
                asked += 1
    assert asked
