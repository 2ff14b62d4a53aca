"""The adapter trainer on a tiny random Llama: it learns, resumes exactly, spreads over processes, stops on NaN."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from molora.errors import AdapterMismatchError, AdapterNotFoundError, ConfigError, NonFiniteError
from molora_training import adapter_run
from molora_training.adapter import train
from molora_training.adapter_settings import AdapterTrainSettings, DataFiles, LoraShape
from molora_training.data import Batch


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("base"))


def make_base(folder: Path) -> Path:
    """A random two-layer Llama with a byte tokenizer that knows ChatML's marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<|im_start|>", "<|im_end|>", *alphabet])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        eos_token_id=1,
        bos_token_id=0,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AdapterTrainSettings:
    monkeypatch.chdir(tmp_path)
    return make_settings(base, tmp_path)


def make_settings(base: Path, folder: Path) -> AdapterTrainSettings:
    """Twelve steps on sums of one digit; dropout is on, so that resuming has random numbers to get right."""
    files = {}
    for split, numbers in (("train", range(8)), ("validation", range(8, 10))):
        files[split] = folder / f"sums.{split}.jsonl"
        with files[split].open("w") as sink:
            for a in numbers:
                for b in range(0, 10, 2):
                    messages = [
                        {"role": "user", "content": f"{a}+{b}"},
                        {"role": "assistant", "content": f"The sum is {a + b}"},
                    ]
                    row = {"id": f"{a}-{b}", "domain": "sums", "split": split, "form": "chat", "messages": messages}
                    sink.write(json.dumps(row) + "\n")
    return AdapterTrainSettings(
        out=folder / "adapters" / "domain" / "sums",
        data=DataFiles(train=files["train"], validation=files["validation"], source="made here", licence="CC0-1.0"),
        lora=LoraShape(rank=4, alpha=8, dropout=0.1),
        base=str(base),
        learning_rate=1e-2,
        epochs=9,
        max_steps=12,
        batch_tokens=1024,
        checkpoint_every=4,
        dtype="float32",
    )


def test_learns_and_writes_a_peft_folder(settings: AdapterTrainSettings) -> None:
    metrics = train(settings, command="molora train adapter")
    assert metrics["validation_loss"] < metrics["base_validation_loss"] - 0.2
    assert json.loads((settings.out / "metrics.json").read_text())["validation_loss"] == metrics["validation_loss"]
    card = (settings.out / "README.md").read_text()
    assert "CC0-1.0" in card and "molora train adapter" in card
    with safe_open(settings.out / "adapter_model.safetensors", "pt") as weights:
        assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.bfloat16}
    config = json.loads((settings.out / "adapter_config.json").read_text())
    assert config["r"] == 4 and config["base_model_name_or_path"] == settings.base
    assert sorted(path.name for path in settings.out.parent.iterdir()) == ["sums"]
    base = AutoModelForCausalLM.from_pretrained(settings.base)
    loaded = PeftModel.from_pretrained(base, settings.out)
    assert any(p.abs().sum() > 0 for name, p in loaded.named_parameters() if "lora_B" in name)
    assert list((settings.work / "tensorboard").glob("events.*"))


def test_resumed_equals_uninterrupted(settings: AdapterTrainSettings) -> None:
    whole = train(dataclasses.replace(settings, out=settings.out.with_name("whole")))

    def interrupt(step: int, loss: float) -> None:
        if step == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_step=interrupt)
    assert not settings.out.exists()
    seen: list[int] = []
    resumed = train(settings, on_step=lambda step, loss: seen.append(step))
    assert seen == list(range(5, 13))  # the last checkpoint was at step 4
    assert resumed["train_losses"] == pytest.approx(whole["train_losses"], abs=1e-5)
    assert resumed["validation_loss"] == pytest.approx(whole["validation_loss"], abs=1e-5)
    ours, theirs = (load_file(m / "adapter_model.safetensors") for m in (settings.out, settings.out.with_name("whole")))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_a_batch_in_parts_teaches_the_same(settings: AdapterTrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = dataclasses.replace(settings, max_steps=3, lora=LoraShape(rank=4, alpha=8, dropout=0.0))
    sizes: list[int] = []
    loss = adapter_run.Run.summed_loss

    def watched(run: adapter_run.Run, model: Any, batch: Batch) -> torch.Tensor:
        if model.training:
            sizes.append(len(batch.input_ids))
        return loss(run, model, batch)

    monkeypatch.setattr(adapter_run.Run, "summed_loss", watched)
    found = {}
    for name, most in (("whole", 1 << 20), ("parts", 128)):
        monkeypatch.setattr(adapter_run, "CPU_TOKENS", most)
        found[name] = train(dataclasses.replace(plain, out=settings.out.with_name(name)))
        assert (len(sizes) == 3) == (name == "whole") and max(sizes) <= most // 32
        sizes.clear()
    assert found["parts"]["train_losses"] == pytest.approx(found["whole"]["train_losses"], rel=1e-5)
    assert found["parts"]["validation_loss"] == pytest.approx(found["whole"]["validation_loss"], rel=1e-5)


def test_checkpoint_of_other_settings_is_refused(settings: AdapterTrainSettings) -> None:
    def interrupt(step: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, on_step=interrupt)
    other = dataclasses.replace(settings, learning_rate=1e-3, max_steps=1)
    with pytest.raises(ConfigError, match="other settings"):
        train(other)
    assert train(other, resume=False)["steps"] == 1


def test_loss_that_is_not_finite_stops(settings: AdapterTrainSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = adapter_run.Run.summed_loss
    calls: list[int] = []

    def broken(self: adapter_run.Run, *arguments: object) -> torch.Tensor:
        calls.append(1)
        loss = honest(self, *arguments)  # type: ignore[arg-type]
        return loss * float("nan") if len(calls) == 8 else loss

    monkeypatch.setattr(adapter_run.Run, "summed_loss", broken)
    with pytest.raises(NonFiniteError, match=r"became nan .* step"):
        train(settings)
    assert not settings.out.exists()
    best = load_file(settings.work / "best.safetensors")
    assert all(tensor.isfinite().all() for tensor in best.values())


def test_two_processes_learn_the_same_adapter(settings: AdapterTrainSettings, tmp_path: Path) -> None:
    alone = dataclasses.replace(
        settings, out=settings.out.with_name("alone"), lora=LoraShape(rank=4, alpha=8), max_steps=4, batch_tokens=960
    )
    expected = train(alone)
    assert expected["steps"] == 4
    script = tmp_path / "launched.py"
    script.write_text(
        "import sys\n"
        "from molora_training.adapter import train\n"
        "from molora_training.adapter_settings import AdapterTrainSettings\n"
        "from molora_training.settings import load_settings\n"
        "train(load_settings(AdapterTrainSettings, None, sys.argv[1:]))\n"
    )
    overrides = [f"out={settings.out}", f"base={settings.base}", "dtype=float32", "epochs=9", "max_steps=4"]
    overrides += [f"data.train={settings.data.train}", f"data.validation={settings.data.validation}"]
    overrides += ["lora.rank=4", "lora.alpha=8", "learning_rate=1e-2", "batch_tokens=960"]
    # On the CPU `accelerate launch` spreads only through MPI; torchrun needs nothing and sets the same variables.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    paths = [str(path) for path in sys.path if path]
    done = subprocess.run(
        [*launch, str(script), *overrides],
        cwd=tmp_path,
        env=os.environ
        | {"PYTHONPATH": os.pathsep.join(paths), "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-8000:]
    metrics = json.loads((settings.out / "metrics.json").read_text())
    assert metrics["processes"] == 2 and metrics["steps"] == 4
    assert metrics["train_losses"] == pytest.approx(expected["train_losses"], abs=1e-5)
    assert metrics["validation_loss"] == pytest.approx(expected["validation_loss"], abs=1e-5)


def test_goes_on_from_an_adapter(settings: AdapterTrainSettings, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(dataclasses.replace(settings, out=settings.out.with_name("first")))
    later = dataclasses.replace(settings, start=settings.out.with_name("first"), lora=LoraShape(dropout=0.0))
    found = train(later)
    assert found["base_validation_loss"] == pytest.approx(first["validation_loss"], abs=5e-3)  # it was saved in bf16
    assert found["validation_loss"] < found["base_validation_loss"]
    config = json.loads((later.out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (4, 8, 0.0)
    assert "`first`, which it went on from" in (later.out / "README.md").read_text()
    assert found["settings"]["start"] == "first" and found["settings"]["lora"]["rank"] == 4
    still = train(dataclasses.replace(later, out=settings.out.with_name("still"), learning_rate=1e-12))
    kept, was = (load_file(settings.out.with_name(name) / "adapter_model.safetensors") for name in ("still", "first"))
    assert kept.keys() == was.keys() and all(torch.equal(kept[name], was[name]) for name in was)
    assert still["best_step"] == 0 and "than the adapter that it went on from" in capsys.readouterr().err


def test_an_adapter_to_go_on_from_has_to_fit(settings: AdapterTrainSettings, tmp_path: Path) -> None:
    with pytest.raises(AdapterNotFoundError):
        train(dataclasses.replace(settings, start=tmp_path / "nothing"))
    other = LlamaForCausalLM(LlamaConfig(**{**AutoConfig.from_pretrained(settings.base).to_dict(), "hidden_size": 64}))
    get_peft_model(other, LoraConfig(target_modules="all-linear")).save_pretrained(tmp_path / "wide")
    with pytest.raises(AdapterMismatchError, match="was trained for another base"):
        train(dataclasses.replace(settings, start=tmp_path / "wide"))
    with pytest.raises(ConfigError, match="leave out start, or stack"):
        dataclasses.replace(settings, start=tmp_path / "wide", stack=tmp_path)
    assert not settings.out.exists()
