"""``molora chat``: a conversation in the terminal, each token in the colour of the adapter that spoke it."""

import time
from contextlib import closing, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from molora.colors import FILLS, INK, Route, fill_of, printable, shares_text, speaker, speaking_layer
from molora.commands.common import (
    Dtype,
    DtypeOption,
    MaxNewTokensOption,
    ModelArgument,
    SeedOption,
    SelectOption,
    TemperatureOption,
    check_selection,
    model_place,
    open_model,
    parse_selection,
    room_for,
    sampling,
    set_seed,
)
from molora.errors import DataError, MoLoRAError

if TYPE_CHECKING:
    from molora import MoLoRAModel
    from molora.following import Following
    from molora.selection import Choice
    from molora.stack import StackLayer

HELP = """\
/select layer=choice ...   who may act: auto, none, a name, or name1,name2 (alone: show it)
/reset                     forget the conversation
/help                      this list
/quit                      end (so does Ctrl+D; Ctrl+C stops an answer)"""


def chat(
    model: ModelArgument = None,
    select: SelectOption = None,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Chat in the terminal. Each token has the colour of the adapter that spoke it.

    A version that is promoted meanwhile (`molora update`, `molora rollback`) serves from the next turn on.

    In the chat: /select domain=math user=none, /reset, /help, /quit.

    Example: molora chat --select personality=none --temperature 0.7 --seed 1
    """
    from molora.following import Following  # needs torch
    from molora.settled import settle

    selection = parse_selection(select)
    with suppress(ImportError):  # where there is one, it gives the prompt a history and editing
        import readline  # noqa: F401
    console = Console(highlight=False)
    with console.status("Loading the model"):
        opened = open_model(model, dtype)
    check_selection(opened, selection)
    set_seed(seed)
    following = Following(opened, model_place(model))
    settle()
    _Chat(opened, console, selection, sampling(max_new_tokens, temperature), following).run()


@dataclass
class _Chat:
    """One conversation."""

    model: "MoLoRAModel"
    console: Console
    selection: "dict[str, Choice]"
    settings: dict[str, Any]
    following: "Following"
    messages: list[dict[str, str]] = field(default_factory=list)

    def run(self) -> None:
        self._print_selection()
        self.console.print("/help lists the commands.", style="dim")
        while True:
            try:
                line = input("\n> ").strip()
            except (EOFError, KeyboardInterrupt):
                self.console.print()
                return
            if line in ("/quit", "/exit"):
                return
            try:
                if line.startswith("/"):
                    self._command(line)
                elif line:
                    self._answer(line)
            except MoLoRAError as error:
                self.console.print(Text(str(error), style="red"))

    def _command(self, line: str) -> None:
        name, *rest = line.split()
        if name == "/select":
            selection = self.selection | parse_selection(rest)
            check_selection(self.model, selection)
            self.selection = selection
            self._print_selection()
        elif name == "/reset":
            self.messages.clear()
            self.console.print("The conversation begins anew.", style="dim")
        elif name == "/help":
            self.console.print(Text(HELP))
        else:
            raise DataError(f"There is no command {name}; /help lists them.")

    def _catch_up(self) -> None:
        """What was promoted since the last turn serves from here on."""
        try:
            changed = self.following.catch_up()
        except MoLoRAError as error:
            self.console.print(Text(f"What served goes on serving: {error}", style="red"))
            return
        if changed:
            self.console.print(Text(f"New: {', '.join(changed)}", style="dim"))

    def _answer(self, prompt: str) -> None:
        self._catch_up()
        messages = self._fitting([*self.messages, {"role": "user", "content": prompt}])
        layer = speaking_layer(self.model.stack.layers)
        texts: list[str] = []
        routes: list[Route] = []
        times: list[float] = []
        stream = self.model.stream(messages, selection=self.selection, **self.settings)
        with closing(stream), suppress(KeyboardInterrupt):  # type: ignore[type-var]
            for token in stream:
                times.append(time.perf_counter())
                texts.append(token.text)
                routes.append(token.route)
                shown = Text(printable(token.text), style=_style(layer, speaker(token.route, layer.name)))
                self.console.print(shown, end="", soft_wrap=True)
        self.console.print()
        self.messages = [*messages, {"role": "assistant", "content": "".join(texts)}]
        pace = f", {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
        who = shares_text(routes, self.model.stack.layers) or "the base alone"
        self.console.print(Text(f"{who} · {len(times)} tokens{pace}", style="dim"), soft_wrap=True)

    def _fitting(self, messages: list[dict[str, str]]) -> list[dict[str, str]]:
        """``messages`` without as many of the oldest pairs as it takes to leave room for the answer."""
        room = room_for(self.model, self.settings["max_new_tokens"])
        while (length := self.model.encode(messages)["input_ids"].shape[1]) > room:
            if len(messages) < 3:
                raise DataError(
                    f"Your message has {length} tokens, and this model can read {max(room, 0)}: shorten it, or start "
                    f"with a lower --max-new-tokens."
                )
            messages = messages[2:]
        return messages

    def _print_selection(self) -> None:
        """The stack with what is selected; the speaking layer's names in their colours."""
        speaking = speaking_layer(self.model.stack.layers)
        for layer in self.model.stack.layers:
            line = Text(f"{layer.name} = {self._chosen(layer)}", style="bold")
            line.append("   of ", style="not bold dim")
            for name in layer.adapters:
                style = f"not bold {_style(layer, name)}" if layer is speaking else "not bold"
                line.append(name, style=style).append(" ")
            self.console.print(line)

    def _chosen(self, layer: "StackLayer") -> str:
        choice = self.selection.get(layer.name, layer.default)
        return "none" if choice is None else choice if isinstance(choice, str) else ",".join(choice)


def _style(layer: "StackLayer", adapter: str | None) -> str:
    fill = fill_of(layer, adapter)
    return "" if fill is None else f"{INK[0]} on {FILLS[fill][0]}"
