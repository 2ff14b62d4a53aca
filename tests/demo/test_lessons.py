"""What a browser teaches: private, kept, rolled back, forgotten without a trace, never in the model's own folder."""

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

pytest.importorskip("gradio")

from molora import MoLoRAModel
from molora.errors import MoLoRAError
from molora.factors import write_factors
from molora.personalize import embeddings
from molora.personalize.text_net import TextNet, TextNetConfig
from molora_demo.lessons import Lessons, Limits
from molora_demo.monitor import monitor_html
from molora_demo.page import Page
from molora_demo.remember import Stopped, missing
from molora_demo.render import Palette
from molora_demo.shelf import told_file
from molora_demo.source import LocalSource
from molora_training.plum import practice
from molora_training.plum.facts import read_facts
from molora_training.plum.learner import Learner
from tests.conftest import write_adapter
from tests.demo.fake_model import FakeModel
from tests.unit.spoken import make_spoken, save_spoken
from tests.unit.test_internalize import DOCUMENT, make_net
from tests.unit.test_pieces import make_pool
from tests.unit.test_profile_command import encode, write_history

ADA, BEN = "a" * 32, "b" * 32
CHAT = [SimpleNamespace(prompt="Hi! My zither is called Zoe. Is it loud?", answer="A zither is quiet.")]
MORE = [SimpleNamespace(prompt="I live in Bergen.", answer="It rains there.")]
NAMES = ("adapter_config.json", "adapter_model.safetensors")
LIMITS = Limits(epochs=3, lost=1e9)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved MoLoRA whose router keeps samples of its text, and an adapter for its base beside it."""
    folder = tmp_path_factory.mktemp("spoken")
    model = make_spoken(folder / "adapters", reads=(0, 1))
    chance = torch.Generator().manual_seed(0)
    for part in model.router.parts:
        rows = torch.arange(len(model.router.rows)).repeat(8)
        part.samples.set(torch.randn(len(rows), 16, generator=chance), rows)
    place = save_spoken(model, folder)
    write_adapter(_base(place), folder / "mine", 7)
    return place


@pytest.fixture
def model(saved: Path) -> MoLoRAModel:
    return MoLoRAModel.from_pretrained(saved, dtype=torch.float32)


@pytest.fixture
def files(saved: Path) -> list[Path]:
    return [saved.parent / "mine" / name for name in NAMES]


@pytest.fixture
def lessons(model: MoLoRAModel, tmp_path: Path) -> Lessons:
    return Lessons(model, tmp_path / "home", limits=LIMITS)


@pytest.fixture
def document(model: MoLoRAModel, tmp_path: Path) -> dict[str, Path]:
    make_net(model.base).save(tmp_path / "net")
    (tmp_path / "lamp.md").write_text(DOCUMENT)
    return {"document": tmp_path / "net"}


def digest(folder: Path) -> str:
    found = hashlib.sha256()
    for file in sorted(one for one in folder.rglob("*") if one.is_file()):
        found.update(str(file.relative_to(folder)).encode() + file.read_bytes())
    return found.hexdigest()


@torch.no_grad()
def logits(lessons: Lessons, key: str, selection: dict[str, Any], text: str = "The lamp is green.") -> torch.Tensor:
    ids = lessons.model.encode(text)
    return lessons.model(**ids, selection=lessons.visible(key, selection)).logits


def left_of(home: Path) -> list[Path]:
    return [one for one in home.rglob("*") if one.is_file()]


class TestPrivacy:
    def test_only_its_owner_sees_it_and_may_choose_it(self, lessons: Lessons, files: list[Path]) -> None:
        mine = lessons.bring(ADA, "domain", "My <b>law</b>", files)
        layer = lessons.model.stack["domain"]
        assert lessons.choices(ADA, layer)[-1] == ("My <b>law</b> (yours)", mine.name)
        public = [("math", "math"), ("code", "code")]
        assert lessons.choices(BEN, layer) == lessons.choices(None, layer) == public
        assert lessons.visible(ADA, {"domain": mine.name})["domain"] == mine.name  # it is in the model by now
        assert mine.name in layer.adapters and lessons.choices(BEN, layer) == public
        assert lessons.titles(ADA) == {mine.name: "My <b>law</b>"} and lessons.titles(BEN) == {}
        for choice in (mine.name, [mine.name], ["math", mine.name], {mine.name: 1.0}):
            with pytest.raises(MoLoRAError, match="has no adapter") as refused:
                lessons.visible(BEN, {"domain": choice})
            assert "law" not in str(refused.value) and "it has math, code" in str(refused.value)
        with pytest.raises(MoLoRAError, match="not among what this browser"):
            lessons.forget(BEN, "domain", mine.name)
        with pytest.raises(MoLoRAError, match="not among what this browser"):
            lessons.rollback(BEN, "domain", mine.name)
        assert lessons.table(BEN) == [] and len(lessons.table(ADA)) == 1

    def test_names_cannot_be_guessed_and_folders_are_for_nobody_else(self, lessons: Lessons, files: list[Path]) -> None:
        one, two = lessons.bring(ADA, "domain", "Same", files), lessons.bring(BEN, "domain", "Same", files)
        assert one.name != two.name and one.folder.parents[4] != two.folder.parents[4]
        for folder in (lessons.home, *(place for place in lessons.home.iterdir() if place.is_dir())):
            assert folder.stat().st_mode & 0o777 == 0o700
        assert not any(ADA in str(file) or ADA in file.read_text(errors="ignore") for file in left_of(lessons.home))

    def test_what_auto_is(self, lessons: Lessons, model: MoLoRAModel, files: list[Path]) -> None:
        assert lessons.visible(BEN, {}) == {"domain": ["math", "code"]}  # users are off by default
        mine = lessons.bring(ADA, "domain", "Mine", files)
        lessons.visible(ADA, {"domain": mine.name})
        for asked in ({}, {"domain": "auto"}):
            assert lessons.visible(BEN, asked)["domain"] == ["math", "code"]
        given = {"domain": ["code"], "user": None}
        assert lessons.visible(BEN, given) == given
        weighed = {"domain": {"math": 0.5, "code": 0.25}}
        assert lessons.visible(BEN, weighed) == weighed
        with pytest.raises(MoLoRAError, match="no choice"):
            lessons.visible(BEN, {"domain": 3})
        assert lessons.visible(BEN, {"user": "auto"}) == {"user": None, "domain": ["math", "code"]}
        yours = [lessons.bring(ADA, "user", title, files).name for title in ("One", "Two")]
        with pytest.raises(MoLoRAError, match="choose one") as refused:
            lessons.visible(ADA, {"user": "auto"})
        assert yours[0] not in str(refused.value)
        assert lessons.visible(BEN, {"user": "auto"})["user"] is None

    def test_a_keyed_layer_and_a_stack_without_a_router(self, model: MoLoRAModel, files: list[Path], tmp_path: Path):
        model.set_router(None)
        lessons = Lessons(model, tmp_path / "home")
        mine = lessons.bring(ADA, "domain", "Mine", files)
        assert lessons.visible(ADA, {}) == {} and lessons.visible(ADA, {"domain": "auto"}) == {"domain": "auto"}
        layer = model.stack["domain"]
        layer.keyed = True
        for number, name in enumerate(("math", "code")):
            model.keys.put("domain", name, torch.randn(4, 32) + 9 * number)
        told = model.find("2 + 2", {"domain": "auto"})
        assert lessons.visible(ADA, {"domain": mine.name})["domain"] == mine.name
        assert lessons.visible(ADA, {}) == lessons.visible(BEN, {}) == {"domain": ["math", "code"]}
        assert model.keys.of("domain", mine.name) is None and model.find("2 + 2", {"domain": "auto"}) == told
        with pytest.raises(MoLoRAError, match="no question finds it"):
            lessons.visible(ADA, {"domain": ["math", mine.name]})

    def test_logits_of_others_stay_bit_for_bit(self, lessons: Lessons, document: dict[str, Path], tmp_path: Path):
        lessons.networks = document
        selections: list[dict[str, Any]] = [{}, {"domain": "auto"}, {"domain": ["math"]}, {"domain": "code"}]
        before = [logits(lessons, BEN, one) for one in selections]
        unread = logits(lessons, ADA, {}, DOCUMENT)
        mine = lessons.document(ADA, "domain", "Lamp", tmp_path / "lamp.md")
        assert mine.row.is_file() and f"domain/{mine.name}" in lessons.model.router.rows
        assert lessons.visible(ADA, {})["domain"] == ["math", "code", mine.name]
        assert not torch.equal(logits(lessons, ADA, {}, DOCUMENT), unread)  # the router found it
        assert not torch.equal(logits(lessons, ADA, {"domain": mine.name}), before[0])
        for one, was in zip(selections, before, strict=True):
            assert torch.equal(logits(lessons, BEN, one), was)
        assert torch.equal(logits(lessons, BEN, {}, DOCUMENT), unread)

    def test_a_row_does_not_depend_on_what_others_taught(self, saved: Path, document: dict[str, Path], tmp_path: Path):
        rows = []
        for others in (False, True):
            own = Lessons(MoLoRAModel.from_pretrained(saved, dtype=torch.float32), tmp_path / str(others), document)
            if others:
                (tmp_path / "other.txt").write_text("A ship sails. The sea is deep and cold and green.")
                own.document(BEN, "domain", "Ship", tmp_path / "other.txt")
            rows.append(load_file(own.document(ADA, "domain", "Lamp", tmp_path / "lamp.md").row))
        assert all(torch.equal(tensor, rows[1][name]) for name, tensor in rows[0].items())


class TestKeeping:
    def test_roll_back_forget_and_nothing_left(self, lessons: Lessons, files: list[Path], saved: Path, tmp_path: Path):
        before = digest(saved)
        first = lessons.bring(ADA, "user", "Me", files)
        write_adapter(_base(saved), tmp_path / "two", 8)
        outs = [logits(lessons, ADA, {"user": first.name})]
        second = lessons.bring(ADA, "user", "Me", [tmp_path / "two" / name for name in NAMES])
        assert (second.name, second.version) == (first.name, 2)
        outs.append(logits(lessons, ADA, {"user": first.name}))
        assert not torch.equal(*outs)
        back = lessons.rollback(ADA, "user", first.name)
        assert back.version == 1 and torch.equal(logits(lessons, ADA, {"user": first.name}), outs[0])
        with pytest.raises(MoLoRAError, match="no version before"):
            lessons.rollback(ADA, "user", first.name)
        again = lessons.bring(ADA, "user", "Me", [tmp_path / "two" / name for name in NAMES])
        assert again.version == 2 and torch.equal(logits(lessons, ADA, {"user": first.name}), outs[1])
        lessons.forget(ADA, "user", first.name)
        assert left_of(lessons.home) == [] and lessons.table(ADA) == []
        assert lessons.model.stack["user"].adapters == {} and len(lessons.private) == 0
        with pytest.raises(MoLoRAError, match="has no adapter"):
            lessons.visible(ADA, {"user": first.name})
        assert digest(saved) == before

    def test_back_after_a_restart(self, lessons: Lessons, document: dict[str, Path], saved: Path, tmp_path: Path):
        lessons.networks = document
        mine = lessons.document(ADA, "domain", "Lamp", tmp_path / "lamp.md")
        wanted = [logits(lessons, ADA, one, DOCUMENT) for one in ({}, {"domain": mine.name})]
        later = Lessons(MoLoRAModel.from_pretrained(saved, dtype=torch.float32), lessons.home)
        assert later.model.stack["domain"].adapters.keys() == {"math", "code"}
        assert [one.title for one in later.table(ADA)] == ["Lamp"]
        for one, was in zip(({}, {"domain": mine.name}), wanted, strict=True):
            assert torch.equal(logits(later, ADA, one, DOCUMENT), was)
        other = MoLoRAModel.from_pretrained(saved, dtype=torch.float32)
        other.router.parts[0].output.bias.data += 0.5  # another router: its row means nothing there
        changed = Lessons(other, lessons.home)
        changed.visible(ADA, {})
        place = other.router.rows.index(f"domain/{mine.name}")
        assert all(float(part.output.bias[place]) < -1e3 for part in other.router.parts)

    def test_limits(self, model: MoLoRAModel, files: list[Path], tmp_path: Path) -> None:
        lessons = Lessons(model, tmp_path / "home", limits=Limits(adapters=2, live=2))
        names = [lessons.bring(ADA, "user", title, files).name for title in ("One", "Two")]
        with pytest.raises(MoLoRAError, match="2 things, the most"):
            lessons.bring(ADA, "user", "Three", files)
        assert lessons.bring(ADA, "user", "Two", files).version == 2
        other = lessons.bring(BEN, "user", "One", files).name
        for name in (*names, names[0]):
            lessons.visible(ADA, {"user": name})
        lessons.private.counts.clear()
        lessons.visible(BEN, {"user": other})
        assert set(model.stack["user"].adapters) == {names[0], other} and len(lessons.private) == 2
        lessons.visible(ADA, {"user": names[1]})  # back again, from the disk
        assert set(model.stack["user"].adapters) == {names[1], other}
        lessons.visible(ADA, {"user": names[1]})
        assert lessons.private.counts == {"hits": 1, "misses": 2, "evictions": 2}
        page = Page(LocalSource(model), Palette(model.stack.layers), lessons)
        told = re.sub(r"<[^>]+>", "", monitor_html(page, page.source.numbers()))
        assert "(hits)1" in told and "(misses)2" in told and "(evictions)2" in told
        lessons.limits = replace(lessons.limits, size=1000)
        with pytest.raises(MoLoRAError, match="no room"):
            lessons.bring(BEN, "user", "Two", files)

    @pytest.mark.parametrize("damaged", ["adapter_model.safetensors", "lessons.json", "molora.json", "version.json"])
    def test_damaged_files(self, lessons: Lessons, files: list[Path], damaged: str) -> None:
        mine = lessons.bring(ADA, "domain", "Mine", files)
        for file in lessons.home.rglob(damaged):
            file.write_bytes(b"{broken")
        assert lessons.visible(ADA, {})["domain"] == ["math", "code"]
        if damaged == "lessons.json":
            assert lessons.table(ADA)[0].name == mine.name  # its title is lost
        else:
            with pytest.raises(MoLoRAError):
                lessons.visible(ADA, {"domain": mine.name})
        lessons.forget_all(ADA)
        assert left_of(lessons.home) == []
        assert lessons.bring(ADA, "domain", "Mine", files).version == 1

    def test_without_a_key_nothing_is_taught(self, lessons: Lessons, files: list[Path]) -> None:
        for key in (None, "", "short", 7):
            with pytest.raises(MoLoRAError, match="no key"):
                lessons.bring(key, "user", "Me", files)
            assert lessons.table(key) == [] and lessons.used(key) == 0
        for title in ("", " ", "x" * 41, "a\0b"):
            with pytest.raises(MoLoRAError, match="name of 1 to 40"):
                lessons.bring(ADA, "user", title, files)
        assert left_of(lessons.home) == []

    def test_the_secret_of_all_keys_stays(self, lessons: Lessons) -> None:
        secret = lessons.secret()
        assert len(secret) == 32 and Lessons(lessons.model, lessons.home).secret() == secret
        assert (lessons.home / "secret").stat().st_mode & 0o777 == 0o600

    def test_a_stand_in_needs_no_weights(self, tmp_path: Path) -> None:
        fake = FakeModel()
        fake.base_name = "fake"
        lessons = Lessons(fake, tmp_path)
        assert lessons.visible(ADA, {"domain": "auto"}) == {"domain": ["math", "code", "medicine", "law"]}
        assert lessons.visible(None, {"user": "ada"})["user"] == "ada"


class TestUploads:
    def refused(self, lessons: Lessons, files: list[Path], match: str) -> None:
        before = digest(lessons.home), dict(lessons.model.adapters)
        with pytest.raises(MoLoRAError, match=match) as refused:
            lessons.bring(ADA, "domain", "Mine", files)
        assert str(lessons.home) not in str(refused.value)
        assert (digest(lessons.home), dict(lessons.model.adapters)) == before

    def test_what_does_not_fit_changes_nothing(self, lessons: Lessons, files: list[Path], tmp_path: Path) -> None:
        folder = tmp_path / "upload"
        write_factors(folder, {"model.layers.0.mlp.up_proj": (torch.randn(2, 31), torch.randn(48, 2))}, "tiny")
        self.refused(lessons, [folder / name for name in NAMES], "“Mine” maps 31 to 48")
        tensors = load_file(files[1])
        save_file({name: tensor * float("nan") for name, tensor in tensors.items()}, folder / NAMES[1])
        self.refused(lessons, [files[0], folder / NAMES[1]], "NaN")
        (folder / NAMES[1]).write_bytes(b"\x80\x04pickle")
        self.refused(lessons, [files[0], folder / NAMES[1]], "not safetensors")
        (folder / "adapter_model.bin").write_bytes(b"\x80\x04pickle")
        self.refused(lessons, [files[0], folder / "adapter_model.bin"], "two files")
        self.refused(lessons, [files[0]], "two files")
        (folder / NAMES[1]).write_bytes(b"0" * (32 * 2**20 + 1))
        self.refused(lessons, [files[0], folder / NAMES[1]], "Too large")

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            ({"rank_pattern": {"(a+)+$": 4}}, "name modules"),
            ({"lora_alpha": 10**400}, "above a million"),
            ({"use_dora": True}, "use_dora"),
            ({"r": 3}, "rank"),
        ],
    )
    def test_hostile_settings(self, lessons: Lessons, files: list[Path], tmp_path: Path, change: Any, match: str):
        config = {**json.loads(files[0].read_text()), **change}
        (tmp_path / NAMES[0]).write_text(json.dumps(config))
        self.refused(lessons, [tmp_path / NAMES[0], files[1]], match)


class TestWays:
    def test_without_networks_they_say_what_is_needed(self, lessons: Lessons, tmp_path: Path) -> None:
        for way in ("document", "description", "profile", "pieces"):
            assert f"--network {way}=" in lessons.unready(way) and "molora train" in lessons.unready(way)
        with pytest.raises(MoLoRAError, match="molora train hypernet doc"):
            lessons.document(ADA, "domain", "Lamp", tmp_path / "lamp.md")
        with pytest.raises(MoLoRAError, match="no network 'other'"):
            Lessons(lessons.model, tmp_path, {"other": tmp_path})

    def test_what_is_shipped_for_the_base_needs_not_be_named(
        self, model: MoLoRAModel, document: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        home = tmp_path / "starter"
        for kind in ("document", "profile"):
            (home / "hypernets" / kind).mkdir(parents=True)
            (home / "hypernets" / kind / "hypernet.json").write_text(json.dumps({"base": str(model.base_name)}))
        (home / "molora.json").touch()
        monkeypatch.setenv("MOLORA_STARTER", str(home))
        lessons = Lessons(model, tmp_path / "home")
        assert not lessons.unready("document") and not lessons.unready("profile")
        assert "none is shipped" in lessons.unready("description") and "none is shipped" in lessons.unready("pieces")
        given = Lessons(model, tmp_path / "home", document).networks
        assert given == {"profile": home / "hypernets" / "profile", **document}

    def test_a_document_that_cannot_be_read(self, lessons: Lessons, document: dict[str, Path], tmp_path: Path) -> None:
        lessons.networks = document
        (tmp_path / "empty.txt").write_text(" ")
        (tmp_path / "long.txt").write_text("word " * 20_000)
        for name, match in (("empty.txt", "no text"), ("long.txt", "too long"), ("gone.pdf", "no document")):
            with pytest.raises(MoLoRAError, match=match):
                lessons.document(ADA, "domain", "Lamp", tmp_path / name)
        assert left_of(lessons.home) == []

    def test_a_description_and_a_history(self, lessons: Lessons, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        model = lessons.model
        net = TextNet(TextNetConfig.for_base(model.base, str(model.base_name), 3, width=16, rank=2, encoder="words"))
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        net.save(tmp_path / "net")
        make_pool(model.base).save(tmp_path / "pool")
        monkeypatch.setattr(embeddings, "SentenceEncoder", lambda name: SimpleNamespace(encode=encode, name=name))
        lessons.networks = dict.fromkeys(("description", "profile"), tmp_path / "net")
        lessons.networks["pieces"] = tmp_path / "pool"
        blue = lessons.describe(ADA, "domain", "Blue", "likes blue")
        assert blue.how == "from a description" and not blue.row.is_file()
        assert lessons.visible(ADA, {})["domain"] == ["math", "code"]  # it acts when it is named
        base = logits(lessons, ADA, {"domain": None})
        assert not torch.equal(logits(lessons, ADA, {"domain": blue.name}), base)
        file = write_history(tmp_path / "ada.jsonl", "blue, of course")
        for way in ("profile", "pieces"):
            made = lessons.history(ADA, "ada", file, way)
            assert made.layer == "user" and not torch.equal(logits(lessons, ADA, {"user": made.name}), base)
        with pytest.raises(MoLoRAError, match="of user 'ada'"):
            lessons.history(ADA, "ben", file, "profile")
        with pytest.raises(MoLoRAError, match="1 to 500"):
            lessons.describe(ADA, "domain", "Blue", " ")
        assert not any(b"of course" in file.read_bytes() for file in left_of(lessons.home))


@pytest.mark.skipif(bool(missing()), reason="needs peft and bm25s")
class TestChats:
    @pytest.fixture(autouse=True)
    def right(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What is random says no fact ever, so its answers count as right."""
        monkeypatch.setattr(practice, "share_right", lambda _, facts: 1.0 if facts else 0.0)

    def test_a_chat_is_learnt_and_forgotten_without_a_trace(self, lessons: Lessons, saved: Path) -> None:
        before, steps = digest(saved), []
        base = logits(lessons, ADA, {})
        told = lessons.remember(ADA, "Me", CHAT, lambda done, of: steps.append((done, of)))
        assert told.serves and told.version == 2 and told.questions == 2 and told.older is None
        assert told.facts == ("Your zither is called Zoe.",) and told.everyday != 0
        assert steps[0][0] == 0 and steps[-1][0] == steps[-1][1] - 1
        (mine,) = lessons.table(ADA)
        assert mine.layer == "user" and mine.seconds is not None and mine.how == "from a chat"
        assert not torch.equal(logits(lessons, ADA, {"user": mine.name}), base)
        assert torch.equal(logits(lessons, ADA, {}), base)
        kept = told_file(mine.folder)
        assert [file for file in left_of(lessons.home) if b"zoe" in file.read_bytes().lower()] == [kept]
        assert not any(b"quiet" in file.read_bytes() for file in left_of(lessons.home))  # nor what was answered
        assert digest(saved) == before
        lessons.forget(ADA, "user", mine.name)
        assert left_of(lessons.home) == []

    def test_what_earlier_chats_told_is_practised_again(
        self, lessons: Lessons, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[list[str]] = []
        learn = Learner.learn

        def spy(self: Learner, pairs: Any, *args: Any) -> int:
            seen.append([pair.answer for pair in pairs])
            return learn(self, pairs, *args)

        monkeypatch.setattr(Learner, "learn", spy)
        lessons.limits = replace(lessons.limits, epochs=1)
        lessons.remember(ADA, "Me", CHAT)
        told = lessons.remember(ADA, "Me", MORE)
        assert told.version == 3 and told.facts == ("You live in Bergen.",) and told.older == (1.0, 1.0)
        assert set(seen[1]) == {"You live in Bergen.", *seen[0]}
        (mine,) = lessons.table(ADA)
        folder = mine.folder
        assert [fact.answer for fact in read_facts(told_file(folder))] == [*dict.fromkeys(seen[0]), told.facts[0]]
        back = lessons.rollback(ADA, "user", mine.name)  # the later chat goes, with what it told
        assert not told_file(folder).exists() and len(read_facts(told_file(back.folder))) == 1
        lessons.remember(ADA, "Other", MORE)  # what is learnt under another name is its own
        assert set(seen[2]) == {"You live in Bergen."}
        lessons.forget_all(ADA)
        assert left_of(lessons.home) == []

    def test_stopped_or_refused_it_is_as_if_nothing_was(self, lessons: Lessons, files: list[Path]) -> None:
        def stop(done: int, of: int) -> None:
            if done == 1:
                with pytest.raises(MoLoRAError, match="being learnt"):
                    lessons.forget_all(ADA)
                raise Stopped("enough")

        for there in (False, True):  # of a new adapter, and of one that is there
            before = {file: file.read_bytes() for file in left_of(lessons.home) if file.suffix == ".safetensors"}
            lessons.limits = replace(lessons.limits, epochs=4, lost=1e9)
            with pytest.raises(Stopped):
                lessons.remember(ADA, "Me", CHAT, stop)
            lessons.limits = replace(lessons.limits, epochs=1, lost=-1.0)
            told = lessons.remember(ADA, "Me", CHAT)
            assert not told.serves and "worse at everyday talk" in told.why
            left = {file: file.read_bytes() for file in left_of(lessons.home) if file.suffix == ".safetensors"}
            assert left == before and [one.version for one in lessons.table(ADA)] == [1] * there
            assert not any(b"Zoe" in file.read_bytes() for file in left_of(lessons.home))
            if not there:
                lessons.bring(ADA, "user", "Me", files)
        with pytest.raises(MoLoRAError, match="nothing to remember"):
            lessons.remember(ADA, "Me", [SimpleNamespace(prompt=" ", answer="")])
        with pytest.raises(MoLoRAError, match="such as “My dog is called Biscuit”"):
            lessons.remember(ADA, "New", [SimpleNamespace(prompt="Is my zither loud?", answer="I love zithers.")])
        assert [one.title for one in lessons.table(ADA)] == ["Me"]


def _base(saved: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(saved.parent / "base", dtype=torch.float32)
