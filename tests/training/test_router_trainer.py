"""The router trainer on a tiny random model: it learns the domains, resumes exactly, spreads over processes."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from molora import MoLoRAModel, RouterConfig
from molora.errors import ConfigError, DataError, NonFiniteError, RouterError
from molora.router import NEVER, SAMPLES
from molora_training import router, router_objective
from molora_training.data import IGNORED, collate, encode
from molora_training.distillation import Teacher
from molora_training.router import load_model, train
from molora_training.router_objective import Labels, RouterObjective
from molora_training.router_settings import LossWeights, RouterTrainSettings
from molora_training.settings import load_settings
from tests.unit.spoken import make_spoken

TEXTS = {"math": "12+34=46 78*9=702 0123", "code": "def f(x): return x", "general": "hello you, good day"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RouterTrainSettings:
    monkeypatch.chdir(tmp_path)
    return make_settings(tmp_path)


def make_settings(folder: Path) -> RouterTrainSettings:
    """Two adapters and text without a domain, whose bytes tell them apart."""
    model = make_spoken(folder / "adapters")
    model.base.save_pretrained(folder / "base")
    model.tokenizer.save_pretrained(folder / "base")
    model.stack.save(folder / "stack.yaml")
    data = folder / "data"
    data.mkdir()
    for domain, text in TEXTS.items():
        for split in ("train", "validation"):
            rows = [_row(domain, split, n, text[n % 5 :] + text[: n % 5]) for n in range(12)]
            (data / f"{domain}.{split}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return RouterTrainSettings(
        model=folder / "stack.yaml",
        out=folder / "out",
        data=data,
        base=str(folder / "base"),
        router=RouterConfig(width=16, hidden=32, units=16),
        mixed=24,
        documents=0,
        in_a_turn=0,
        asides=0,
        epochs=4,
        max_steps=12,
        batch_tokens=1024,
        learning_rate=1e-2,
        checkpoint_every=4,
        dtype="float32",
    )


def test_a_command_that_says_nothing_else_trains_the_best_of_the_table() -> None:
    found = load_settings(RouterTrainSettings, None, ["model=a", "out=b", "router.width=64"])
    assert found.router == RouterConfig(reads=(0, 4), hidden=512, width=64)


def test_a_router_does_not_read_where_no_layer_is(settings: RouterTrainSettings) -> None:
    with pytest.raises(RouterError, match="reads at layer 40, and the base has 3 layers"):
        train(dataclasses.replace(settings, router=RouterConfig(reads=(0, 40))), command="")


def _row(domain: str, split: str, number: int, text: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]
    return {"id": f"{domain}-{number}", "domain": domain, "split": split, "form": "bare", "messages": messages}


@pytest.mark.parametrize("reads", [(0,), (1,), (0, 1)], ids=str)
def test_it_learns_which_domain(reads: tuple[int, ...], settings: RouterTrainSettings) -> None:
    settings = dataclasses.replace(settings, router=dataclasses.replace(settings.router, reads=reads))
    settings = dataclasses.replace(settings, epochs=60, max_steps=100)
    metrics = train(settings, command="molora train router")
    assert metrics["validation"]["right/domain"] > 0.9
    model = MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)
    with torch.no_grad():
        for domain, text in TEXTS.items():
            question = model.encode([{"role": "user", "content": text}])
            slots = model(**question, output_routes=True).routes.slots[0, -len(text) :, 0]
            wanted = -1 if domain == "general" else model.slots[f"domain/{domain}"]
            assert (slots == wanted).float().mean() > 0.8
    kept = json.loads((settings.out / "router.metrics.json").read_text())
    assert kept["command"] == "molora train router" and kept["settings"]["data"] == "data"


def test_base_and_adapters_stay_and_untaught_rows_are_silent(settings: RouterTrainSettings) -> None:
    before = load_file(settings.data.parent / "base" / "model.safetensors")
    train(settings)
    weights = load_file(settings.out / "router.safetensors")
    model = MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)
    after = model.base.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    for name in ("math", "code"):
        file = "adapter_model.safetensors"
        copied = (settings.out / "adapters" / "domain" / name / file).read_bytes()
        assert copied == (settings.data.parent / "adapters" / name / file).read_bytes()
    samples = model.router.parts[0].samples
    domains = [model.router.rows.index(name) for name in ("domain/math", "domain/code", "domain/none")]
    assert samples.rows.bincount()[domains].tolist() == [SAMPLES] * 3 and set(samples.rows.tolist()) == set(domains)
    logits = model.router.parts[0](samples.features.float())[:, domains]
    right = torch.tensor(domains)[logits.argmax(-1)] == samples.rows
    assert right.float().mean() > 0.5  # they are what the router tells them by
    silent = model.router.rows.index("user/*")  # no user has data here
    assert float(weights["parts.0.output.bias"][silent]) == NEVER


def test_the_next_token_loss_reaches_the_router(settings: RouterTrainSettings) -> None:
    loss = LossWeights(lm=1.0, label=0.0, balance=0.01)
    settings = dataclasses.replace(settings, loss=loss, max_steps=4, checkpoint_every=2)
    metrics = train(settings)
    assert {"lm", "label", "balance", "z", "entropy"} <= set(metrics["validation"])
    weights = load_file(settings.out / "router.safetensors")
    again = train(dataclasses.replace(settings, out=settings.out.with_name("longer"), max_steps=8))
    other = load_file(settings.out.with_name("longer") / "router.safetensors")
    assert not torch.equal(weights["parts.0.output.weight"], other["parts.0.output.weight"])
    assert again["steps"] == 8


def test_short_answers_weigh_as_much_as_long_ones(settings: RouterTrainSettings) -> None:
    train(dataclasses.replace(settings, max_steps=1))
    model = MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)
    domains, question = ["math", "code"], {"role": "user", "content": "?"}
    rows = [
        encode([question, {"role": "assistant", "content": answer}], model.tokenizer, [domain], domains)
        for domain, answer in (("math", "4"), ("code", "return x and y, " * 4))
    ]
    labels, weights = Labels(model, domains), router.answer_weights(rows, 3)
    tokens = [int((row.labels != IGNORED).sum()) for row in rows]
    assert weights.tolist() == pytest.approx([sum(tokens) / tokens[0] / 3, sum(tokens) / tokens[1] / 3, 0])
    equal = {layer: torch.ones(len(found)) for layer, found in labels.rows.items()}
    objective = RouterObjective(model, labels, LossWeights(lm=1.0, label=0.0, z=0.0), equal, 0, weights)
    with torch.no_grad():
        found = objective(collate(rows, 0))["lm"]
        losses = []
        for row in rows:
            logits = model(row.input_ids[None], selection=labels.selection(model)).logits[0, :-1].double()
            wanted = row.labels[1:]
            losses.append(nn.functional.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum"))
    assert float(found) == pytest.approx(float(losses[0] / tokens[0] + losses[1] / tokens[1]) / 2, rel=1e-5)


def test_it_learns_from_what_each_adapter_writes_best(settings: RouterTrainSettings) -> None:
    loss = LossWeights(label=0.0, distil=1.0)
    settings = dataclasses.replace(settings, loss=loss, epochs=60, max_steps=60, checkpoint_every=60)
    metrics = train(settings)
    assert metrics["validation"]["distil"] < math.log(3)  # of a router that finds all three equally likely
    model = MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)
    messages = [{"role": "user", "content": TEXTS["code"]}, {"role": "assistant", "content": TEXTS["code"][::-1]}]
    row = collate([encode(messages, model.tokenizer, ["code"])], 0)
    taught = Teacher(model, ["domain"])(row)["domain"][0]
    rows = [model.router.rows.index(f"domain/{name}") for name in ("math", "code", "none")]
    with torch.no_grad():
        logits = model(row.input_ids, output_routes=True).routes.logits[0][0, :, rows]
    said = taught.sum(-1) > 0
    assert (logits.argmax(-1) == taught.argmax(-1))[said].float().mean() > 0.6


def test_what_each_adapter_writes_best_is_its_own_loss_alone(settings: RouterTrainSettings) -> None:
    model = load_model(settings, torch.device("cpu"))
    messages = [{"role": "user", "content": "12+34?"}, {"role": "assistant", "content": "46, def f(x)"}]
    row = collate([encode(messages, model.tokenizer, ["math"])], 0)
    taught = Teacher(model, ["domain", "user"])(row)["domain"]
    losses = []
    for name in ("math", "code", None):
        chosen = {layer.name: None for layer in model.stack.layers} | {"domain": name}
        with torch.no_grad():
            logits = model(row.input_ids, row.attention_mask, selection=chosen).logits[:, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits.mT, row.input_ids[:, 1:], reduction="none"))
    wanted = (-torch.stack(losses, -1)).softmax(-1)
    asked = row.labels[:, 1:] == IGNORED
    torch.testing.assert_close(taught[:, :-1][~asked], wanted[~asked])
    assert bool((taught[:, :-1][asked] == 0).all()) and bool((taught[:, -1] == 0).all())


@pytest.mark.parametrize("general", [True, False], ids=["with text of none", "without"])
def test_it_learns_that_none_is_right_at_the_start(general: bool, settings: RouterTrainSettings) -> None:
    if not general:
        for file in settings.data.glob("general.*"):
            file.unlink()
    settings = dataclasses.replace(settings, null_start=3, epochs=60, max_steps=100)
    train(settings)
    model = MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)
    for domain in ("math", "code"):
        asked = model.encode([{"role": "user", "content": TEXTS[domain]}])
        with torch.no_grad():
            slots = model(**asked, output_routes=True).routes.slots[0, :, 0]
        assert slots[:3].tolist() == [-1] * 3
        assert (slots[-len(TEXTS[domain]) :] == model.slots[f"domain/{domain}"]).float().mean() > 0.8
    null = model.router.rows.index("domain/none")
    assert int((model.router.parts[0].samples.rows == null).sum()) == SAMPLES


def test_what_goes_on_from_a_saved_router_leaves_as_many_starts_to_the_base(settings: RouterTrainSettings) -> None:
    assert settings.starts == 0
    train(dataclasses.replace(settings, null_start=3, max_steps=1))
    later = dataclasses.replace(settings, model=settings.out, start="saved", out=settings.out / "later", max_steps=1)
    assert later.starts == 3 and dataclasses.replace(later, null_start=0).starts == 0
    assert train(later)["settings"]["null_start"] == 3


def test_each_epoch_mixes_anew_and_all_examples_come_round(settings: RouterTrainSettings) -> None:
    model = load_model(settings, torch.device("cpu"))
    _, epochs, held_out = router._data(settings, model)
    texts = [[model.tokenizer.decode(row.input_ids) for row in rows] for rows in epochs]
    mixed, singles = [rows[:24] for rows in texts], [rows[24:] for rows in texts]
    assert len(texts) == settings.epochs and {len(rows) for rows in texts} == {24 + 3 * 3}
    assert all(len(set(mixed[0]) & set(rows)) < 6 for rows in mixed[1:])  # of 24; by chance a few are the same
    assert len({text for rows in singles for text in rows}) == len({*_texts(settings)})
    _, again, same = router._data(dataclasses.replace(settings, epochs=1), model)
    assert [row.input_ids.tolist() for row in again[0]] == [row.input_ids.tolist() for row in epochs[0]]
    assert [row.input_ids.tolist() for row in same] == [row.input_ids.tolist() for row in held_out]


def _texts(settings: RouterTrainSettings) -> list[str]:
    files = settings.data.glob("*.train.jsonl")
    return [json.loads(line)["messages"][0]["content"] for file in files for line in file.read_text().splitlines()]


def test_resumed_equals_uninterrupted(settings: RouterTrainSettings) -> None:
    whole = train(dataclasses.replace(settings, out=settings.out.with_name("whole")))

    def interrupt(step: int, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_step=interrupt)
    assert not settings.out.exists() and (settings.work / "state.safetensors").is_file()
    with pytest.raises(ConfigError, match="other settings"):
        train(dataclasses.replace(settings, learning_rate=0.1))
    steps: list[int] = []
    resumed = train(settings, on_step=lambda step, loss: steps.append(step))
    assert steps[0] == 5  # the last checkpoint was at 4
    assert abs(resumed["validation"]["loss"] - whole["validation"]["loss"]) < 1e-5
    mine, theirs = (load_file(out / "router.safetensors") for out in (settings.out, settings.out.with_name("whole")))
    assert all(torch.allclose(mine[name], theirs[name], atol=1e-6) for name in theirs)


def test_going_on_from_a_saved_router(settings: RouterTrainSettings) -> None:
    first = train(settings)
    again = dataclasses.replace(settings, model=settings.out, out=settings.out.with_name("more"), start="saved")
    assert train(again)["validation"]["loss"] < first["validation"]["loss"]


def test_two_processes_are_one(settings: RouterTrainSettings, tmp_path: Path) -> None:
    reads = dataclasses.replace(settings.router, reads=0)
    settings = dataclasses.replace(
        settings, max_steps=6, router=reads, epochs=3, batch_tokens=512, checkpoint_every=200
    )
    alone = train(dataclasses.replace(settings, out=settings.out.with_name("alone")))
    overrides = [f"{name}={getattr(settings, name)}" for name in ("model", "out", "data", "base", "mixed", "max_steps")]
    overrides += ["documents=0", "in_a_turn=0", "asides=0", "router.reads=0"]
    overrides += [
        "router.width=16",
        "router.hidden=32",
        "router.units=16",
        "batch_tokens=512",
        "dtype=float32",
        "learning_rate=0.01",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "-m", "molora", "train", "router", "--json", *overrides],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    metrics = json.loads((settings.out / "router.metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 6
    assert metrics["validation"] == pytest.approx(alone["validation"], rel=1e-5)
    MoLoRAModel.from_pretrained(settings.out, base=settings.base, dtype=torch.float32)


def test_data_that_does_not_fit(settings: RouterTrainSettings, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"<adapter>.train.jsonl"):
        train(dataclasses.replace(settings, data=tmp_path / "empty"))
    (settings.data / "math.train.jsonl").write_text('{"id": 3}\n')
    with pytest.raises(DataError, match="math.train.jsonl"):
        train(settings)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_domain_without_an_example_is_named(settings: RouterTrainSettings, split: str) -> None:
    (settings.data / f"math.{split}.jsonl").write_text("")
    with pytest.raises(DataError, match=rf"math\.{split}\.jsonl holds no example"):
        train(settings)


def test_a_label_that_the_stack_does_not_have_is_named_with_its_row(settings: RouterTrainSettings) -> None:
    row = _row("chemistry", "train", 5, "H2O")
    with (settings.data / "math.train.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    with pytest.raises(DataError, match=rf"math.train.jsonl: example '{row['id']}' is of domain 'chemistry', not of"):
        train(settings)


def test_questions_that_need_two_adapters_need_both_of_them(settings: RouterTrainSettings) -> None:
    _write_both(settings.data)
    with pytest.raises(DataError, match=r"'law and arithmetic' need adapters for law and math"):
        train(dataclasses.replace(settings, both=2))


def test_questions_that_need_two_adapters_are_learnt(
    settings: RouterTrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("molora_training.router.KINDS", {"math in code": ("math", "code")})
    without = train(dataclasses.replace(settings, out=settings.out.with_name("without"), max_steps=1))
    _write_both(settings.data)
    assert train(dataclasses.replace(settings, both=2, max_steps=1))["train_conversations"] == (
        without["train_conversations"] + settings.epochs
    )


def _write_both(data: Path) -> None:
    turns = [{"role": "user", "content": "1+1, as code"}, {"role": "assistant", "content": "# two\nreturn 2"}]
    parts = [[["1+1, ", 0, False], ["as code", 1, False]], [["# two\n", 0, True], ["return 2", 1, True]]]
    row = {"id": "both", "messages": turns, "domains": ["math", "code"], "parts": parts}
    for split in ("train", "validation"):
        (data / f"math-in-code.{split}.jsonl").write_text(json.dumps({**row, "split": split}) + "\n")


def test_a_loss_that_is_no_number_stops_it(settings: RouterTrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    train(dataclasses.replace(settings, out=settings.out.with_name("good")))
    monkeypatch.setitem(router_objective._SIDE, "z", lambda logits, real: logits.sum() * float("nan"))
    with pytest.raises(NonFiniteError, match="step 1"):
        train(settings)
    assert not settings.out.exists()


def test_a_loss_that_is_no_number_later_leaves_the_last_checkpoint(
    settings: RouterTrainSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(dataclasses.replace(settings, out=settings.out.with_name("whole")))
    step, rule = [0], router_objective._SIDE["z"]

    def broken(logits: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        return rule(logits, real) * (float("nan") if step[0] >= 6 and torch.is_grad_enabled() else 1.0)

    with monkeypatch.context() as here:
        here.setitem(router_objective._SIDE, "z", broken)
        with pytest.raises(NonFiniteError, match="step 7"):
            train(settings, on_step=lambda done, _: step.__setitem__(0, done))
    steps: list[int] = []
    resumed = train(settings, on_step=lambda done, _: steps.append(done))
    assert steps[0] == 5  # the last checkpoint was at 4
    assert abs(resumed["validation"]["loss"] - whole["validation"]["loss"]) < 1e-5
