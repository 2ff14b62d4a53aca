"""The sequences that run: prompts are read into rows, and each step gives every row one more token."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from molora.errors import NonFiniteError
from molora.model import MoLoRAModel
from molora.outputs import read_plan
from molora.selection import ResolvedSelection, column_layers
from molora.serve.pool import Pool
from molora.serve.prefixes import Prefixes
from molora.serve.requests import FinishReason
from molora.serve.rows import Rows
from molora.serve.sampling import Chosen, choose
from molora.serve.steps import RowSteps
from molora.serve.ticket import Ticket


class Batch:
    """At most ``rows`` sequences of up to ``longest`` tokens; for one thread.

    Args:
        model: what runs them.
        rows, longest: sizes.
        pools: by layer, whose adapters have other names in the stack than for those who ask.
        prefixes: what was read before.
        left: told of each sequence that leaves, why, and what went wrong.

    Raises:
        BaseModelError: the base keeps something else than the keys and values of all tokens.
    """

    def __init__(
        self,
        model: MoLoRAModel,
        rows: int,
        longest: int,
        pools: dict[str, Pool],
        prefixes: Prefixes,
        left: Callable[[Ticket, FinishReason, Exception | None], None],
    ) -> None:
        self.model, self.pools, self.prefixes, self.left = model, pools, prefixes, left
        self.rows = Rows(model.base, rows, longest)
        self.steps = RowSteps(model, self.rows)
        self.running: list[Ticket] = []  # by row
        self.reading: list[Ticket] = []  # their rows are those after theirs
        self.again: list[Ticket] = []  # were under way, and are to begin anew
        self.prompt_tokens = self.tokens = 0  # since the start
        on_gpu = model.device.type == "cuda"
        self.tells_later = on_gpu  # while the device is at work
        self.reads_again = on_gpu  # where a forward costs more than some tokens more in it
        self._router: tuple[Any, list[tuple[torch.Tensor, int]]] | None = None  # under which all rows were read
        self._resolved: tuple[Any, list[Ticket], ResolvedSelection] | None = None
        found = model.generation_config.eos_token_id
        self._ends = frozenset([found] if isinstance(found, int) else found or ())
        self._adds_masks = model.config._attn_implementation == "eager"

    @property
    def tickets(self) -> list[Ticket]:
        return [*self.running, *self.reading]

    @property
    def has_room(self) -> bool:
        """Whether one more can begin."""
        return len(self.tickets) < self.rows.count

    def begin(self, ticket: Ticket) -> None:
        """Gives it the row after the others, with as much of its prompt as is known."""
        with self.model.routing.lock:
            ticket.selection = dict(self.model.find(torch.tensor([ticket.request.ids]), ticket.selection))
            self._router_changed()
            ticket.reader = self.rows.reader(len(self.tickets))
            self.reading.append(ticket)
            ticket.acting = self.prefixes.acting(self.model._resolve(ticket.selection))
            self.prefixes.fill(ticket.reader, ticket.ids, ticket.acting)

    def group(self, most: int) -> list[Ticket]:
        """The first of those that are being read, and as many after it as can be read with it in one forward: from one
        place on, and padded to the longest within ``most`` tokens. What has one token left is read alone; so is that of
        which more is known, unless it ``reads_again`` from that place on."""
        found = self.reading[:1]
        for ticket in self.reading[1:]:
            group = [*found, ticket]
            past, lengths = min(map(_read, group)), [len(one.ids) for one in group]
            if min(lengths) - past < 2 or len(group) * (max(lengths) - past) > most:
                break
            if not self.reads_again and any(_read(one) > past for one in group):
                break
            found.append(ticket)
        return found

    def read_together(self, group: Sequence[Ticket]) -> None:
        """All of the prompts of :meth:`group` but their last tokens, which are for the next step."""
        model, first = self.model, len(self.running)
        past, lengths = min(map(_read, group)), [len(ticket.ids) - 1 for ticket in group]
        device, longest = model.device, max(lengths)
        pieces = [ticket.ids[past:-1] + [0] * (longest - length) for ticket, length in zip(group, lengths, strict=True)]
        places = torch.arange(longest, device=device)
        mask = (places < torch.tensor(lengths, device=device).unsqueeze(1)).long()
        with model.routing.active(lambda: model._resolve([ticket.selection for ticket in group])):
            if self._router_changed():
                return
            readers = [ticket.reader for ticket in group if ticket.reader is not None]
            for reader in readers:
                reader.back(past)
            joint = self.rows.together(first, readers)
            with self.steps.reading(joint):
                model.base(
                    input_ids=torch.tensor(pieces, device=device),
                    attention_mask=mask,
                    position_ids=places[past:].unsqueeze(0),
                    past_key_values=joint,
                    use_cache=True,
                    logits_to_keep=1,
                )
            self.rows.apart(joint, readers, lengths)
            for ticket in group:
                self._is_read(ticket, ticket.ids[:-1])

    def _is_read(self, ticket: Ticket, ids: list[int]) -> None:
        """The first of those that are being read has come to its end, after ``ids``: it runs."""
        assert ticket.reader is not None and ticket.acting is not None and ticket is self.reading[0]
        if ticket.tokens == 0:
            self.prompt_tokens += len(ticket.request.ids)
        acting = self.prefixes.acting(self.model._resolve(ticket.selection))
        if ticket.acting.key == acting.key:  # none came or went meanwhile
            self.prefixes.keep(ticket.reader, ids, acting)
        self.rows.finish(len(self.running), ticket.reader)
        ticket.reader, ticket.acting = None, None
        self.running.append(self.reading.pop(0))

    def read(self, most: int) -> None:
        """A piece of up to ``most`` tokens of the first prompt that is being read; after the last, its first token."""
        ticket = self.reading[0]
        assert ticket.reader is not None
        model, done = self.model, ticket.reader.length
        piece = ticket.ids[done : done + most]
        ids = torch.tensor([piece], device=model.device)
        positions = torch.arange(done, done + len(piece), device=model.device).unsqueeze(0)
        with model.routing.active(lambda: model._resolve(ticket.selection)):
            if self._router_changed():
                return
            with self.steps.reading(ticket.reader):
                output = model.base(
                    input_ids=ids,
                    position_ids=positions,
                    past_key_values=ticket.reader,
                    use_cache=True,
                    logits_to_keep=1,
                )
            route = self._route(0, -1) if ticket.request.routes else ()
            if ticket.unread:
                return
            self._is_read(ticket, ticket.ids)
        self._take([ticket], choose(output.logits[:, -1], [ticket.sampler]), [route])

    def step(self) -> None:
        """One more token of each running sequence."""
        model, running = self.model, list(self.running)
        with model.routing.active(self._resolve):
            if self._router_changed():
                return
            tokens = [ticket.ids[-1] for ticket in running]
            logits = self.steps(self._resolve(), tokens)
            if logits is None:
                logits = self._forward(tokens)
            routes = [self._route(row, 0) if one.request.routes else () for row, one in enumerate(running)]
        self.say()
        self._take(running, choose(logits, [ticket.sampler for ticket in running]), routes)

    def say(self) -> None:
        """Tells of the last step's tokens, as far as that has not been done."""
        for ticket in self.running:
            ticket.say()

    def _forward(self, tokens: list[int]) -> torch.Tensor:
        """Logits [N, vocabulary] of one more token of each row, by the base's own forward."""
        model, cache = self.model, self.rows.step(len(tokens))
        output = model.base(
            input_ids=torch.tensor(tokens, device=model.device).unsqueeze(1),
            attention_mask=cache.mask(model.dtype if self._adds_masks else torch.bool),
            position_ids=cache.positions.unsqueeze(1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        cache.done()
        assert output.logits is not None
        return output.logits[:, -1]

    def clear(self) -> list[Ticket]:
        """Lets go of all that is under way, and returns it."""
        self.say()
        tickets = self.tickets
        for row in range(len(tickets)):
            self.rows.wipe(row)
        self.running, self.reading = [], []
        return tickets

    def leave(self, ticket: Ticket, reason: FinishReason, error: Exception | None = None) -> None:
        """Ends a sequence; the last running one takes its row, and those that are being read the rows after it."""
        row = self.tickets.index(ticket)
        if reason not in ("stop", "length"):  # what it was read by may give no finite numbers, and was not seen to
            self.rows.wipe(row)
        if ticket in self.reading:
            self.reading.remove(ticket)
        else:
            last = len(self.running) - 1
            if row != last:
                self.rows.move(last, row)
                self.running[row] = self.running[last]
            self.running.pop()
            row = last
        for other in self.tickets[row:]:
            assert other.reader is not None
            self.rows.shift(other.reader, row + 1, row)
            row += 1
        self.left(ticket, reason, error)

    def _resolve(self) -> ResolvedSelection:
        """What acts on the running sequences; made again when they or the stack have changed."""
        found, layers = self._resolved, self.model.routing.layers
        if found is None or found[0] is not layers or found[1] != self.running:
            chosen = self.model._resolve([ticket.selection for ticket in self.running])
            found = self._resolved = (layers, list(self.running), chosen)
        return found[2]

    def _router_changed(self) -> bool:
        """Whether anything was under way, and the router is another one than that which read what the rows hold, or was
        trained or got other rows since. What was under way has left then, and its texts are to be read ``again``."""
        router = self.model.router
        weights = [*router.parameters(), *router.buffers()] if router is not None else []
        known = self._router
        if known is not None and known[0] is router and len(known[1]) == len(weights):
            pairs = zip(known[1], weights, strict=True)
            if all(old is new and version == new._version for (old, version), new in pairs):
                return False
        self._router = (router, [(weight, weight._version) for weight in weights])
        self.prefixes.clear()
        self.steps.forget()
        gone = self.clear() if known is not None else []
        for ticket in gone:
            ticket.reader = None
        self.again += gone
        return bool(gone)

    def _route(self, row: int, place: int) -> tuple[tuple[str, str | None, float], ...]:
        routing = self.model.routing
        plan = routing.plans[-1]
        if plan is None or not plan.shape[-1]:
            return ()
        columns = column_layers(routing.layers, plan.shape[-1])
        found = read_plan(plan.slots[row, place], plan.weights[row, place], self.model.slots.names, columns)
        return tuple((layer, name and self._shown(layer, name), weight) for layer, name, weight in found)

    def _shown(self, layer: str, name: str) -> str:
        return self.pools[layer].shown(name) if layer in self.pools else name

    def _take(self, tickets: list[Ticket], chosen: list[Chosen], routes: Sequence[Any]) -> None:
        """The tokens that were chosen: they are told, and what ends leaves."""
        for ticket, one, route in zip(tickets, chosen, routes, strict=True):
            if one.token < 0:
                self.leave(ticket, "error", NonFiniteError("What acts on this sequence gives no finite numbers."))
                continue
            ticket.ids.append(one.token)
            ticket.tokens += 1
            self.tokens += 1
            ended = ticket.request.ends and one.token in self._ends
            ticket.untold = (one, route, ended)
            if not self.tells_later or ticket.request.sampling.stop:
                ticket.say()  # which may find a stop text
            if ended or ticket.text.stopped:
                self.leave(ticket, "stop")
            elif ticket.tokens >= ticket.most:
                self.leave(ticket, "length")


def _read(ticket: Ticket) -> int:
    """Tokens that its row holds."""
    assert ticket.reader is not None
    return ticket.reader.length
