"""``molora learn``: a user's adapter from conversations that are not kept."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import JsonOption, extra, write_json

if TYPE_CHECKING:
    from molora_training.plum.learn import Learnt
    from molora_training.plum.learner import Measured


def learn(
    layer: Annotated[str, typer.Argument(help="The adapter's layer, such as user.")],
    name: Annotated[str, typer.Argument(metavar="ADAPTER", help="Its name; the conversations have to be this user's.")],
    conversation: Annotated[
        Path, typer.Option(metavar="FILE", help='JSON Lines, a {"messages": [...]} a line; several in their order.')
    ],
    model: Annotated[Path, typer.Option(metavar="FOLDER", help="A saved MoLoRA.")],
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over what is asked of each. Default: 5.", show_default=False)
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the learning rate. Default: 0.001.", show_default=False)
    ] = None,
    pull: Annotated[
        float | None,
        typer.Option(
            min=0, help="What it costs to move away from what was learnt before. Default: 0.001.", show_default=False
        ),
    ] = None,
    rehearsed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Topics of earlier conversations that are practised beside each; 0: none, and no topic is kept. "
            "Default: 64.",
            show_default=False,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option(min=1, help="Rank of an adapter that is not there yet. Default: 8.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Let a user's adapter learn what was talked about, from conversations that are not kept.

    In: a saved MoLoRA and a file of conversations, one is enough. Each is made into questions about what was talked
    about in it, and as many about what never was, and is learnt before the next one is; a user without an adapter gets
    one. Out: a new version in the saved MoLoRA, and how the same is answered before and after when it is asked in other
    words. It serves from the next load on if it answers better; otherwise it is kept to be looked at, what serves
    stays, and the command ends with 1.

    Beside the versions lie hashes of single words, so that what was talked about is not taken for what was not, and the
    names of topics: of these the adapter is asked before it learns on, and practises what it says, or it would forget
    them. No other text stays. The adapter itself can be asked what it learnt: who may load it may know it.

    Example: molora learn user ada --conversation chat.jsonl --model my-molora
    """
    changed = {
        "epochs": epochs, "learning_rate": learning_rate, "pull": pull, "rehearsed": rehearsed, "rank": rank,
    }  # fmt: skip
    chosen: dict[str, Any] = {key: value for key, value in changed.items() if value is not None}
    with extra("train"), extra("personalize"):
        from molora_training.plum.learn import LearnSettings
        from molora_training.plum.learn import learn as run
        from molora_training.plum.learner import Learning

        settings = LearnSettings(model, layer, name, conversation, Learning(**chosen))
        found = run(settings, command=f"molora learn {layer} {name} --conversation {conversation.name}")
    if as_json:
        write_json(asdict(found))
    else:
        _show(found)
    if not found.promoted:
        raise typer.Exit(1)


def _show(found: "Learnt") -> None:
    before, after = found.before, found.after
    rest = f", {found.topicless} without anything to ask about" if found.topicless else ""
    typer.echo(f"{found.conversations} conversations learnt{rest}; {found.questions} questions in other words:")
    typer.echo(f"  nats a token of the answer    {before.loss:6.4f} -> {after.loss:6.4f}")
    typer.echo(f"  yes, where it was discussed   {_share(before, 'positives')} -> {_share(after, 'positives')}")
    typer.echo(f"  no, where it was not          {_share(before, 'negatives')} -> {_share(after, 'negatives')}")
    state = "serves" if found.promoted else "is kept and does not serve"
    typer.echo(f"Version {found.version} {state}: {found.why}. {found.seconds:.0f} s")


def _share(measured: "Measured", which: str) -> str:
    share = getattr(measured, which)
    return "  none" if share is None else f"{share:6.1%}"
