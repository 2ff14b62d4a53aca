"""A view of the rounds while they run: who is asked, who has answered, and what became of it."""

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars
from rich.text import Text


class Progress:
    """A bar of rounds and one of the answers of this round, on stderr; finished rounds stay as lines."""

    def __init__(self, rounds: int, done: int, clients: int) -> None:
        self.bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.rounds = self.bars.add_task("rounds", total=rounds, completed=done)
        self.answers = self.bars.add_task("clients start", total=clients)

    def __enter__(self) -> "Progress":
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.stop()

    def __call__(self, what: str, told: Mapping[str, Any]) -> None:
        """A :data:`~molora_training.federated.flower_server.Watch`."""
        if what == "round":
            self.bars.reset(self.answers, total=len(told["clients"]), description=f"round {told['round']}: answers")
        elif what == "answer":
            self.bars.update(self.answers, completed=told["answers"])
        elif what == "closed":
            self.bars.update(self.rounds, completed=told["round"])
            self._say(closed_line(told))
            for client, why in told["refused"].items():
                self._say(f"  {client} was refused: {why}")
        elif what == "trial":
            self._say(f"held out by clients, {told['when']}: {told['loss']:.4f} nats a token")
        elif what == "again":
            self._say(f"again: {told['why']}")
        elif what == "failed":
            self._say(f"  {told['client'] or 'a client'} failed: {str(told['why']).strip().splitlines()[-1][:300]}")
        elif what == "refused":
            self._say(f"  {told['client'] or 'a client without a name'} may not take part: {told['why']}")

    def _say(self, line: str) -> None:
        self.bars.console.print(Text(line), soft_wrap=True)


def closed_line(told: Mapping[str, Any]) -> str:
    """A round in a line."""
    away = f", {len(told['absent'])} away" if told["absent"] else ""
    refused = f", {len(told['refused'])} refused" if told["refused"] else ""
    return f"round {told['round']}: {len(told['clients'])} updates{refused}{away}, {told['seconds']:.0f} s"
