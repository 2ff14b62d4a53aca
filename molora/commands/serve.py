"""``molora serve``: OpenAI's API over one model with many stacks."""

import ipaddress
import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import Dtype, DtypeOption, ModelArgument, extra, model_place, open_model
from molora.errors import ConfigError

if TYPE_CHECKING:
    from molora.serve.keys import Keys


class EngineName(StrEnum):
    """Which runs the model."""

    own = "own"
    vllm = "vllm"


KEYS_FILE = Path("~/.config/molora/keys.json")
_DRAIN_S = 30  # that answers under way have when the server is told to stop


def serve(
    model: ModelArgument = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 8000,
    rows: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 8,
    longest: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its answer, at most.")] = 2048,
    store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Adapters of the layers with shared: true that are brought when they are asked for: a folder, "
            "s3://bucket/prefix, or what else fsspec reaches. Those that are uploaded go there.",
        ),
    ] = None,
    live: Annotated[
        int,
        typer.Option(
            min=1,
            help="Adapters of the store that are in the model at once; on a GPU their memory is taken at the start.",
        ),
    ] = 64,
    router: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Route by _routers/NAME of the store; a newer version of it is taken up while it runs."
        ),
    ] = None,
    keys: Annotated[
        Path | None,
        typer.Option("--keys", metavar="FILE", help=f"The file of API keys. Default: {KEYS_FILE}, if it is there."),
    ] = None,
    new_key: Annotated[
        str | None, typer.Option("--new-key", metavar="NAME", help="Make a key, show it once, and end.")
    ] = None,
    scope: Annotated[
        list[str] | None,
        typer.Option("--scope", help="Of the new key: use, manage (change adapters); repeat it. Default: use."),
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="NAME", help="The new key may use this user's adapters only.")
    ] = None,
    list_keys: Annotated[bool, typer.Option("--list-keys", help="Show the names of the keys, and end.")] = False,
    revoke_key: Annotated[
        str | None,
        typer.Option("--revoke-key", metavar="NAME", help="Take a key away, from running servers too, and end."),
    ] = None,
    ray: Annotated[
        bool, typer.Option("--ray", help='Serve with several replicas on Ray Serve. Needs the extra "ray".')
    ] = False,
    replicas: Annotated[int | None, typer.Option(min=1, help="With --ray: how many there are. Default: 2.")] = None,
    most_replicas: Annotated[
        int | None, typer.Option(min=1, help="With --ray: up to how many there are while many ask.")
    ] = None,
    engine: Annotated[
        EngineName,
        typer.Option(help="own: MoLoRA's, with stores and keys. vllm: vLLM's server, where it is installed."),
    ] = EngineName.own,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="With --engine vllm: GPUs that each layer is spread over.")
    ] = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Serve the model to clients of OpenAI's API; each request names the adapters that act on it.

    Without a file of keys, programs on this machine may use it and nobody may change its adapters. Needs the extra
    "serve". Stop it with Ctrl+C.

    With --engine vllm the stack is exported and vLLM's own server serves it, as the model "stack" beside "base"; --ray
    then spreads it over the machines of a Ray cluster. It has one key, in VLLM_API_KEY.

    Example: molora serve --store adapters/ --live 256

    Example: molora serve my-molora --engine vllm --tensor-parallel 2 --rows 64
    """
    file = (keys or KEYS_FILE).expanduser()
    if sum([new_key is not None, revoke_key is not None, list_keys]) > 1:
        raise ConfigError("Give one of --new-key, --revoke-key and --list-keys.")
    if new_key is None and (scope or user):
        raise ConfigError("--scope and --user are of a new key: give its name with --new-key.")
    if new_key is not None or revoke_key is not None or list_keys:
        _keep_keys(file, new_key, scope or ["use"], user, revoke_key)
        return
    if engine is EngineName.vllm:
        from molora.vllm.launch import check_options, launch

        check_options(
            not _is_loopback(host), store=store, router=router, keys=keys, replicas=replicas,
            most_replicas=most_replicas,
        )  # fmt: skip
        launch(
            model_place(model), host=host, port=port, rows=rows, longest=longest, dtype=dtype.value,
            tensor_parallel=tensor_parallel or 1, ray=ray,
        )  # fmt: skip
        return
    if tensor_parallel is not None:
        raise ConfigError("--tensor-parallel is of vLLM's server: give --engine vllm, too.")
    if router is not None and store is None:
        raise ConfigError(f"The router {router} is one of a store: give --store, too.")
    if not ray and (replicas or most_replicas):
        raise ConfigError("--replicas and --most-replicas are of several replicas: give --ray, too.")
    known = _known_keys(file, required=keys is not None)
    if known is None and not _is_loopback(host):
        raise ConfigError(
            f"{host} lets other machines in, and there are no keys: make one with `molora serve --new-key NAME`, or "
            f"listen on 127.0.0.1."
        )
    hosts = None if known else (host, "127.0.0.1", "localhost")
    if ray:
        with extra("ray"), extra("serve"):
            from molora.serve.replicas import Serving, run
        told = model_place(model), dtype.value, rows, longest, store, live, file if known else None, hosts
        run(Serving(*told, replicas or 2, most_replicas, router=router), host, port, os.environ.get("RAY_ADDRESS"))
        return
    with extra("serve"):
        import uvicorn

        from molora.serve.app import build_app
    from molora.serve.engine import Engine
    from molora.serve.pins import StoredPins
    from molora.serve.pool import Pool
    from molora.serve.routers import StoredRouter
    from molora.serve.store import AdapterStore
    from molora.serve.warm import warm
    from molora.settled import settle

    opened, held = open_model(model, dtype), AdapterStore(store) if store is not None else None
    shared = [layer.name for layer in opened.stack.layers if layer.shared]
    if held is not None and not shared and router is None:
        raise ConfigError("The stack has no layer with shared: true, in which a store's adapters could come and go.")
    pools = [Pool(opened, layer, held.finder(layer), most=live) for layer in shared] if held is not None else []
    serving = Engine(opened, rows=rows, longest=longest, pools=pools)
    app: Any = build_app(serving, keys=known, store=held, hosts=hosts)
    serving.start()
    followed: list[StoredPins | StoredRouter] = [StoredPins(serving, held)] if held is not None and pools else []
    if held is not None and router is not None:
        followed.append(StoredRouter(serving, held, router))
    if opened.device.type == "cuda":
        typer.echo(f"Made ready for up to {rows} sequences at once in {warm(serving):.0f} s.")
    settle()
    try:
        uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=_DRAIN_S)
    finally:
        for one in followed:
            one.close()
        serving.close()
        if held is not None:
            held.close()


def _keep_keys(file: Path, new: str | None, scopes: list[str], user: str | None, revoked: str | None) -> None:
    """Makes a key, or takes one away, or shows the names of all."""
    from molora.serve.keys import Keys

    known = _known_keys(file, required=new is None) or Keys(file)
    if new is not None:
        typer.echo(known.create(new, scopes, user))
    elif revoked is not None:
        known.revoke(revoked)
        typer.echo(f"The key {revoked} is taken away.")
    else:
        for name in known.names():
            typer.echo(name)


def _known_keys(file: Path, required: bool) -> "Keys | None":
    """The keys in ``file``; None where there is none."""
    from molora.serve.keys import Keys

    if file.is_file():
        return Keys(file)
    if required:
        raise ConfigError(f"There is no file {file}. Make it with `molora serve --keys {file} --new-key NAME`.")
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
