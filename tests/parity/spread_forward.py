"""One of several processes that share a base by tensor parallelism: ``-m tests.parity.spread_forward FOLDER``.

FOLDER has what :func:`tests.unit.spoken.save_spoken` writes, and what to ask in ``asked.json``. What comes out goes to
``found-<rank>.safetensors``, and messages of errors to ``errors-<rank>.json``.
"""

import copy
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from molora import MoLoRAModel
from molora.errors import MoLoRAError


def ask(model: MoLoRAModel, folder: Path) -> dict[str, torch.Tensor]:
    """Logits and routes of many tokens and of few, and what is generated, by the number of what is asked."""
    found = {}
    ids = torch.randint(5, 261, (3, 60), generator=torch.Generator().manual_seed(0))
    for number, selection in enumerate(json.loads((folder / "asked.json").read_text())):
        for tokens in (60, 2):
            out = model(ids[:, :tokens], selection=selection, output_routes=True)
            found[f"{number}/{tokens}/logits"], found[f"{number}/{tokens}/slots"] = out.logits, out.routes.slots
        written = model.generate(ids[:, :8], selection=selection, max_new_tokens=6, do_sample=False)
        found[f"{number}/generated"] = written
    return {name: tensor.detach().clone() for name, tensor in found.items()}


def by_kernels(folder: Path, shared: DistributedConfig, model: MoLoRAModel) -> torch.Tensor:
    """Logits of a few tokens with the kernels, in Triton's interpreter."""
    base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=shared, dtype=torch.float32)
    own = MoLoRAModel.from_base(base, model.stack, copy.deepcopy(model.router), backend="triton")
    assert own.adapted.groups
    return few(own)


def few(model: MoLoRAModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(5, 7)[None], selection={"domain": "auto"}).logits
    return found


def change(model: MoLoRAModel, folder: Path) -> None:
    """An adapter comes, and one goes."""
    model.add_adapter("domain", "law", folder / "law")
    model.remove_adapter("domain", "math")


def refused(what: Any) -> str:
    try:
        what()
    except MoLoRAError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    shared = DistributedConfig(tp_size=int(os.environ["WORLD_SIZE"]), tp_plan="auto")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", distributed_config=shared, dtype=torch.float32)
    model = MoLoRAModel.from_pretrained(folder / "model", base=base)
    found = {f"before/{name}": tensor for name, tensor in ask(model, folder).items()}
    found["kernels/logits"] = by_kernels(folder, shared, model)
    change(model, folder)
    found |= {f"after/{name}": tensor for name, tensor in ask(model, folder).items()}
    A = model.adapted._modules["model.layers.0.mlp.down_proj"].factors[model.slots["domain/code"]].A
    errors = {"trained": refused(lambda: model(inputs_embeds=torch.zeros(1, 4, 32, requires_grad=True)))}
    base._tp_plan["model.layers.*.mlp.gate_proj"] = "packed_colwise"
    errors["plan"] = refused(lambda: model.add_adapter("domain", "math", folder / "math"))
    rank = os.environ["RANK"]
    save_file({**found, "down/A": A}, folder / f"found-{rank}.safetensors")
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
