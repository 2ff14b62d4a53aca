"""``molora generate``: one prompt in, one answer out."""

import time
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from molora.commands.common import (
    Dtype,
    DtypeOption,
    JsonOption,
    MaxNewTokensOption,
    ModelArgument,
    SeedOption,
    SelectOption,
    TemperatureOption,
    check_selection,
    open_model,
    parse_selection,
    read_text,
    room_for,
    route_record,
    sampling,
    set_seed,
    write_json,
)
from molora.errors import DataError

if TYPE_CHECKING:
    from molora import StreamedToken


def generate(
    prompt: Annotated[str, typer.Option("--prompt", "-p", metavar="TEXT|-", help="The prompt; - reads it from stdin.")],
    model: ModelArgument = None,
    select: SelectOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text as it is, without the chat format.")] = False,
    as_json: JsonOption = False,
    max_new_tokens: MaxNewTokensOption = 256,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    dtype: DtypeOption = Dtype.bfloat16,
) -> None:
    """Answer one prompt. The answer goes to stdout while it is written.

    With --json: the text, each token with the adapters that acted while it was produced, and the pace.

    Example: molora generate --prompt "What is 17 * 3?" --select domain=math --select personality=none
    """
    selection = parse_selection(select)
    text = read_text(prompt)
    opened = open_model(model, dtype)
    check_selection(opened, selection)
    asked: Any = text if raw else [{"role": "user", "content": text}]
    length = opened.encode(asked)["input_ids"].shape[1]
    if length > (room := room_for(opened, max_new_tokens)):
        raise DataError(
            f"The prompt has {length} tokens, and this model can read {max(room, 0)} when it shall write "
            f"{max_new_tokens}: shorten the prompt or lower --max-new-tokens."
        )
    set_seed(seed)
    tokens: list[StreamedToken] = []
    times = [time.perf_counter()]
    with closing(opened.stream(asked, selection=selection, **sampling(max_new_tokens, temperature))) as stream:  # type: ignore[type-var]
        for token in stream:
            times.append(time.perf_counter())
            tokens.append(token)
            if not as_json:
                typer.echo(token.text, nl=False)
    if as_json:
        write_json({"prompt": text, "selection": selection, **_record(tokens, times)})
    else:
        typer.echo()


def _record(tokens: "list[StreamedToken]", times: list[float]) -> dict[str, Any]:
    """The answer for JSON; ``times`` holds the start and the moment of each token."""
    many = len(tokens) > 1
    return {
        "text": "".join(token.text for token in tokens),
        "tokens": [{"id": t.token_id, "text": t.text, "routes": route_record(t.route)} for t in tokens],
        "first_token_seconds": round(times[1] - times[0], 3) if tokens else None,
        "tokens_per_second": round((len(tokens) - 1) / (times[-1] - times[1]), 2) if many else None,
    }
