"""The Teach tab in words and HTML: what was learnt, how far it is, what there is. Pure functions; all is escaped."""

import re
from collections.abc import Sequence
from datetime import datetime

from molora_demo.lessons import Lesson, Limits, Told
from molora_demo.render import escape

WHAT = """\
<p>The model itself never changes here. What you teach becomes a small file beside it, an <em>adapter</em>, that is
added to the model's calculation when it answers you; take the file away and the model is as it was before.</p>
<p>Of a chat it looks for plain English sentences about yourself, such as “My dog is called Biscuit” or “I live in
Bergen”. Each is made into questions in several wordings, and the adapter practises the answers, together with those of
chats that it was taught before. It is used only if it then answers in wordings that it never practised, and if it still
speaks about everyday things almost as well.</p>
<p>What you teach is private to this browser: it is kept under a secret key that only this browser has, and no one
else's answers can use it. The sentences about you lie beside the adapter, so that it can practise them again.
<em>Forget</em> deletes all of it. The base model is small, so expect it to remember roughly, to mix things up, and
to be wrong.</p>"""
EMPTY = '<p class="none">Nothing yet. What you teach is listed here.</p>'
_COLUMNS = ("Name", "Layer", "How", "KiB", "Seconds", "Version", "Time")


def coded(text: str) -> str:
    """A sentence whose commands stand between backticks."""
    parts = re.split(r"`([^`]*)`", text)
    return "".join(f"<code>{escape(part)}</code>" if n % 2 else escape(part) for n, part in enumerate(parts))


def closed_html(why: str) -> str:
    """Why a way cannot be used."""
    return f'<p class="closed">{coded(why)}</p>'


def note_html(text: str, kind: str = "") -> str:
    """A sentence in the place for news."""
    return f'<p class="{escape(kind)}" role="status">{escape(text)}</p>' if text else ""


def progress_html(title: str, done: int, of: int, elapsed_s: float) -> str:
    """How far a learning is."""
    if not of:
        return (
            f"<p>Getting ready to learn “{escape(title)}” …</p>"
            '<progress max="1" aria-label="Learning"></progress><p class="small">You can go on chatting meanwhile.</p>'
        )
    left = f", about {_time(elapsed_s / done * (of - done))} left" if done > 1 else ""
    return (
        f'<p>Learning “{escape(title)}”: step {done} of {of}{left}.</p><progress max="{of}" value="{done}" '
        f'aria-label="Learning"></progress><p class="small">You can go on chatting meanwhile.</p>'
    )


def told_html(told: Told) -> str:
    """What came of a chat."""
    name = f"“{escape(told.title)}”"
    head = (
        f"<strong>Learnt.</strong> Choose {name} for your answers in the Chat tab, and ask it about yourself."
        if told.serves
        else f"<strong>Not kept.</strong> {name} is as it was before."
    )
    lines = [f"From this chat it took: {escape(' '.join(told.facts))}"]
    lines.append(
        f"Asked about that {told.questions} times, in words that it had not practised, it gave the right answer "
        f"{_share(told.right[1])} of the time (before: {_share(told.right[0])})."
    )
    if told.older is not None:
        lines.append(
            f"What you told it in earlier chats it still gets right {_share(told.older[1])} of the time (before: "
            f"{_share(told.older[0])})."
        )
    how = f"{abs(told.everyday):.0%} {'worse' if told.everyday > 0 else 'better'}"
    lines.append(f"At everyday talk, which nobody taught here, it is {how} than without what you taught.")
    if not told.serves:
        lines.append(f"Why not: {escape(told.why)}.")
    foot = f"Version {told.version}, {told.size / 1024:,.0f} KiB, {_time(told.seconds)}."
    items = "".join(f"<li>{line}</li>" for line in lines)
    return f'<p role="status">{head}</p><ul>{items}</ul><p class="small">{foot}</p>'


def kept_html(lesson: Lesson) -> str:
    """A way that ended well."""
    found = " The router may choose it by itself." if lesson.row.is_file() else ""
    return (
        f'<p role="status"><strong>Done.</strong> “{escape(lesson.title)}” serves in the layer {escape(lesson.layer)}: '
        f"choose it for your answers in the Chat tab.{found}</p>"
        f'<p class="small">Version {lesson.version}, {lesson.size / 1024:,.0f} KiB.</p>'
    )


def table_html(lessons: Sequence[Lesson], used: int, limits: Limits) -> str:
    """What a browser has taught."""
    if not lessons:
        return EMPTY
    head = "".join(f'<th scope="col" role="columnheader">{name}</th>' for name in _COLUMNS)
    rows = "".join(_row(lesson) for lesson in lessons)
    room = f"{used / 2**20:.1f} of {limits.size >> 20} MiB"
    foot = f"{len(lessons)} of {limits.adapters} adapters; {room}, with their earlier versions."
    return (
        '<table role="table"><caption class="hidden">What this browser has taught</caption>'
        f'<thead role="rowgroup"><tr role="row">{head}</tr></thead><tbody role="rowgroup">{rows}</tbody></table>'
        f'<p class="small">{foot}</p>'
    )


def _row(lesson: Lesson) -> str:
    seconds = "" if lesson.seconds is None else f"{lesson.seconds:,.1f}"
    cells = (
        lesson.title,
        lesson.layer,
        lesson.how,
        f"{lesson.size / 1024:,.0f}",
        seconds,
        str(lesson.version),
        _when(lesson.created),
    )
    return f'<tr role="row">{"".join(_cell(*pair) for pair in zip(_COLUMNS, cells, strict=True))}</tr>'


def _cell(column: str, text: str) -> str:
    if column == "Name":
        return f'<th scope="row" role="rowheader">{escape(text)}</th>'
    number = ' class="number"' if column in ("KiB", "Seconds", "Version") else ""
    return f'<td role="cell" data-label="{column}"{number}>{escape(text)}</td>'


def _when(created: str) -> str:
    try:
        return datetime.fromisoformat(created).strftime("%Y-%m-%d %H:%M UTC")
    except ValueError:
        return created


def _share(share: float) -> str:
    return f"{share:.0%}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
