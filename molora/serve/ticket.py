"""A request that was taken, and what is known of it while it waits and runs."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from molora.errors import RequestError
from molora.selection import Choice, Selection
from molora.serve.pool import Pool, Read
from molora.serve.prefixes import Acting
from molora.serve.requests import Event, Finished, FinishReason, Piece, Request, Route
from molora.serve.rows import RowReader
from molora.serve.sampling import Chosen, Sampler
from molora.serve.text import Text


@dataclass(eq=False)
class Ticket:
    """Made by :meth:`molora.serve.engine.Engine.submit`. :meth:`cancel` may be called from any thread."""

    request: Request
    listener: Callable[[Event], None]
    ends: float | None  # monotonic seconds
    sampler: Sampler
    text: Text
    ids: list[int]  # the prompt, and what was generated
    most: int  # tokens that may be generated
    selection: dict[str, Choice] = field(default_factory=dict)  # with the names that pooled adapters have in the stack
    coming: bool = False  # adapters are being read for it
    reads: list[tuple[Pool, Read]] = field(default_factory=list)
    leased: bool = False
    overtaken: int = 0  # by others with adapters, while there was no room for its own
    failed: Exception | None = None
    cancelled: bool = False
    reader: RowReader | None = None
    acting: Acting | None = None  # on what is being read
    tokens: int = 0
    untold: tuple[Chosen, Route, bool] | None = None  # the last token, its route, and whether it has no text
    finished: bool = False

    def cancel(self) -> None:
        """Ends it, at the next token at the latest."""
        self.cancelled = True

    @property
    def unread(self) -> int:
        """Tokens of ``ids`` that no row holds yet."""
        return len(self.ids) - (self.reader.length if self.reader is not None else 0)

    def why_end(self, now: float) -> FinishReason | None:
        """Whether it is to end before it is done; ``now``: monotonic seconds."""
        if self.failed is not None:
            return "error"
        if self.cancelled:
            return "cancelled"
        return "timeout" if self.ends is not None and now >= self.ends else None

    def lease(self) -> bool:
        """Makes its adapters live; False while there is no room for them, or if one cannot be used (``failed``)."""
        if self.leased:
            return True
        names: dict[tuple[str, str], str] = {}
        for place, (pool, read) in enumerate(self.reads):
            try:
                slot = pool.lease(read)
            except Exception as error:  # of this request alone
                slot, self.failed = None, error
            if slot is None:
                if pool.leases == sum(other is pool for other, _ in self.reads[:place]):  # nobody will give one back
                    self.failed = self.failed or RequestError("Pinned adapters leave no room for this request's.")
                for other, earlier in self.reads[:place]:
                    other.take_back(earlier)
                return False
            names[pool.layer, read.name] = slot
        self.selection = renamed(self.request.selection or {}, names)
        self.leased = True
        return True

    def say(self) -> None:
        """Tells of the last token, if that has not been done."""
        if self.untold is not None:
            (one, route, silent), self.untold = self.untold, None
            text = "" if silent else self._text(lambda: self.text.add(one.token))
            self.tell(Piece(one.token, text, one.logprob, one.likeliest, route))

    def _text(self, made: Callable[[], str]) -> str:
        """What a tokenizer makes of a token; one that it does not know may raise anything, and ends this request."""
        try:
            return made()
        except Exception as error:
            self.failed = error
            return ""

    def tell(self, event: Event) -> None:
        try:
            self.listener(event)
        except Exception:  # nobody listens any more
            self.cancelled = True

    def finish(self, reason: FinishReason, error: Exception | None = None) -> None:
        """The last that is heard of it; its adapters may go."""
        if self.leased:
            for pool, read in self.reads:
                pool.release(read)
        self.say()
        rest = self._text(self.text.rest)
        self.finished = True
        if self.failed is not None:
            reason, error = "error", error or self.failed
        self.tell(Finished(reason, len(self.request.ids), self.tokens, rest, error))


def names_in(choice: Choice) -> list[str]:
    """The adapters that a choice names."""
    if choice is None or choice == "auto":
        return []
    return [choice] if isinstance(choice, str) else list(choice)


def renamed(selection: Selection, names: dict[tuple[str, str], str]) -> dict[str, Choice]:
    """A selection with other names for some adapters, by (layer, name)."""
    found: dict[str, Choice] = {}
    for layer, choice in selection.items():
        if choice is None or isinstance(choice, str):
            found[layer] = names.get((layer, choice or ""), choice)
        elif isinstance(choice, Mapping):
            found[layer] = {names.get((layer, name), name): share for name, share in choice.items()}
        else:
            found[layer] = [names.get((layer, name), name) for name in choice]
    return found
