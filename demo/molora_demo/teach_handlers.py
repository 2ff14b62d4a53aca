"""What happens on a click in the Teach tab."""

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.utils import get_upload_folder

from molora.errors import MoLoRAError
from molora_demo.lesson_words import kept_html, note_html, progress_html, table_html, told_html
from molora_demo.lessons import Lesson, Lessons
from molora_demo.remember import Stopped
from molora_demo.render import escape
from molora_demo.session import Running

BROKEN = "That did not work, and nothing was changed."
STOPPED = "Stopped. Nothing was learnt."
EVERYTHING = "everything"
REFRESH_S = 0.5
_log = logging.getLogger(__name__)


class Handlers:
    """What happens on a click. Each returns news as HTML and a counter, which goes up when something has changed."""

    def __init__(self, lessons: Lessons) -> None:
        self.lessons = lessons
        self._running = Running()

    def remember(
        self, request: gr.Request, key: str, title: str, turns: Sequence[Any], changed: int
    ) -> Iterator[tuple[str, int]]:
        """Learns the chat in a thread of its own, tells how far it is, and ends with what came of it."""
        session = str(request.session_hash)
        stop = self._running.start(session)
        news: queue.SimpleQueue[Any] = queue.SimpleQueue()

        def on_step(done: int, of: int) -> None:
            if stop.is_set():
                raise Stopped(STOPPED)
            news.put((done, of))

        def work() -> None:
            try:
                news.put(self.lessons.remember(key, title, turns or [], on_step))
            except Exception as error:  # it is told where the page is
                news.put(error)

        done, of, began = 0, 0, None
        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            while True:
                yield progress_html(title, done, of, time.monotonic() - (began or time.monotonic())), changed
                found = _last(news)
                if isinstance(found, tuple):
                    (done, of), began = found, began or time.monotonic()
                elif isinstance(found, Exception):
                    yield _refused(found), changed
                    return
                else:
                    yield told_html(found), changed + found.serves
                    return
        finally:  # also when the page is closed, or the event cancelled
            stop.set()
            self._running.finish(session)

    def stop(self, request: gr.Request) -> tuple[str, Any, Any]:
        """Ends this browser's learning, also one that waits."""
        self._running.stop(str(request.session_hash))
        return note_html(STOPPED), gr.update(interactive=True), gr.update(interactive=False)

    def bring(
        self, key: str, layer: str, title: str, files: Sequence[str] | None, changed: int
    ) -> tuple[str, int, Any]:
        return *self._once(lambda: self.lessons.bring(key, layer, title, _paths(files)), changed, files), None

    def document(self, key: str, layer: str, title: str, file: str | None, changed: int) -> tuple[str, int, Any]:
        files = [file] if file else None
        return *self._once(lambda: self.lessons.document(key, layer, title, _one(files)), changed, files), None

    def describe(self, key: str, layer: str, title: str, text: str, changed: int) -> tuple[str, int]:
        return self._once(lambda: self.lessons.describe(key, layer, title, text or ""), changed)

    def history(self, key: str, title: str, file: str | None, way: str, changed: int) -> tuple[str, int, Any]:
        files = [file] if file else None
        return *self._once(lambda: self.lessons.history(key, title, _one(files), way), changed, files), None

    def rollback(self, key: str, picked: str | None, changed: int) -> tuple[str, int]:
        def back() -> str:
            lesson = self.lessons.rollback(key, *_label(picked))
            return note_html(f"“{lesson.title}” is back at version {lesson.version}. The newer one is deleted.")

        return self._once(back, changed)

    def sure(self, key: str, picked: str | None) -> tuple[Any, str, str]:
        """Asks before something is deleted: (the row with the answers, the question, what is meant)."""
        text = "Delete the files of all that you have taught, for good?"
        if picked != EVERYTHING:
            names = {f"{one.layer}/{one.name}": one.title for one in self.lessons.table(key)}
            text = f"Delete “{names.get(str(picked), 'it')}” with all its versions, for good?"
        return gr.update(visible=True), note_html(text), picked or ""

    def forget(self, key: str, meant: str, changed: int) -> tuple[str, int]:
        def away() -> str:
            if meant == EVERYTHING:
                self.lessons.forget_all(key)
                return note_html("All that this browser taught is forgotten: the files are deleted.")
            lesson = self.lessons.forget(key, *_label(meant))
            return note_html(f"“{lesson.title}” is forgotten: its files are deleted.")

        return self._once(away, changed)

    def refresh(self, key: str, picked: str | None) -> tuple[Any, ...]:
        """(table, what can be picked, roll back, forget, forget all)."""
        try:
            lessons, used = self.lessons.table(key), self.lessons.used(key)
            page, damaged = table_html(lessons, used, self.lessons.limits), used > 0 and not lessons
        except MoLoRAError:
            lessons, damaged = [], True
            page = note_html("Your folder is damaged. Forget everything, and teach it again.", "closed")
        picks = [(f"{one.title} ({one.layer})", f"{one.layer}/{one.name}") for one in lessons]
        values = [value for _, value in picks]
        value = picked if picked in values else (values[-1] if values else None)
        some = gr.update(interactive=bool(lessons))
        drop = gr.update(choices=picks, value=value, interactive=bool(lessons))
        return page, drop, some, some, gr.update(interactive=bool(lessons) or damaged)

    def _once(
        self, make: Callable[[], str | Lesson], changed: int, files: Sequence[str] | None = None
    ) -> tuple[str, int]:
        try:
            made = make()
        except Exception as error:
            return _refused(error), changed
        finally:
            _remove(files)
        if isinstance(made, Lesson):
            gr.Info(escape(f"“{made.title}” is ready."))
            return kept_html(made), changed + 1
        return made, changed + 1


def _last(news: "queue.SimpleQueue[Any]") -> Any:
    """The latest step, or what came of all; waits for something."""
    found = news.get()
    time.sleep(REFRESH_S if isinstance(found, tuple) else 0)
    while isinstance(found, tuple) and not news.empty():
        found = news.get()
    return found


def _refused(error: Exception) -> str:
    """Says what went wrong in a sentence; what was not foreseen goes to the log, without anybody's text."""
    if isinstance(error, Stopped):
        return note_html(STOPPED)
    if not isinstance(error, MoLoRAError):
        _log.error("%s in the Teach tab", type(error).__name__)
    text = str(error) if isinstance(error, MoLoRAError) else BROKEN
    gr.Warning(escape(text))
    return note_html(text, "closed")


def _paths(files: Sequence[str] | None) -> list[Path]:
    return [Path(file) for file in files or ()]


def _one(files: Sequence[str] | None) -> Path:
    if not files:
        raise MoLoRAError("Choose a file first.")
    return Path(files[0])


def _remove(files: Sequence[str] | None) -> None:
    """What was uploaded is read, and need not lie about."""
    for file in _paths(files):
        if file.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
            file.unlink(missing_ok=True)


def _label(picked: str | None) -> tuple[str, str]:
    layer, slash, name = str(picked or "").partition("/")
    if not slash:
        raise MoLoRAError("Choose first what is meant.")
    return layer, name
