"""`molora update` on a tiny model: what it learnt and lost is what PEFT says, and only what passed its gate serves."""

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import torch
from filelock import FileLock
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from molora import MoLoRAModel
from molora.chat import render
from molora.cli import app
from molora.commands.update import update as update_command
from molora.errors import ConfigError, DataError, VersionError
from molora.saved import load
from molora.versions import Versions
from molora_training.continual.invented import invent
from molora_training.continual.memory import Memory, held_out, key
from molora_training.continual.methods import METHODS, MethodName
from molora_training.continual.update import MEMORY, WORK, UpdateSettings, update
from tests.unit.spoken import make_spoken, save_spoken


def chats(file: Path, answer: str, numbers: range) -> Path:
    rows = [
        {"messages": [{"role": "user", "content": f"{n:03}"}, {"role": "assistant", "content": answer}]}
        for n in numbers
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> UpdateSettings:
    monkeypatch.chdir(tmp_path)
    model = save_spoken(make_spoken(tmp_path / "adapters"), tmp_path)
    first = chats(tmp_path / "may.jsonl", "aye aye", range(40))
    return UpdateSettings(
        model, "domain", "math", first, learning_rate=3e-2, epochs=4, batch_tokens=512, dtype="float32"
    )


@torch.no_grad()
def change(settings: UpdateSettings, folder: Path, rows: list[Any]) -> float:
    """Nats an answer token by which the base differs from an adapter, by transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(settings.model.parent / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.model.parent / "base")
    model, found = PeftModel.from_pretrained(base, folder).eval(), []
    for row in rows:
        ids = tokenizer(render(tokenizer, row["messages"]), add_special_tokens=False, return_tensors="pt").input_ids
        after = model(input_ids=ids).logits.log_softmax(-1)
        with model.disable_adapter():
            before = model(input_ids=ids).logits.log_softmax(-1)
        asked = render(tokenizer, row["messages"][:-1], add_generation_prompt=True)
        first = len(tokenizer(asked, add_special_tokens=False).input_ids)
        found.append((before.exp() * (before - after)).sum(-1)[0, first - 1 : -1])
    return float(torch.cat(found).mean())


@torch.no_grad()
def loss(settings: UpdateSettings, folder: Path, rows: list[Any]) -> float:
    """Nats a token of the answers and the marks that end them, by transformers and PEFT alone."""
    base = AutoModelForCausalLM.from_pretrained(settings.model.parent / "base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(settings.model.parent / "base")
    model, total, count = PeftModel.from_pretrained(base, folder).eval(), 0.0, 0
    for row in rows:
        asked = render(tokenizer, row["messages"][:1], add_generation_prompt=True)
        prompt = len(tokenizer(asked, add_special_tokens=False).input_ids)
        whole = render(tokenizer, row["messages"])
        ids = tokenizer(whole, add_special_tokens=False, return_tensors="pt").input_ids
        end = prompt + len(row["messages"][1]["content"]) + 1  # bytes, and the mark that ends it
        logits = model(ids).logits[0, prompt - 1 : end - 1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, prompt:end], reduction="sum"))
        count += end - prompt
    return total / count


def remembering(settings: UpdateSettings) -> UpdateSettings:
    """With something that was held out before."""
    kept = [row for row in rows_of(chats(settings.data.with_name("old.jsonl"), "hm", range(900, 940))) if held_out(row)]
    file = settings.model / Versions(settings.model, settings.layer, settings.name).place / MEMORY
    file.parent.mkdir(parents=True, exist_ok=True)
    Memory().with_(kept).save(file)
    return settings


def rows_of(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("method", [method for method in METHODS if method != "plain"])
def test_every_method_learns_and_goes_on(method: Any, settings: UpdateSettings) -> None:
    settings = replace(settings, method=method)
    mine = Versions(settings.model, "domain", "math")
    weights = load_file(settings.model.parent / "adapters" / "math" / "adapter_model.safetensors")
    for number, file in enumerate(("may.jsonl", "june.jsonl"), 2):
        data = chats(settings.data.with_name(file), "aye aye", range(100 * number, 100 * number + 40))
        found = update(replace(settings, data=data), command="molora update")
        assert found.version == number and mine[number].metrics["method"] == method
        assert found.learnt.after < found.learnt.before and found.promoted
        before, weights = weights, load_file(mine.path(number) / "adapter_model.safetensors")
        assert weights.keys() == before.keys()
        for name, tensor in weights.items() if method in ("orthogonal", "inflora", "sd-lora") else ():
            older = before[name].to(tensor)
            if "lora_A" in name:
                assert len(tensor) == len(older) + 8 and torch.equal(tensor[: len(older)], older)
            elif method != "sd-lora" or number == 2:  # whose older tasks' magnitudes learn
                assert torch.equal(tensor[:, : older.shape[1]], older)
            else:
                assert torch.equal(tensor[:, :4], older[:, :4])
                same = torch.cosine_similarity(tensor[:, 4:12].float().flatten(), older[:, 4:].float().flatten(), 0)
                assert float(same) == pytest.approx(1, abs=1e-3)
    states = [method] if method in ("elastic", "inflora", "sd-lora", "treelora") else []
    assert [file.stem for file in (settings.model / mine.place).glob("*.safetensors")] == states
    MoLoRAModel.from_pretrained(settings.model)


def test_what_a_killed_update_left_of_a_text_is_taken_away(settings: UpdateSettings) -> None:
    left = settings.model / Versions(settings.model, "domain", "math").place / WORK / "train.jsonl"
    left.parent.mkdir(parents=True)
    left.write_text("zanzibar")
    update(settings)
    assert not left.parent.exists()


def test_a_new_user_begins_with_an_update(settings: UpdateSettings) -> None:
    ada = replace(settings, layer="user", name="ada", new=4)
    found = update(ada)
    mine = Versions(ada.model, "user", "ada")
    assert found.promoted and (found.version, found.parent, mine.current) == (2, 1, 2) and mine.root() == mine[1]
    assert found.learnt.before == pytest.approx(
        loss(ada, mine.path(1), list(filter(held_out, rows_of(ada.data)))), rel=1e-4
    )
    plain = AutoModelForCausalLM.from_pretrained(ada.model.parent / "base", dtype=torch.float32)
    ids = torch.arange(5, 30)[None]
    with torch.no_grad():
        first = PeftModel.from_pretrained(plain, mine.path(1))(ids).logits
    model = MoLoRAModel.from_pretrained(ada.model, dtype=torch.float32)
    off = {layer.name: None for layer in model.stack.layers}
    assert torch.allclose(model(ids, selection=off).logits, first, atol=1e-5)  # the first version does nothing
    acts = model(ids, selection={**off, "user": "ada"}).logits
    assert not torch.allclose(acts, first, atol=1e-2)
    assert (
        update(replace(ada, new=None, data=chats(ada.data.with_name("june.jsonl"), "aye aye", range(60, 99)))).version
        == 3
    )


def test_a_new_adapter_that_cannot_be_is_named(settings: UpdateSettings) -> None:
    with pytest.raises(ConfigError, match="a rank of 1 or more"):
        replace(settings, new=0)
    with pytest.raises(VersionError, match="has an adapter 'math' already"):
        update(replace(settings, new=4))
    with pytest.raises(VersionError, match="no adapter 'ada'; it has none at all. Begin one with `--new 8`"):
        update(replace(settings, layer="user", name="ada"))
    hard = replace(settings, layer="user", name="ada", new=4, learning_rate=1e-9, epochs=1)
    assert not update(hard).promoted and "ada" not in load(hard.model).stack["user"].adapters
    with pytest.raises(VersionError, match="begun with rank 4 and does not serve yet"):
        update(replace(hard, new=8))
    again = update(replace(hard, learning_rate=3e-2, epochs=4))
    assert again.promoted and again.parent == 1


def test_the_command_knows_every_method() -> None:
    asked = get_type_hints(update_command)["method"]
    assert get_args(asked) == get_args(MethodName) == tuple(METHODS)


def test_it_replays_what_it_makes_up(settings: UpdateSettings) -> None:
    found = update(replace(settings, memory=0, invent=6))
    assert found.promoted and 0 < found.replayed <= 6 and found.kept is None
    assert not (settings.model / Versions(settings.model, "domain", "math").place / MEMORY).exists()


@torch.no_grad()
def test_what_it_makes_up_is_its_own(settings: UpdateSettings) -> None:
    served, base = settings.model.parent / "adapters" / "math", str(settings.model.parent / "base")
    found = invent(base, served, 5, torch.float32, seed=3, question=8, answer=12)
    assert found == invent(base, served, 5, torch.float32, seed=3, question=8, answer=12)
    assert found != invent(base, served, 5, torch.float32, seed=4, question=8, answer=12)
    assert 0 < len(found) <= 5 and [m["role"] for m in found[0]["messages"]] == ["user", "assistant"]
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), served).eval()
    for row in found:
        asked = render(tokenizer, row["messages"][:1], add_generation_prompt=True)
        ids = tokenizer(asked, add_special_tokens=False, return_tensors="pt").input_ids
        stop = tokenizer("<|im_end|>", add_special_tokens=False).input_ids[0]
        said = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0)
        expected = tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True).strip()
        assert row["messages"][1]["content"] == expected


def test_it_learns_remembers_and_serves(settings: UpdateSettings, tmp_path: Path) -> None:
    found = update(settings, command="molora update")
    mine = Versions(settings.model, "domain", "math")
    assert found.promoted and (found.version, found.parent, mine.current) == (2, 1, 2)
    first = rows_of(settings.data)
    apart = [row for row in first if held_out(row)]
    assert found.learnt.conversations == len(apart) > 0 and found.kept is None and found.general is None
    assert found.learnt.before == pytest.approx(loss(settings, mine.path(1), apart), rel=1e-4)
    assert found.learnt.after == pytest.approx(loss(settings, mine.path(2), apart), rel=2e-2)  # bf16 on disk
    assert found.learnt.after < found.learnt.before - 0.2
    memory = Memory.load(settings.model / mine.place / MEMORY)
    assert {key(row) for row in memory.rows} == {key(row) for row in first}

    other = chats(tmp_path / "june.jsonl", "no sir", range(100, 140))
    general = chats(tmp_path / "general.jsonl", "hm", range(500, 530))
    general_apart = [row for row in rows_of(general) if held_out(row)]
    # Held less than others: its base finds all conversations alike.
    later = update(replace(settings, data=other, general=general, hold=1.0, max_forgetting=100.0))
    assert later.promoted and later.replayed > 0 and mine.current == 3 and mine[3].parent == 2
    assert later.kept is not None and later.kept.conversations == len(apart)
    assert later.kept.before == pytest.approx(loss(settings, mine.path(2), apart), rel=1e-3)
    assert later.kept.after == pytest.approx(loss(settings, mine.path(3), apart), rel=1e-3)
    assert later.general is not None and later.general.conversations == len(general_apart) > 0
    assert later.general.after == pytest.approx(loss(settings, mine.path(3), general_apart), rel=1e-3)
    assert mine[3].data["conversations"] == 40 and "no sir" not in json.dumps(mine[3].data)
    with torch.no_grad():  # and a model that is loaded now has it
        model = MoLoRAModel.from_pretrained(settings.model, dtype=torch.float32)
        asked = model.encode([{"role": "user", "content": "123"}])
        served = model(**asked, selection={"domain": "math", "user": None}).logits
        base = AutoModelForCausalLM.from_pretrained(settings.model.parent / "base", dtype=torch.float32)
        expected = PeftModel.from_pretrained(base, mine.path(3)).eval()(**asked).logits
    torch.testing.assert_close(served, expected, rtol=1e-4, atol=1e-4)
    assert not list((tmp_path / "runs").rglob("*.safetensors"))  # what it trained with is gone


def test_what_forgets_too_much_does_not_serve(settings: UpdateSettings, tmp_path: Path) -> None:
    learnt = update(replace(settings, epochs=25)).learnt
    assert learnt.after < learnt.before - 0.4
    mine = Versions(settings.model, "domain", "math")
    memory = (settings.model / mine.place / MEMORY).read_bytes()
    # many that contradict what was learnt, so that replay cannot hold it
    other = chats(tmp_path / "june.jsonl", "no sir", range(40, 240))
    found = update(replace(settings, data=other, epochs=10, max_forgetting=0.0))
    assert not found.promoted and found.kept is not None and found.kept.growth > 0
    assert found.why.startswith("loss on remembered conversations grew by") and "0.0% at most" in found.why
    assert mine.current == 2 and not mine[3].passed and mine[3].why == found.why
    assert (settings.model / mine.place / MEMORY).read_bytes() == memory
    with pytest.raises(VersionError, match="may not serve"):
        mine.promote(3)


def test_what_harms_others_does_not_serve(settings: UpdateSettings, tmp_path: Path) -> None:
    general = chats(tmp_path / "general.jsonl", "!?", range(500, 530))
    found = update(replace(settings, general=general, hold=0.0, max_forgetting=0.0))
    assert not found.promoted and found.why.startswith("loss on general conversations grew by")
    few = chats(tmp_path / "few.jsonl", "!?", range(500, 503))
    assert not any(map(held_out, rows_of(few)))
    with pytest.raises(DataError, match="none of its 3 conversations is held out"):
        update(replace(settings, general=few))


def test_what_is_general_stays_nearer_to_the_base(settings: UpdateSettings, tmp_path: Path) -> None:
    settings = replace(settings, hold=100.0)  # what is random differs by little from anything
    general = chats(tmp_path / "general.jsonl", "!?", range(500, 530))
    apart = [row for row in rows_of(general) if held_out(row)]
    mine = Versions(settings.model, "domain", "math")
    found = []
    for where in (None, general):
        found.append(update(replace(settings, epochs=8, memory=0, max_forgetting=100.0, general=where)))
        mine.promote(1)
    alone, held = (change(settings, mine.path(one.version), apart) for one in found)
    assert held < alone / 2 and found[1].learnt.after < found[1].learnt.before


def test_what_learnt_nothing_does_not_serve(settings: UpdateSettings) -> None:
    found = update(replace(settings, learning_rate=1e-12))
    assert not found.promoted and found.why == "no step was better than none"
    assert Versions(settings.model, "domain", "math").current is None


def test_a_gain_that_chance_gives_is_told_so(settings: UpdateSettings, tmp_path: Path) -> None:
    def noise(name: str, numbers: range) -> Path:
        """Nothing can be learnt but which letters there are."""
        drawn, rows = random.Random(name), []
        for row in rows_of(chats(tmp_path / name, "", numbers)):
            row["messages"][1]["content"] = "".join(drawn.choices("abcd", k=8))
            rows.append(json.dumps(row) + "\n")
        (tmp_path / name).write_text("".join(rows))
        return tmp_path / name

    mine = Versions(settings.model, "domain", "math")
    first = update(replace(settings, data=noise("letters", range(200)), epochs=8))
    assert first.promoted and first.learnt.chance < 0.001
    more = replace(settings, learning_rate=1e-3, epochs=1, max_forgetting=100.0)
    # Whether chance gives any gain hangs on the CPU's rounding.
    tries = (update(replace(more, data=noise(f"more-{n}", range(300 + 50 * n, 350 + 50 * n)))) for n in range(12))
    found = next(one for one in tries if one.learnt.after < one.learnt.before)
    assert found.learnt.conversations > 5
    assert found.learnt.chance > 0.05 and mine[found.version].metrics["learnt"]["chance"] == found.learnt.chance


@pytest.mark.parametrize("alike", [2, 7])
def test_one_that_lost_counts(alike: int, settings: UpdateSettings, tmp_path: Path) -> None:
    rows = rows_of(settings.data)
    apart = [*filter(held_out, rows)][:alike]
    apart += [*filter(held_out, rows_of(chats(tmp_path / "other.jsonl", "hm", range(200, 240))))][:1]
    data = tmp_path / "new.jsonl"
    new = [*(row for row in rows if not held_out(row)), *apart]
    data.write_text("".join(json.dumps(row) + "\n" for row in new))
    found = update(replace(settings, data=data))
    mine = Versions(settings.model, "domain", "math")
    before, after = ([loss(settings, mine.path(n), [row]) for row in apart] for n in (1, 2))
    assert [now < was for was, now in zip(before, after, strict=True)] == [True] * alike + [False]
    assert found.learnt.conversations == alike + 1 and found.learnt.after < found.learnt.before
    assert found.learnt.chance == 2 / 2 ** (alike + 1)


def test_without_a_memory_no_text_stays(settings: UpdateSettings, tmp_path: Path) -> None:
    update(settings)
    file = settings.model / Versions(settings.model, "domain", "math").place / MEMORY
    assert file.is_file()
    found = update(replace(settings, data=chats(tmp_path / "june.jsonl", "no sir", range(100, 140)), memory=0))
    assert found.promoted and found.replayed == 0 and found.kept is None and not file.exists()
    assert not [one for one in settings.model.rglob("*") if one.is_file() and b"no sir" in one.read_bytes()]


def test_what_was_remembered_is_not_new(settings: UpdateSettings) -> None:
    update(settings)
    with pytest.raises(DataError, match="holds 0 new conversations"):
        update(settings)


def test_bad_input_is_named(settings: UpdateSettings, tmp_path: Path) -> None:
    few = tmp_path / "few.jsonl"
    lines = [json.dumps(row) for row in rows_of(settings.data) if not held_out(row)]
    few.write_text("\n".join(lines[:3]))
    with pytest.raises(DataError, match="3 new conversations, 0 of which are held out"):
        update(replace(settings, data=few))
    with pytest.raises(DataError, match="every held-out conversation is over 40 tokens long"):
        rows = [row for row in rows_of(settings.data) if not held_out(row)]
        long = [{"messages": [*row["messages"], *row["messages"]]} for row in rows_of(settings.data)]
        few.write_text("".join(json.dumps(r) + "\n" for r in [*rows, *filter(held_out, long)]))
        update(replace(remembering(settings), data=few, max_length=40))
    bad = tmp_path / "bad.jsonl"
    for line in ("nothing", '{"messages": []}', '{"messages": [{"role": "user", "content": "hi"}]}', "[]", '{"x": 1}'):
        bad.write_text(settings.data.read_text() + line + "\n")
        with pytest.raises(DataError, match=r"bad\.jsonl, line 41 is no conversation"):
            update(replace(settings, data=bad))
    with pytest.raises(DataError, match="cannot be read"):
        update(replace(settings, data=tmp_path / "nothing.jsonl"))
    with pytest.raises(VersionError, match="no adapter 'ada'; it has math, code"):
        update(replace(settings, name="ada"))
    with pytest.raises(ConfigError, match="must not be negative"):
        replace(settings, max_forgetting=-0.1)
    mine = Versions(settings.model, "domain", "math")
    (settings.model / mine.place).mkdir(parents=True, exist_ok=True)
    with FileLock(settings.model / mine.place / ".update.lock"), pytest.raises(VersionError, match="is running"):
        update(settings)
    assert mine.all() == [] and mine.current is None


def test_the_command_tells_and_its_exit_code_says_whether_it_serves(settings: UpdateSettings) -> None:
    line = ["update", "domain", "math", "--data", str(settings.data), "--model", str(settings.model)]
    found = CliRunner().invoke(app, [*line, "--learning-rate", "0.03", "--epochs", "4"])
    assert found.exit_code == 0, found.output
    assert "Version 2 serves" in found.output and "nothing was remembered yet" in found.output
    assert "learnt" in found.output and "nats a token" in found.output
    other = chats(settings.data.with_name("june.jsonl"), "no sir", range(100, 140))
    line[line.index(str(settings.data))] = str(other)
    found = CliRunner().invoke(app, [*line, "--learning-rate", "1e-12", "--json"])
    assert found.exit_code == 1 and json.loads(found.stdout)["promoted"] is False
