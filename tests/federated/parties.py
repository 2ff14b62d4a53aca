"""A tiny base and four people who answer differently, for tests of federations."""

import json
from pathlib import Path
from typing import Any

import torch

from molora_training.federated.settings import FederateSettings, LocalSettings
from tests.unit.spoken import make_spoken, save_spoken

ANSWERS = {"ada": "aye", "bob": "nay", "cyd": "aye aye", "dan": "nay nay"}
RANKS = {"ada": 2, "bob": 4, "cyd": 8, "dan": 2}  # in turn of 2, 4, 8


def make_parties(place: Path) -> Path:
    """`base`, `adapters`, a saved MoLoRA `model`, and `data` with a file for each of them, in ``place``."""
    model = make_spoken(place / "adapters")
    with torch.no_grad():
        model.base.get_output_embeddings().weight.mul_(10)  # or its logits are so near each other that little is learnt
    save_spoken(model, place)
    (place / "data").mkdir()
    for client, answer in ANSWERS.items():
        rows = [
            {"messages": [{"role": "user", "content": f"{n:02}"}, {"role": "assistant", "content": answer}]}
            for n in range(30)
        ]
        (place / "data" / f"{client}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return place


def make_settings(folder: Path, out: Path, **changes: Any) -> FederateSettings:
    local = LocalSettings(examples=12, learning_rate=1e-2, batch_tokens=256, max_length=64)
    given: dict[str, Any] = {"ranks": (2, 4, 8), "rounds": 3, "local": local, **changes}
    return FederateSettings(data=folder / "data", out=out, base=str(folder / "base"), **given)
