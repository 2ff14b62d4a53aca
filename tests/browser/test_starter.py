"""Every tab's main path on the starter stack."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Page, expect

from molora.personalize import embeddings
from molora.personalize.text_net import TextNet, TextNetConfig
from molora.starter import VARIABLE
from molora_demo.app import build, local, serve
from molora_demo.lessons import Lessons
from molora_training.hypernet.lessons import Needles
from tests.browser.visit import ask, tab
from tests.unit.test_profile_command import encode, write_history
from tools.screenshot import free_port

STARTER = Path(__file__).parents[2] / "starter"


@pytest.fixture(scope="module")
def starter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The demo as it is started without options, but for a network for profiles that has learnt nothing."""
    source, shipped = local(STARTER), tmp_path_factory.mktemp("starter")
    shutil.copytree(STARTER / "hypernets" / "document", shipped / "hypernets" / "document")
    config = TextNetConfig.for_base(source.model.base, source.model.base_name, 3, width=16, rank=2, encoder="words")
    TextNet(config).save(shipped / "hypernets" / "profile")
    (shipped / "molora.json").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, str(shipped))
        patch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=encode, name=name))
        blocks = build(source, Lessons(source.model, tmp_path_factory.mktemp("lessons")))
        yield serve(blocks, port=free_port(), open_browser=False, block=False)
        blocks.close(verbose=False)


def drop(page: Page, field: str, file: Path) -> None:
    """Drags a text file onto a field for files, by the field's label."""
    given = {"name": file.name, "text": file.read_text()}
    dragged = page.evaluate_handle(
        "({name, text}) => { const data = new DataTransfer(); data.items.add(new File([text], name)); return data; }",
        given,
    )
    label = page.get_by_test_id("block-label").get_by_text(field, exact=True)
    target = page.locator(".block", has=label).get_by_role("button", name="drop files")
    target.last.dispatch_event("drop", {"dataTransfer": dragged})
    expect(
        page.locator(".file-preview", has_text=file.stem)
    ).to_be_visible()  # only now it is there: not while it comes


def cells(page: Page, name: str) -> dict[str, str]:
    """The table's row of what was taught under a name, by column."""
    row = page.locator(".block.teach-table tbody tr", has=page.get_by_role("rowheader", name=name))
    expect(row).to_have_count(1)
    found = row.locator("td").evaluate_all("all => all.map(one => [one.dataset.label, one.innerText])")
    return dict(found)


def test_every_tabs_main_path(visit: Callable[..., Page], starter: str) -> None:
    page = visit(starter)
    assert ask(page, "Write a Python function that adds two numbers.")
    expect(page.locator("#conversation .shares").last).to_contain_text("code")

    tab(page, "Compare")
    page.get_by_label("number input for Most new tokens").last.fill("16")
    page.keyboard.press("Tab")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".compare .pane .stats:not(.waits)")).to_have_count(4)
    expect(page.get_by_role("button", name="Compare")).to_be_enabled()
    assert "no domain adapter 100%" in page.locator(".compare .pane").first.inner_text()

    tab(page, "Routes")
    page.get_by_role("button", name="Medicine and code").click()
    expect(page.locator("#reading .tok").first).to_be_visible()
    page.locator("#reading .tok", has_text="return").first.click()
    expect(page.locator("#detail")).to_contain_text("code")
    with page.expect_download() as told:
        page.get_by_role("button", name="Download CSV").click()
    assert "return" in told.value.path().read_text("utf-8-sig")

    tab(page, "Teach")
    page.get_by_role("button", name="Bring an adapter").click()
    folder = STARTER / "adapters" / "personality" / "pirate"
    page.locator("input[type=file]").first.set_input_files(
        [folder / "adapter_config.json", folder / "adapter_model.safetensors"]
    )
    page.get_by_label("Name").nth(1).fill("My pirate")
    page.get_by_label("Layer").first.click()
    page.get_by_role("option", name="personality", exact=True).click()
    expect(page.get_by_text("adapter_model.safetensors", exact=False).first).to_be_visible()
    page.get_by_role("button", name="Bring it").click()
    expect(page.locator(".block.teach-table")).to_contain_text("My pirate")
    tab(page, "Chat")
    page.get_by_label("Personality", exact=True).first.click()
    page.get_by_role("option", name="My pirate (yours)").click()
    page.keyboard.press("Escape")
    ask(page, "Who are you?")
    expect(page.locator("#conversation .shares").last).to_contain_text("My pirate 100%")

    other = visit(starter)
    other.get_by_label("Personality", exact=True).first.click()
    expect(other.get_by_role("option", name="pirate", exact=True)).to_be_visible()
    expect(other.get_by_role("option", name="My pirate (yours)")).to_have_count(0)

    tab(page, "Teach")
    page.get_by_role("button", name="Forget", exact=True).click()
    page.get_by_role("button", name="Yes, delete it").click()
    expect(page.locator(".block.teach-table")).not_to_contain_text("My pirate")
    tab(page, "Chat")
    page.get_by_label("Personality", exact=True).first.click()
    expect(page.get_by_role("option", name="pirate", exact=True)).to_be_visible()
    expect(page.get_by_role("option", name="My pirate (yours)")).to_have_count(0)

    tab(page, "Monitor")
    expect(page.locator("#monitor tr", has_text="Answers on this page").locator("td")).to_have_text("6")


def test_a_dropped_document_and_a_history_become_adapters_at_once(
    visit: Callable[..., Page], starter: str, tmp_path: Path
) -> None:
    (lesson,) = Needles(tokens=(32, 160), count=1).held_out()["needles"]
    ((question, answer),) = lesson.questions
    (tmp_path / "filler.txt").write_text(lesson.text)
    page = visit(starter)
    tab(page, "Teach")
    page.get_by_role("button", name="Drop a document").click()
    drop(page, "Document", tmp_path / "filler.txt")
    page.get_by_role("button", name="Read it").click()
    found = cells(page, "My document")
    assert (found["Layer"], found["How"], found["Version"]) == ("domain", "from a document", "1")
    assert int(found["KiB"].replace(",", "")) > 0 and float(found["Seconds"]) > 0

    page.get_by_role("button", name="Give a history").click()
    drop(page, "History", write_history(tmp_path / "history.jsonl", "blue, of course"))
    page.get_by_label("Whose").fill("ada")
    page.get_by_role("button", name="Make it").last.click()
    found = cells(page, "ada")
    assert (found["Layer"], found["How"], found["Version"]) == ("user", "from a history, by its profile", "1")

    tab(page, "Chat")
    page.get_by_label("Domain", exact=True).first.click()
    page.get_by_role("option", name="My document (yours)").click()
    page.keyboard.press("Escape")
    assert answer.rstrip(".").split()[-1] in ask(page, question)
    expect(page.locator("#conversation .shares").last).to_contain_text("My document")
