"""Under lm-evaluation-harness: what it computes is what the model computes, over task files of held-out questions."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from molora import MoLoRAModel
from molora.chat import render
from molora.errors import DataError
from molora_training.data.benchmarks import write_benchmarks
from molora_training.data.choices import choice_item
from molora_training.data.items import Item
from molora_training.harness import MoLoRALM, evaluate
from tests.unit.spoken import make_spoken

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen"


def science(count: int = 60) -> list[Item]:
    return [choice_item(f"sciq-{n}", "science", f"Which is {n}?", [f"no {n}", f"yes {n}"], n % 2) for n in range(count)]


def sums(count: int = 150) -> list[Item]:
    rows = []
    for n in range(count):
        answers = {"plain": str(n + 1), "hashes": f"{n} + 1\n#### {n + 1}"}
        rows.append(Item(f"gsm8k-{n}", f"gsm8k-{n}", "math", "math", {"question": f"{n} + 1?"}, answers))
    return rows


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> MoLoRAModel:
    return make_spoken(tmp_path_factory.mktemp("spoken"))


def test_only_held_out_questions_that_training_does_not_share(tmp_path: Path) -> None:
    items = science()
    shared = next(item for item in items if item.split == "test")
    trained = next(item for item in items if item.split == "train")
    items = [item for item in items if item not in (shared, trained)]
    items += [choice_item(one.id, "science", f"{WORDS}?", ["a", "b"], 0) for one in (shared, trained)]
    counts = write_benchmarks(tmp_path, ["sciq"], {"science": items})
    rows = [json.loads(line) for line in (tmp_path / "sciq.jsonl").read_text(encoding="utf-8").splitlines()]
    held_out = {item.id for item in items if item.split == "test"} - {shared.id}
    assert {row["id"] for row in rows} == held_out
    assert counts == {"sciq": (len(held_out), 1)}
    for row in rows:
        assert row["choices"][row["gold"]] in row["question"]
    assert yaml.safe_load((tmp_path / "molora_sciq.yaml").read_text())["output_type"] == "multiple_choice"
    with pytest.raises(DataError, match="no benchmark 'mmlu'"):
        write_benchmarks(tmp_path, ["mmlu"])


@torch.no_grad()
def test_likelihoods_are_the_models_own(model: MoLoRAModel, tmp_path: Path) -> None:
    write_benchmarks(tmp_path, ["sciq"], {"science": science()})
    rows = [json.loads(line) for line in (tmp_path / "sciq.jsonl").read_text(encoding="utf-8").splitlines()]
    for selection in ({"domain": "auto"}, {"domain": "math"}):
        found = evaluate(MoLoRALM(model, selection, batch_size=4), tmp_path, ["sciq"])["sciq"]
        right = 0
        for row in rows:
            scores = []
            for choice in row["choices"]:
                text = render(model.tokenizer, [{"role": "user", "content": row["question"]}], True)
                start, ids = (model.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, text + choice))
                logits = model(torch.tensor([ids]), selection=selection).logits[0].log_softmax(-1)
                scores.append(sum(float(logits[at - 1, ids[at]]) for at in range(len(start), len(ids))))
            right += scores.index(max(scores)) == row["gold"]
        assert found["n"] == len(rows)
        assert found["acc"] == pytest.approx(right / len(rows))


def test_written_answers_are_judged_by_their_last_number(
    model: MoLoRAModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_benchmarks(tmp_path, ["gsm8k"], {"math": sums()})
    rows = [json.loads(line) for line in (tmp_path / "gsm8k.jsonl").read_text(encoding="utf-8").splitlines()]
    asked = []

    def generate(self: MoLoRAModel, input_ids: torch.Tensor, **settings: object) -> torch.Tensor:
        """Right for even sums, with thousands' commas; wrong for others."""
        texts = []
        for ids in input_ids:
            question = int(self.tokenizer.decode(ids).split("user\n")[1].split(" ")[0])
            answer = question + 1 if question % 2 == 0 else -7
            texts.append(self.tokenizer(f"It was 3, so {answer:,}.<|im_end|>", add_special_tokens=False)["input_ids"])
        asked.append(settings)
        longest = max(map(len, texts))
        told = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        return torch.cat([input_ids.cpu(), told], 1)

    monkeypatch.setattr(MoLoRAModel, "generate", generate)
    found = evaluate(MoLoRALM(model, {"domain": "math"}, max_length=1024), tmp_path, ["gsm8k"])["gsm8k"]
    expected = sum(int(row["answer"]) % 2 for row in rows) / len(rows)
    assert found["exact_match"] == pytest.approx(expected) and 0 < expected < 1
    assert all(settings["selection"] == {"domain": "math"} and settings["do_sample"] is False for settings in asked)
