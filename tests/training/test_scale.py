"""How routing scales, on tiny models: the figures are those of the models."""

import json
from pathlib import Path

import pytest
import torch

from molora import MoLoRAModel
from molora.errors import ConfigError
from molora_training import scale
from molora_training.data import Example, write_examples
from molora_training.evaluate import losses
from molora_training.scale import run
from tests.unit.spoken import make_spoken

FEWEST = ("math-a", "code")
ALL = ("math-a", "code", "math-b")
FOLDERS = {"math-a": "math", "code": "code", "math-b": "law"}


def make(folder: Path, names: tuple[str, ...]) -> MoLoRAModel:
    model = make_spoken(folder, (), decays=(0.8, 0.95))
    for name in names:
        model.add_adapter("domain", name, folder / FOLDERS[name])
    with torch.no_grad():
        for part in model.router.parts:  # type: ignore[union-attr]
            for row in (model.router.rows.index(f"domain/{name}") for name in names):  # type: ignore[union-attr]
                part.output.weight[row] = torch.randn(part.output.weight.shape[1]) * 4
                part.output.bias[row] = 0
    return model


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[Path, MoLoRAModel]:
    found = {}
    for folder, names in (("many", ALL), ("few", FEWEST)):
        path = tmp_path / "routers" / folder
        path.mkdir(parents=True)
        (path / "molora.json").touch()
        (path / "router.metrics.json").write_text(json.dumps({"parameters": 7, "seconds": 1.5, "machine": "CPU"}))
        found[path] = make(tmp_path / folder, names)
    monkeypatch.setattr(scale.MoLoRAModel, "from_pretrained", lambda folder, dtype: found[folder])
    for name in ALL:
        rows = [
            Example(
                f"{name}-{n}", name, "test",
                ({"role": "user", "content": f"{name} {n}?"}, {"role": "assistant", "content": f"so {n}"}),
            )
            for n in range(6)
        ]  # fmt: skip
        write_examples(tmp_path / "data" / f"{name}.test.jsonl", rows)
    return found


def test_each_router_is_measured_on_its_own_text_and_on_the_fewests(
    models: dict[Path, MoLoRAModel], tmp_path: Path
) -> None:
    report = run(tmp_path / "routers", tmp_path / "data", tmp_path / "scale.json", "molora eval scale", limit=5)
    assert json.loads((tmp_path / "scale.json").read_text()) == report and report["fewest"] == list(FEWEST)
    few, many = report["rows"]
    assert (few["adapters"], many["adapters"], many["seconds"]) == (2, 3, 1.5)
    assert few["own"] == few["shared"] != many["own"]
    for figure in ("base", "oracle"):  # the same text and the same adapters
        assert many["shared"][figure] == pytest.approx(few["shared"][figure], rel=1e-5)
    own = many["own"]
    assert own["gap_closed"] == pytest.approx((own["base"] - own["router"]) / (own["base"] - own["oracle"]), rel=1e-6)
    model = models[tmp_path / "routers" / "many"]
    text = scale._text(model, ALL, ALL, tmp_path / "data", 5)
    assert own["router"] == pytest.approx(losses(model, text, {"domain": "auto"}, 3).mean)
    assert 0 < many["right"] < many["right_family"] <= 1  # math-a and math-b are one family


def test_what_does_not_nest_is_refused(models: dict[Path, MoLoRAModel], tmp_path: Path) -> None:
    models[tmp_path / "routers" / "many"].remove_adapter("domain", "code")
    models[tmp_path / "routers" / "many"].add_adapter("domain", "other", tmp_path / "many" / "code")
    with pytest.raises(ConfigError, match="lacks the adapter code"):
        run(tmp_path / "routers", tmp_path / "data", tmp_path / "scale.json", "", limit=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="must hold saved MoLoRAs"):
        run(tmp_path / "empty", tmp_path / "data", tmp_path / "scale.json", "")
