"""``molora export``: a saved stack as one folder that vLLM serves."""

from pathlib import Path
from typing import Annotated

import typer

from molora.commands.common import (
    JsonOption,
    ModelArgument,
    SelectOption,
    hide_loading_bars,
    model_place,
    parse_selection,
    write_json,
)


def export(
    model: ModelArgument = None,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where the new folder is put.")] = Path("exported"),
    select: SelectOption = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the stack, before a hash of its content. Default: the folder's.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a stack as one LoRA folder that vLLM serves, routed by token, where MoLoRA is installed beside it.

    In: a saved MoLoRA. Out: a folder for `--lora-modules`, and the rank that `--max-lora-rank` has to be. What acts
    when a request says nothing is given with --select.

    Example: molora export my-molora --out exported --select personality=sage
    """
    from molora.vllm.export import export as export_stack
    from molora.vllm.folder import read_manifest, reads_hidden

    hide_loading_bars()
    place = model_place(model)
    made = export_stack(place, out, parse_selection(select) or None, name=name)
    manifest = read_manifest(made)
    adapters = [f"{column['layer']}/{column['adapter']}" for column in manifest["columns"]]
    if as_json:
        write_json({"folder": made, "base": manifest["base"], "rank": manifest["rank"], "adapters": adapters})
        return
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{made} holds {len(adapters)} adapters: {', '.join(adapters)}. Serve it with")
    eager = " --enforce-eager" if reads_hidden(manifest) else ""
    console.print(
        f"VLLM_USE_V2_MODEL_RUNNER=0 vllm serve {manifest['base']} --enable-lora --max-lora-rank {manifest['rank']}"
        f"{eager} --lora-modules {made.name}={made}"
    )
