"""A tiny base and four people who answer differently, for tests of federations."""

import json
import random
from pathlib import Path
from typing import Any

import torch

from molora import MoLoRAModel
from molora.examples import features_of
from molora_training.federated.settings import FederateSettings, LocalSettings
from tests.unit.spoken import make_spoken, save_spoken

ANSWERS = {"ada": "aye", "bob": "nay", "cyd": "aye aye", "dan": "nay nay"}
SORTS = {"math": "0123456789+-*/=; ", "code": "def(x):[]{}return_,", "none": "HE WENT AWAYTOLIS"}  # letters of others
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


def texts_of(sort: str, seed: int) -> list[str]:
    chance = random.Random(f"{sort}{seed}")
    return ["".join(chance.choices(SORTS[sort], k=60)) for _ in range(4)]


def with_samples(model: Path, out: Path) -> Path:
    """A copy of a saved MoLoRA whose router tells three sorts of text apart, and keeps samples of them."""
    found = MoLoRAModel.from_pretrained(model)
    router: Any = found.router
    for index in range(len(router.parts)):
        for turn in range(2):  # the first row was fitted beside none
            for name in SORTS:
                q = features_of(found, [found.encode(text) for text in texts_of(name, turn)], index)
                router.set_row(f"domain/{name}", index, q)
                if not turn and name == "math":
                    router.parts[index].samples.add(q[:128], router.rows.index("domain/math"))
    found.save_pretrained(out)
    return out


def make_settings(folder: Path, out: Path, **changes: Any) -> FederateSettings:
    local = LocalSettings(examples=12, learning_rate=1e-2, batch_tokens=256, max_length=64)
    given: dict[str, Any] = {"ranks": (2, 4, 8), "rounds": 3, "local": local, **changes}
    return FederateSettings(data=folder / "data", out=out, base=str(folder / "base"), **given)
