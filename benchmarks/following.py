"""How long does a running chat wait for what was promoted since its last turn?

python -m benchmarks.following
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch

from molora import MoLoRAModel
from molora.following import Following
from molora.settled import settle
from molora.starter import starter_folder
from molora.versions import Versions

TIMES = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        shutil.copytree(starter_folder(), folder)
        model = MoLoRAModel.from_pretrained(folder, dtype=torch.bfloat16)
        if torch.cuda.is_available():
            model.to("cuda")
        following = Following(model, folder)
        model.generate(**model.encode([{"role": "user", "content": "Hello"}]), max_new_tokens=2)
        settle()  # as a chat does
        waits: dict[str, list[float]] = {"router": [], "nothing new": []}
        for _ in range(TIMES):
            for layer in model.stack.layers:
                name = next(iter(layer.adapters))
                mine = Versions(folder, layer.name, name)
                mine.promote(mine.add(Path(str(layer.adapters[name]))).number)
                waits.setdefault(f"{layer.name}/{name}", []).append(_wait(following))
                waits["nothing new"].append(_wait(following))
            routers = Versions(folder)
            assert model.router is not None
            routers.promote(routers.add(model.router).number)
            waits["router"].append(_wait(following))
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, starter stack; milliseconds, the longest of {TIMES}:")
    for name, found in waits.items():
        print(f"  {name:<24} {1e3 * max(found):8.2f}")


def _wait(following: Following) -> float:
    began = time.perf_counter()
    following.catch_up()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
