"""A small model with a stack against a larger one: each is asked the same, and compared on the same questions."""

import json
from pathlib import Path

import pytest
import torch

from molora.chat import render
from molora_training import headline
from molora_training.data.benchmarks import write_benchmarks
from molora_training.harness import AskedAsOurs, MoLoRALM, evaluate, right_answers
from molora_training.headline import BASE, ROUTED, row, run
from tests.training.test_harness import science
from tests.unit.spoken import make_spoken

TEMPLATE = (
    "{{ '<|im_start|>system\nYou are somebody.<|im_end|>\n' }}{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}{{ '<|im_start|>assistant\n' }}"
)


def test_models_are_compared_on_the_same_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_spoken(tmp_path)
    write_benchmarks(tmp_path / "tasks", ["sciq"], {"science": science(150)})
    model.base.save_pretrained(tmp_path / "other")  # the same weights: as a rival, the base itself
    model.tokenizer.chat_template = TEMPLATE
    model.tokenizer.save_pretrained(tmp_path / "other")
    monkeypatch.setattr(headline, "BENCHMARKS", ("sciq",))
    monkeypatch.setattr(headline.MoLoRAModel, "from_pretrained", lambda folder, dtype: model)
    model.base.to(torch.bfloat16)
    report = run(tmp_path / "model", tmp_path / "other", tmp_path / "tasks", tmp_path / "headline.json", "molora eval")
    assert json.loads((tmp_path / "headline.json").read_text()) == report
    (only,) = report["rows"]
    questions = (tmp_path / "tasks" / "sciq.jsonl").read_text(encoding="utf-8").splitlines()
    assert only["questions"] == len(questions) > 10
    accuracy = only["accuracy"]
    assert accuracy[BASE] == accuracy["other, our prompts"]
    assert set(accuracy) == {BASE, ROUTED, "other, our prompts", "other, its own template"}
    expected = evaluate(MoLoRALM(model, batch_size=4), tmp_path / "tasks", ["sciq"])["sciq"]["acc"]
    assert accuracy[ROUTED] == pytest.approx(expected, abs=1e-6)
    assert report["parameters"][BASE] == report["parameters"]["other, our prompts"]
    assert report["must"][0]["value"] == (only["difference"] > 0)


def test_prompts_are_ours_or_its_own(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    model.base.save_pretrained(tmp_path / "other")
    model.tokenizer.chat_template = TEMPLATE
    model.tokenizer.save_pretrained(tmp_path / "other")
    asked = [{"role": "user", "content": "So?"}]
    ours = AskedAsOurs(pretrained=str(tmp_path / "other"), device="cpu").apply_chat_template(asked)
    assert ours == render(model.tokenizer, asked, True) and "somebody" not in ours
    own = headline.HFLM(pretrained=str(tmp_path / "other"), device="cpu").apply_chat_template(asked)
    assert own == f"<|im_start|>system\nYou are somebody.<|im_end|>\n{ours}"


def test_right_answers_come_in_the_order_of_the_file(tmp_path: Path) -> None:
    model = make_spoken(tmp_path)
    write_benchmarks(tmp_path / "tasks", ["sciq"], {"science": science(150)})
    lm = MoLoRALM(model, {"domain": "math"}, batch_size=4)
    whole = right_answers(lm, tmp_path / "tasks", ["sciq"])["sciq"]
    assert 0 < whole.float().mean() < 1
    few = right_answers(lm, tmp_path / "tasks", ["sciq"], limit=5)["sciq"]
    assert torch.equal(few, whole[:5])


def test_the_better_way_of_asking_is_the_one_to_beat() -> None:
    def one(*right: int) -> torch.Tensor:
        return torch.tensor(right, dtype=torch.bool)

    right = {BASE: one(0, 0, 0, 0), ROUTED: one(1, 1, 1, 0), "large, a": one(1, 0, 0, 0), "large, b": one(1, 1, 0, 0)}
    found = row("piqa", right)
    assert found["against"] == "large, b" and found["difference"] == 0.25 and found["questions"] == 4
    low, high = found["difference_interval"]
    assert low == 0 and 0.25 < high <= 1
