"""Every command on a tiny saved MoLoRA: what it prints, its JSON, its mistakes in one sentence, its help."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from typer.testing import CliRunner

from molora import MoLoRAModel, RouterConfig, Stack, StackLayer, bench, starter
from molora.cli import app, main
from molora.commands.common import parse_selection
from molora.errors import SelectionError, StackError
from tests.conftest import SMALL, write_adapter

ADAPTERS = {"personality": ["sage"], "domain": ["math", "code"], "user": ["ada", "ben"]}
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama that reads bytes and knows ChatML's marks."""
    folder = tmp_path_factory.mktemp("base")
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    raw = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    marks = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, **marks)
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**{**SMALL, "vocab_size": len(tokens)}, tie_word_embeddings=True)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stack_file(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stack")
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    labels = [(layer, name) for layer, names in ADAPTERS.items() for name in names]
    for seed, (layer, name) in enumerate(labels):
        write_adapter(base, root / layer / name, seed, r=2 + 2 * seed)
    layers = [StackLayer(layer, {name: f"{layer}/{name}" for name in names}) for layer, names in ADAPTERS.items()]
    layers[0].default, layers[2].shared, layers[2].default = "sage", True, None
    Stack(layers).save(root / "stack.yaml")
    return root / "stack.yaml"


@pytest.fixture(scope="module")
def model(base_folder: Path, stack_file: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("saved") / "model"
    torch.manual_seed(3)
    router = RouterConfig(width=8, hidden=16)
    MoLoRAModel.from_base(str(base_folder), stack_file, router).save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def somewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainings write to runs/ of the working folder; the size of the terminal is fixed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")


def run(*arguments: str, stdin: str | None = None) -> str:
    """What a command writes to stdout."""
    result = CliRunner().invoke(app, list(arguments), input=stdin)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fail(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> str:
    """The sentence with which a command ends."""
    monkeypatch.setattr(sys, "argv", ["molora", *arguments])
    with pytest.raises(SystemExit) as exit_:
        main()
    assert exit_.value.code == 2
    error = capsys.readouterr().err.strip()
    assert "Traceback" not in error and "\n" not in error
    return error


@pytest.mark.parametrize(
    "command",
    ["", "chat", "demo", "generate", "routes", "info", "internalize", "train", "train adapter", "train router",
     "train data", "train personas", "bench", "bench decode", "store", "store put", "store list", "store versions",
     "store use", "store rollback", "store get", "store remove", "store prune", "store reindex"],
)  # fmt: skip
def test_help_has_an_example(command: str) -> None:
    assert "Example: molora " + command in " ".join(run(*command.split(), "--help").split())


@pytest.mark.parametrize("command", ["adapter", "router"])
def test_training_help_tells_of_several_processes(command: str) -> None:
    assert f"-m molora train {command}" in " ".join(run("train", command, "--help").split())


def test_python_m_molora_and_a_mistake_in_it() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "molora", "info", "nowhere"], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "There is no folder nowhere."


def test_version() -> None:
    assert run("--version").strip().count(".") == 2


class TestSelection:
    def test_every_choice(self) -> None:
        entries = ["domain=math,code", "personality=none", "user=ada", "mood=auto", "user=ben"]
        expected = {"domain": ["math", "code"], "personality": None, "user": "ben", "mood": "auto"}
        assert parse_selection(entries) == expected
        assert parse_selection(None) == {}
        assert parse_selection(["domain=math:0.7, code:-.5"]) == {"domain": {"math": 0.7, "code": -0.5}}

    @pytest.mark.parametrize(
        "entry",
        ["domain", "=math", "domain=", "domain=math,", "domain=auto,math", "domain=a,none", "domain=a:1,b", "d=a:x"],
    )
    def test_other_forms(self, entry: str) -> None:
        with pytest.raises(SelectionError):
            parse_selection([entry])


class TestGenerate:
    def test_json_has_a_route_for_each_token(self, model: str) -> None:
        text = run("generate", model, "-p", "hi", "--max-new-tokens", "6", "--select", "domain=code", "--json")
        record = json.loads(text)
        assert record["prompt"] == "hi" and record["selection"] == {"domain": "code"}
        assert 1 < len(record["tokens"]) <= 6 and record["tokens_per_second"] > 0
        assert record["text"] == "".join(token["text"] for token in record["tokens"])
        for token in record["tokens"]:
            acted = [(route["layer"], route["adapter"]) for route in token["routes"]]
            assert acted == [("personality", "sage"), ("domain", "code"), ("user", None)]

    def test_plain_text_is_the_same_answer(self, model: str) -> None:
        options = ("generate", model, "--max-new-tokens", "6", "--dtype", "float32")
        record = json.loads(run(*options, "-p", "hi", "--json"))
        assert run(*options, "-p", "-", stdin="hi") == record["text"] + "\n"

    def test_raw_goes_without_the_chat_format(self, model: str) -> None:
        options = ("generate", model, "-p", "hello", "--max-new-tokens", "8", "--dtype", "float32", "--json")
        assert json.loads(run(*options, "--raw"))["tokens"] != json.loads(run(*options))["tokens"]

    def test_a_seed_repeats_a_sampling(self, model: str) -> None:
        options = ("generate", model, "-p", "hi", "--max-new-tokens", "6", "--temperature", "2", "--json", "--seed")
        first, again, other = (json.loads(run(*options, seed))["tokens"] for seed in ("1", "1", "2"))
        assert first == again != other

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["-p", "hi", "--select", "domain=law"], "has no adapter 'law'; it has math, code"),
            (["-p", "hi", "--select", "mood=auto"], "There is no layer 'mood'"),
            (["-p", "hi", "--select", "math"], "is no selection"),
            (["-p", " "], "The text is empty"),
            (["-p", "x" * 300], "shorten the prompt"),
        ],
    )
    def test_mistakes(
        self, model: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str
    ) -> None:
        error = fail(capsys, monkeypatch, "generate", model, *arguments, "--max-new-tokens", "8")
        assert sentence in error


class TestRoutes:
    def test_json_has_each_token_and_shares_that_sum_to_one(self, model: str) -> None:
        record = json.loads(run("routes", model, "añb<|im_end|>", "--json"))
        assert [token["text"] for token in record["tokens"]] == ["a", "", "ñ", "b", "<|im_end|>"]
        assert record["shares"]["personality"] == {"sage": 1.0} and record["shares"]["user"] == {"none": 1.0}
        assert sum(record["shares"]["domain"].values()) == pytest.approx(1, abs=1e-3)

    def test_table(self, model: str) -> None:
        text = run("routes", model, "-", "--select", "domain=math", stdin="a b\n")
        lines = [line.split() for line in text.splitlines()]
        assert lines[:3] == [
            ["#", "token", "personality", "domain", "user"],
            ["0", "a", "sage", "math", "-"],
            ["1", "·", "sage", "math", "-"],
        ]
        assert "4 tokens; personality sage 100%; domain math 100%" in text

    def test_page_is_self_contained_and_escapes(self, model: str, tmp_path: Path) -> None:
        file = tmp_path / "routes.html"
        run("routes", model, "<script>alert(1)</script>", "--select", "domain=code", "--html", str(file))
        page = file.read_text(encoding="utf-8")
        assert "&lt;script&gt;" in page and "<script" not in page
        assert 'class="fill-1"' in page and "domain: code 1.00" in page
        assert not any(mark in page for mark in ("http:", "https:", "src=", "href="))

    def test_mistakes(self, model: str, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert "The text is empty" in fail(capsys, monkeypatch, "routes")
        assert "shorten it" in fail(capsys, monkeypatch, "routes", model, "x" * 300)
        error = fail(capsys, monkeypatch, "routes", model, "x", "--html", str(tmp_path / "none" / "a.html"))
        assert "cannot be written" in error


class TestInfo:
    def test_model(self, model: str) -> None:
        record = json.loads(run("info", model, "--json"))
        assert record["kind"] == "molora" and [layer["name"] for layer in record["layers"]] == list(ADAPTERS)
        code = record["layers"][1]["adapters"][1]
        assert code["name"] == "code" and code["ranks"] == [6] and code["modules"] == 21 and "q_proj" in code["targets"]
        assert code["bytes"] == 4 * code["parameters"]
        assert record["router"]["rows"][-2:] == ["user/*", "user/none"] and record["router"]["settings"]["width"] == 8
        text = run("info", model)
        assert "layer user: top 1, default none, one router row for all" in text and "rows personality/sage" in text

    def test_adapter_and_stack_file(self, stack_file: Path) -> None:
        record = json.loads(run("info", str(stack_file.parent / "domain" / "math"), "--json"))
        assert record["kind"] == "adapter" and record["ranks"] == [4]
        assert "4" in run("info", str(stack_file.parent / "domain" / "math"))
        record = json.loads(run("info", str(stack_file), "--json"))
        assert record["kind"] == "stack" and record["router"] is None
        assert "router: none" in run("info", str(stack_file))

    def test_mistakes(self, capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        assert "not a saved MoLoRA" in fail(capsys, monkeypatch, "info", str(tmp_path))
        (tmp_path / "adapter_config.json").write_text("{")
        assert "is not readable JSON" in fail(capsys, monkeypatch, "info", str(tmp_path))


class TestChat:
    def test_a_conversation(self, model: str) -> None:
        lines = [
            "hi",
            "",
            "/select domain=code user=ada",
            "hi",
            "/select domain=law",
            "/what",
            "/help",
            "/reset",
            "/quit",
        ]
        text = run("chat", model, "--max-new-tokens", "3", "--select", "domain=math", stdin="\n".join(lines))
        assert "domain = math" in text and "domain = code" in text and "user = ada" in text
        assert "domain math 100%" in text and "domain code 100%" in text and "user ada 100%" in text
        assert "it has math, code" in text and "There is no command /what" in text
        assert "/reset  " in text and "begins anew" in text

    def test_old_turns_make_room_and_the_end_of_input_ends_it(self, model: str) -> None:
        text = run("chat", model, "--max-new-tokens", "2", stdin=f"{'a' * 150}\n{'b' * 150}\n{'c' * 300}\n")
        assert text.count("tokens/s") == 2 and text.count("shorten it") == 1


def _write_data(folder: Path) -> None:
    for domain in ("math", "code"):
        for split in ("train", "validation"):
            lines = [
                {
                    "id": f"{domain}-{split}-{number}",
                    "domain": domain,
                    "split": split,
                    "form": "plain",
                    "messages": [
                        {"role": "user", "content": f"{domain} {number}?"},
                        {"role": "assistant", "content": str(number)},
                    ],
                }
                for number in range(8)
            ]
            file = folder / f"{domain}.{split}.jsonl"
            file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


class TestTrain:
    def test_adapter(self, base_folder: Path, tmp_path: Path) -> None:
        _write_data(tmp_path)
        (tmp_path / "a.yaml").write_text(f"out: mine\nbase: {base_folder}\ndata:\n  train: math.train.jsonl\n")
        overrides = ["data.validation=math.validation.jsonl", "lora.rank=2", "max_steps=2", "batch_tokens=200"]
        arguments = ["train", "adapter", "--config", "a.yaml", "--no-resume", *overrides]
        metrics = json.loads(run(*arguments, "--json"))
        assert metrics["out"] == "mine" and metrics["steps"] == 2 and metrics["settings"]["lora"]["rank"] == 2
        card = (tmp_path / "mine" / "README.md").read_text()
        assert "molora train adapter --config a.yaml data.validation=math.validation.jsonl lora.rank=2" in card
        assert "base validation loss" in run(*arguments)

    def test_router(self, base_folder: Path, stack_file: Path, tmp_path: Path) -> None:
        _write_data(tmp_path)
        settings = [f"model={stack_file}", "out=routed", "data=.", f"base={base_folder}", "mixed=8", "max_steps=2",
                    "documents=4", "in_a_turn=4", "asides=4"]  # fmt: skip
        text = run("train", "router", *settings, "router.reads=0", "router.width=8", "router.hidden=16")
        assert "validation loss" in text and "train conversations" in text
        assert json.loads(run("info", "routed", "--json"))["router"]["settings"]["hidden"] == 16

    def test_data_and_personas(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        from molora_training import data, personas

        asked: list[Any] = []

        def prepare(domains: Any = "all", out: Path | None = None) -> dict[str, Any]:
            asked.append((domains, out))
            return {"math": SimpleNamespace(examples={"train": 3}, overlapping={"test": 1})}

        def write(**options: Any) -> dict[str, dict[str, int]]:
            asked.append(options)
            return {"sage": {"train": 2}}

        monkeypatch.setattr(data, "prepare", prepare)
        monkeypatch.setattr(personas, "prepare", write)
        record = json.loads(run("train", "data", "math", "--out", "here", "--json"))
        assert record == {"folder": "here", "domains": {"math": {"examples": {"train": 3}, "overlapping": {"test": 1}}}}
        assert "train 3" in run("train", "data")
        assert json.loads(run("train", "personas", "sage", "--tries", "2", "--json"))["domains"]["sage"]
        assert asked == [
            (["math"], Path("here")),
            ("all", None),
            {"out": None, "names": ["sage"], "tries": 2, "seed": 0},
        ]

    @pytest.mark.parametrize(
        ("arguments", "sentence"),
        [
            (["adapter", "lora.rnak=3"], "Unknown setting lora.rnak"),
            (["adapter", "rank"], "must look like key=value"),
            (["router", "out=b"], "The setting model is missing"),
            (["router", "--config", "none.yaml"], "cannot be read"),
            (["data", "cooking"], "There is no domain 'cooking'"),
        ],
    )
    def test_mistakes(self, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str], sentence: str) -> None:
        assert sentence in fail(capsys, monkeypatch, "train", *arguments)


class TestDemo:
    def test_launch_gets_the_options_and_the_starter(
        self, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
    ) -> None:
        asked: list[Any] = []
        stand_in = SimpleNamespace(launch=lambda source, **options: asked.append((source, options)), local=str)
        monkeypatch.setitem(sys.modules, "molora_demo.app", stand_in)
        monkeypatch.setenv(starter.VARIABLE, model)
        run("demo", "--port", "8080", "--no-browser")
        options = {"host": "127.0.0.1", "port": 8080, "open_browser": False, "networks": {}}
        assert asked == [(model, options)]
        folder = str(Path(model).parent)
        run("demo", model, "--no-browser", "--network", f"document={folder}")
        assert asked[1] == (model, {**options, "port": 7860, "networks": {"document": Path(folder)}})

    def test_a_server_stands_alone(self, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        assert "stands alone" in fail(capsys, monkeypatch, "demo", model, "--server", "http://127.0.0.1:1")
        assert "does not answer" in fail(capsys, monkeypatch, "demo", "--server", "http://127.0.0.1:1")
        assert "KIND=FOLDER" in fail(capsys, monkeypatch, "demo", "--network", "poem=x")
        assert "there is no folder" in fail(capsys, monkeypatch, "demo", "--network", "pieces=nowhere")

    def test_a_missing_extra_is_named(self, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
        monkeypatch.delitem(sys.modules, "molora_demo.app", raising=False)
        monkeypatch.setitem(sys.modules, "gradio", None)
        error = fail(capsys, monkeypatch, "demo", model)
        assert "pip install 'molora[demo]'" in error and "gradio" in error


class TestStarter:
    def test_the_repository_has_it_or_says_so(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.delenv(starter.VARIABLE, raising=False)
        monkeypatch.setattr(starter, "__file__", str(tmp_path / "molora" / "starter.py"))
        with pytest.raises(StackError, match="carries no starter"):
            starter.starter_folder()
        for place in (tmp_path / "molora" / "starter", tmp_path / "starter"):
            place.mkdir(parents=True)
            (place / "molora.json").touch()
            assert starter.starter_folder() == place

    def test_a_wrong_variable(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv(starter.VARIABLE, str(tmp_path))
        with pytest.raises(StackError, match="holds no molora.json"):
            starter.starter_folder()


def test_bench_decode(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "TOKENS", {"base": 6, "molora": 6, "xlora": 3})
    record = json.loads(run("bench", "decode", model, "--json", "--dtype", "float32"))
    assert record["selection"] == {"personality": "sage", "domain": "auto", "user": "ada"}
    assert record["adapters"] == ["personality/sage", "domain/math", "domain/code", "user/ada"]
    assert {name: len(runs) for name, runs in record["runs"].items()} == bench.REPEATS
    pace = record["tokens_per_second"]
    assert record["ratios"]["molora_to_base"] == pytest.approx(pace["molora"] / pace["base"], rel=0.01)
    assert record["threads"] and record["torch"] and record["machine"]


def test_help_needs_no_torch() -> None:
    """Which takes seconds to import."""
    code = "import sys, molora.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
