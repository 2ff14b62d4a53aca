"""``molora store``: adapters with versions in a folder or a bucket, where `molora serve --store` finds them."""

import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import JsonOption, write_json
from molora.errors import AdapterNotFoundError, ConfigError, RouterError, StoreError
from molora.stack import ROUTERS, check_name, read_label

if TYPE_CHECKING:
    from molora.serve.store import AdapterStore

app = typer.Typer(
    help="Keep adapters of many users, with versions, where `molora serve --store` finds them.\n\n"
    "Example: molora store put s3://bucket/adapters user/ada adapters/ada",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)

UrlArgument = Annotated[
    str, typer.Argument(metavar="URL", help="A folder, s3://bucket/prefix, or what else fsspec reaches.")
]
LabelArgument = Annotated[
    str, typer.Argument(metavar="LAYER/NAME", help="The adapter, such as user/ada; a router is _routers/NAME.")
]


@app.command()
def put(
    url: UrlArgument,
    label: LabelArgument,
    folder: Annotated[
        Path, typer.Argument(metavar="FOLDER", help="A PEFT folder on this machine; of a router a saved MoLoRA.")
    ],
) -> None:
    """Store an adapter as a new version, print the version, and let it serve.

    The folder is checked first: what is damaged, or holds NaN, is not stored. The same content is the same version. A
    store that is a local folder is made if there is none.

    The router of a saved MoLoRA is stored as `_routers/NAME`, for `molora serve --router NAME`.

    Example: molora store put s3://bucket/adapters user/ada adapters/ada
    """
    layer, name = _place(label)
    with _opened(url, new=True) as store:
        made = store.put_router(name, folder) if layer == ROUTERS else store.put(layer, name, folder)
        typer.echo(made.version)


@app.command("list")
def list_(
    url: UrlArgument,
    layer: Annotated[str, typer.Argument(metavar="LAYER", help="Such as user.")],
    prefix: Annotated[str, typer.Option(metavar="TEXT", help="Only names that begin with it.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Show at most so many names.")] = 100,
    as_json: JsonOption = False,
) -> None:
    """List the adapters of a layer: which version of each serves, its size and date, and how many versions there are.

    These are the names that this machine knows; `molora store reindex` adds what other machines wrote.

    Example: molora store list s3://bucket/adapters user --prefix a
    """
    if layer != ROUTERS:
        check_name(layer, "a layer")
    with _opened(url) as store:
        names = store.names(layer, prefix, limit + 1)
        rows = [row for row in (_row(store, layer, name) for name in names[:limit]) if row is not None]
    more = len(names) > limit
    if as_json:
        write_json({"layer": layer, "adapters": rows, "more": more})
        return
    if rows:
        _print_names(rows)
    else:
        typer.echo(f"No such adapter is known on this machine. Others may know some: molora store reindex {url}")
    if more:
        typer.echo("There are more: narrow them down with --prefix, or raise --limit.")


@app.command()
def versions(url: UrlArgument, label: LabelArgument, as_json: JsonOption = False) -> None:
    """Show the versions of an adapter, the oldest first, and which one serves.

    Example: molora store versions s3://bucket/adapters user/ada
    """
    layer, name = _place(label)
    with _opened(url) as store:
        found, current = store.versions(layer, name), _current(store, layer, name)
    if as_json:
        every = [{**asdict(one), "bytes": one.size_bytes} for one in found]
        write_json({"current": current, "versions": every})
        return
    for one in found:
        state = "serves" if one.version == current else ""
        rank = f"rank {', '.join(map(str, one.ranks))}" if one.ranks else ""
        typer.echo(f"{one.version}  {_date(one.created)}  {_size(one.size_bytes):>11}  {rank:<8}  {state}".rstrip())
    if current is not None and current not in {one.version for one in found}:
        typer.echo(f"{current} was to serve, and is damaged: let another one serve with `molora store use`.")


@app.command()
def use(
    url: UrlArgument,
    label: LabelArgument,
    version: Annotated[str, typer.Argument(metavar="VERSION", help="As `molora store versions` shows it.")],
) -> None:
    """Let a version serve. Running servers take it from the next request on.

    Example: molora store use s3://bucket/adapters user/ada 0123456789abcdef
    """
    layer, name = _place(label)
    with _opened(url) as store:
        store.set_current(layer, name, version)
    typer.echo(f"Version {version} of {label} serves.")


@app.command()
def rollback(url: UrlArgument, label: LabelArgument) -> None:
    """Let the version serve again that was made before the one that serves now. What was made since stays.

    Example: molora store rollback s3://bucket/adapters user/ada
    """
    layer, name = _place(label)
    with _opened(url) as store:
        version = store.roll_back(layer, name)
    typer.echo(f"Version {version} of {label} serves.")


@app.command()
def get(
    url: UrlArgument,
    label: LabelArgument,
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write; it must not be there yet.")],
    version: Annotated[
        str | None, typer.Option(metavar="VERSION", help="Default: the one that serves.", show_default=False)
    ] = None,
) -> None:
    """Copy an adapter out of the store, as a PEFT folder whose checksums hold.

    Example: molora store get s3://bucket/adapters user/ada --out ada
    """
    from molora.atomic import new_folder
    from molora.serve.store_record import FILES

    layer, name = _place(label)
    if out.exists():
        raise ConfigError(f"{out} exists: nothing was written. Choose another folder.")
    with _opened(url) as store:
        found = store.get(layer, name, version)
        try:
            with new_folder(out) as made:
                for file in FILES["router" if layer == ROUTERS else "adapter"]:
                    if (found / file).is_file():  # a router of rules has no weights
                        shutil.copyfile(found / file, made / file)
        except OSError as error:
            raise ConfigError(f"{out} cannot be written ({error}). Choose another folder, or try again.") from error
    typer.echo(f"Version {found.name} of {label} is in {out}.")


@app.command()
def remove(
    url: UrlArgument,
    label: LabelArgument,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Delete an adapter with all its versions, for every machine. It asks before.

    Example: molora store remove s3://bucket/adapters user/ada
    """
    layer, name = _place(label)
    with _opened(url) as store:
        if not yes:
            _current(store, layer, name)  # nobody is asked about what is not there
            count = len(store.versions(layer, name))
            typer.confirm(f"Delete {label} from {url}, with {_count(count, 'version')}?", abort=True)
        store.remove(layer, name)
    typer.echo(f"{label} is gone.")


@app.command()
def prune(
    url: UrlArgument,
    label: LabelArgument,
    keep: Annotated[int, typer.Option(min=1, help="How many of the newest stay.")] = 2,
) -> None:
    """Delete old versions of an adapter. The newest and the one that serves stay.

    Example: molora store prune s3://bucket/adapters user/ada --keep 2
    """
    layer, name = _place(label)
    with _opened(url) as store:
        gone = store.prune(layer, name, keep)
    typer.echo(f"Deleted: {', '.join(gone) or 'none'}.")


@app.command()
def reindex(url: UrlArgument) -> None:
    """Make this machine's list of names anew from the store, and count what is there.

    It finds what other machines wrote or removed. The store itself does not change.

    Example: molora store reindex s3://bucket/adapters
    """
    with _opened(url) as store:
        found = store.reindex()
    typer.echo(f"{_count(found.names, 'name')}, {_count(found.versions, 'version')}.")


def _place(label: str) -> tuple[str, str]:
    """LAYER/NAME in its parts; _routers/NAME, too, which no layer is called."""
    layer, _, name = label.partition("/")
    return (ROUTERS, check_name(name, "a router")) if layer == ROUTERS else read_label(label)


@contextmanager
def _opened(url: str, new: bool = False) -> "Iterator[AdapterStore]":
    """A store; one that is a local folder is made only if it may be ``new``."""
    from fsspec.core import split_protocol

    protocol, rest = split_protocol(url)
    if not new and protocol in (None, "file", "local") and not Path(rest).expanduser().is_dir():
        raise StoreError(f"There is no store {url}. Make it with `molora store put`.")
    from molora.serve.store import AdapterStore

    with closing(AdapterStore(url)) as store:
        yield store


def _current(store: "AdapterStore", layer: str, name: str) -> str | None:
    """The version that serves; None where its record is damaged, which hides nothing else."""
    try:
        return store.current(layer, name)
    except StoreError as error:
        typer.echo(str(error), err=True)
        return None


def _row(store: "AdapterStore", layer: str, name: str) -> dict[str, Any] | None:
    """An adapter in the list; None where it was removed meanwhile."""
    try:
        found, current = store.versions(layer, name), _current(store, layer, name)
    except (AdapterNotFoundError, RouterError):
        return None
    serves = next((one for one in found if one.version == current), None)
    about = {"bytes": serves.size_bytes, "created": serves.created} if serves else {"bytes": None, "created": None}
    return {"name": name, "current": current, "versions": len(found), **about}


def _print_names(rows: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("adapter", overflow="fold")
    table.add_column("serves", no_wrap=True)
    table.add_column("versions", justify="right")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("made (UTC)", no_wrap=True)
    for row in rows:
        sound = row["bytes"] is not None
        size, date = (_size(row["bytes"]), _date(row["created"])) if sound else ("damaged", "")
        table.add_row(row["name"], row["current"] or "?", str(row["versions"]), size, date)
    Console(highlight=False).print(table)


def _size(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.2f} MB"


def _date(created: str) -> str:
    return created[:19].replace("T", " ")


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"
