"""LoRA Soups: the folder is the weighed sum that was trained, only the weights learn, and the base stays as it was."""

import copy
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from molora import MoLoRAModel, Stack, StackLayer, factors
from molora.adapter import Adapter
from molora.cli import app
from molora.errors import ConfigError, DataError, NonFiniteError
from molora_training import soup
from molora_training.data import IGNORED, Encoded, collate
from molora_training.evaluate import losses_of
from molora_training.peft_routers import Logits
from molora_training.soup import train_soup
from tests.conftest import DEVICE, make_base, write_adapter
from tests.unit.spoken import make_spoken


def conversation(seed: int, domain: int, length: int = 24) -> Encoded:
    """Random tokens of the domain's own half of the vocabulary, the last two thirds of them an answer."""
    first = 3 + 47 * domain
    ids = torch.randint(first, first + 47, (length,), generator=torch.Generator().manual_seed(seed))
    labels = torch.where(torch.arange(length) < length // 3, IGNORED, ids)
    return Encoded(ids, labels, torch.zeros_like(ids), torch.full_like(ids, domain))


ROWS = [conversation(seed, seed % 2, 20 + seed) for seed in range(8)]


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("two")
    return {name: write_adapter(make_base(), folder / name, seed) for seed, name in enumerate(("math", "code"))}


@torch.no_grad()
def taught(folders: Sequence[Path]) -> list[Encoded]:
    """ROWS whose answers are what their domain's adapter says."""
    found = []
    for row in ROWS:
        teacher = Logits(PeftModel.from_pretrained(make_base(), str(folders[int(row.domain_ids[0])])))
        said = teacher(collate([row], 0).to(DEVICE))[0].argmax(-1).cpu()
        found.append(replace(row, labels=torch.where(row.labels == IGNORED, IGNORED, said.roll(1))))
    return found


def assert_as_new(base: Any) -> None:
    """Bitwise the base of ``make_base``, with nothing on it."""
    new = make_base()
    assert [name for name, _ in base.named_modules()] == [name for name, _ in new.named_modules()]
    assert all(type(module) is type(new.get_submodule(name)) for name, module in base.named_modules())
    assert not hooks(base)
    assert all("forward" not in vars(module) for module in base.modules())
    assert all(torch.equal(tensor, new.state_dict()[name]) for name, tensor in base.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in base.parameters())
    assert not any(module.training for module in base.modules())
    assert set(vars(base)) - {"_output_capturing_hooks_installed"} == set(vars(new))
    for name in ("use_cache", "_attn_implementation"):
        assert getattr(base.config, name) == getattr(new.config, name)


def hooks(base: Any) -> list[Any]:
    """All but those by which transformers itself gives hidden states, which stay once they were asked for."""
    found = [hook for m in base.modules() for hook in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return [hook for hook in found if not getattr(hook, "__module__", "").startswith("transformers")]


@torch.no_grad()
def test_the_start_is_the_mean_of_the_adapters(adapters: dict[str, Path], tmp_path: Path) -> None:
    """Adapters of several ranks, scales and targets: by plain PEFT, by MoLoRA's reader, and run by both."""
    base = make_base()
    out = train_soup(base, adapters, ROWS, tmp_path / "soup", 0, steps=0)
    assert_as_new(base)
    expected: dict[str, torch.Tensor] = {}
    for folder in adapters.values():
        for name, own in Adapter.load(folder).modules.items():
            expected[name] = expected.get(name, 0) + own.scale * (own.B.double() @ own.A.double()) / len(adapters)
    read = Adapter.load(out).modules
    by_peft = PeftModel.from_pretrained(make_base(), str(out))
    layers = {
        name.removeprefix("base_model.model."): module
        for name, module in by_peft.named_modules()
        if hasattr(module, "lora_A")
    }
    assert read.keys() == expected.keys() == layers.keys()
    assert len({own.rank for own in read.values()}) > 1
    for name, delta in expected.items():
        own, layer = read[name], layers[name]
        assert own.scale == layer.scaling["default"] == 1
        assert (own.B.double() @ own.A.double() - delta).norm() <= 1e-5 * delta.norm()
        product = layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
        assert (product.cpu() - delta).norm() <= 1e-5 * delta.norm()
    batch = collate(ROWS, 0).to(DEVICE)
    ours = MoLoRAModel.from_base(make_base(), Stack([StackLayer("domain", {"soup": out})])).eval()
    logits = ours(batch.input_ids, batch.attention_mask, selection={"domain": "soup"}, use_cache=False).logits
    there = batch.attention_mask.bool()
    assert torch.allclose(logits[there], Logits(by_peft)(batch)[there], atol=1e-4)


@torch.no_grad()
def test_what_is_trained_is_what_is_written(adapters: dict[str, Path], tmp_path: Path) -> None:
    base, loaded = make_base(), [Adapter.load(folder) for folder in adapters.values()]
    modules = list(dict.fromkeys(name for adapter in loaded for name in adapter.modules))
    alphas = torch.randn(len(modules), len(loaded), generator=torch.Generator().manual_seed(0))
    batch = collate(ROWS, 0).to(DEVICE)
    with soup._added(base, loaded, modules, alphas.to(DEVICE)):
        inside = base(batch.input_ids, attention_mask=batch.attention_mask).logits
    soup._write(loaded, modules, alphas.double(), tmp_path / "soup")
    outside = Logits(PeftModel.from_pretrained(base, str(tmp_path / "soup")))(batch)
    there = batch.attention_mask.bool()
    assert torch.allclose(inside[there], outside[there], atol=1e-4)


def test_training_lowers_the_loss_and_changes_the_weights_alone(two: dict[str, Path], tmp_path: Path) -> None:
    base, losses, rows = make_base(), [], taught([two["math"], two["math"]])
    for steps in (0, 40):
        out = train_soup(
            base, two, rows, tmp_path / f"soup{steps}", 0, steps=steps, learning_rate=0.05, batch_tokens=96
        )
        assert_as_new(base)
        model = PeftModel.from_pretrained(make_base(), str(out))
        losses.append(losses_of(Logits(model), rows, 2, 0, DEVICE).mean)
    assert losses[1] < losses[0] - 0.1
    parts = [Adapter.load(folder).modules for folder in two.values()]
    alphas = []
    for name, own in Adapter.load(tmp_path / "soup40").modules.items():
        assert torch.equal(own.A, torch.cat([part[name].A for part in parts]))
        for part, B in zip(parts, own.B.split([part[name].rank for part in parts], 1), strict=True):
            start = part[name].B * part[name].scale
            alpha = (B * start).sum() / start.square().sum()
            assert torch.allclose(B, alpha * start, rtol=1e-4, atol=1e-7)
            alphas.append(float(alpha))
    assert len({round(alpha, 4) for alpha in alphas}) > len(alphas) // 2  # each module's and adapter's own
    again = train_soup(base, two, rows, tmp_path / "again", 0, steps=40, learning_rate=0.05, batch_tokens=96)
    if DEVICE.type == "cpu":
        files = [folder / "adapter_model.safetensors" for folder in (again, tmp_path / "soup40")]
        assert files[0].read_bytes() == files[1].read_bytes()  # the seed decides


def test_modes_and_flags_come_back(two: dict[str, Path], tmp_path: Path) -> None:
    base = make_base().train()
    base.lm_head.eval()
    base.model.norm.requires_grad_(False)
    train_soup(base, two, ROWS, tmp_path / "soup", 0, steps=1)
    assert base.training and base.model.training and not base.lm_head.training
    frozen = {name for name, parameter in base.named_parameters() if not parameter.requires_grad}
    assert frozen == {"model.norm.weight"}


def test_a_failure_leaves_what_was_there(two: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = train_soup(make_base(), two, ROWS, tmp_path / "soups" / "soup", 0, steps=0)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    base = make_base()
    with torch.no_grad():
        base.model.norm.weight[0] = float("nan")
    poisoned = copy.deepcopy(base.state_dict())
    with pytest.raises(NonFiniteError, match=r"became nan at step 1.*learning_rate"):
        train_soup(base, two, ROWS, out, 0, steps=3)
    assert all(torch.equal(t.isnan(), poisoned[n].isnan()) for n, t in base.state_dict().items())
    assert not hooks(base)
    assert all(parameter.requires_grad for parameter in base.parameters())

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(factors, "save_file", fail)
    with pytest.raises(OSError, match="full"):
        train_soup(make_base(), two, ROWS, out, 0, steps=1)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before
    assert list(out.parent.iterdir()) == [out]


def test_what_does_not_fit_is_refused(two: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two adapters or more"):
        train_soup(make_base(), {"math": two["math"]}, ROWS, tmp_path / "out", 0)
    with pytest.raises(DataError, match="nothing to learn from"):
        train_soup(make_base(), two, [], tmp_path / "out", 0)
    assert not list(tmp_path.iterdir())


def test_the_command_says_what_it_brought(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_spoken(tmp_path / "adapters")
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(20)
    model.base.save_pretrained(tmp_path / "base")
    model.tokenizer.save_pretrained(tmp_path / "base")  # type: ignore[union-attr]
    turns = [{"role": "user", "content": "Colour?"}, {"role": "assistant", "content": "blue"}]
    for split in ("train", "validation"):
        line = {"id": "a", "domain": "math", "split": split, "messages": turns}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
    given = [f"{split}={tmp_path / f'{split}.jsonl'}" for split in ("train", "validation")]
    given += [f"adapters.{name}={tmp_path / 'adapters' / name}" for name in ("math", "code")]
    given += [f"out={tmp_path / 'soup'}", f"base={tmp_path / 'base'}", "steps=30", "dtype=float32"]
    app(["train", "soup", *given, "--json"], standalone_mode=False)
    found = json.loads(capsys.readouterr().out)
    losses = found["validation"]
    assert list(losses) == ["base", "math", "code", "even weights", "soup"]
    assert losses["soup"] < losses["even weights"] - 0.01
    assert json.loads((tmp_path / "soup/metrics.json").read_text())["validation"] == losses
    assert Adapter.load(tmp_path / "soup").ranks == [8]
    with pytest.raises(ConfigError, match="cannot be called 'soup'"):
        app(["train", "soup", *given, f"adapters.soup={tmp_path / 'adapters' / 'math'}"], standalone_mode=False)
    with pytest.raises(ConfigError, match="is there already"):
        app(["train", "soup", *given], standalone_mode=False)
