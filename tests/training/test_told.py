"""What is found in a chat of what its person said of themselves, and what is left alone."""

import subprocess
import sys
from pathlib import Path

import pytest

from molora_training.plum.facts import VALUES, Fact, read_facts, together, write_facts
from molora_training.plum.told import LONGEST, MOST, told

FOUND = [
    # "My X is Y."
    ("My job is baker.", {"What is my job?": "Your job is baker."}),
    ("my favourite food is ramen", {"What is my favourite food?": "Your favourite food is ramen."}),
    ("My hobbies are chess, judo and art.", {"What are my hobbies?": "Your hobbies are chess, judo and art."}),
    ("My mother and father are teachers.", {"What are my mother and father?": "Your mother and father are teachers."}),
    ("My hobby is sailing.", {"What is my hobby?": "Your hobby is sailing."}),
    ("My goal is to run a marathon.", {"What is my goal?": "Your goal is to run a marathon."}),
    ("My dog is 3 years old.", {"How old is my dog?": "Your dog is 3 years old."}),
    ("My birthday is on 3 May.", {"When is my birthday?": "Your birthday is on 3 May."}),
    ("My train is at 5", {"When is my train?": "Your train is at 5."}),
    ("My office is in Oslo.", {"Where is my office?": "Your office is in Oslo."}),
    ("My wife is from Kyiv.", {"Where is my wife from?": "Your wife is from Kyiv."}),
    ("My best friend is my sister.", {"What is my best friend?": "Your best friend is your sister."}),
    # Names.
    ("My name is Ada Lovelace!", {"What is my name?": "Your name is Ada Lovelace."}),
    ("My name's Ada, nice to meet you.", {"What is my name?": "Your name is Ada."}),
    ("i'm called josé", {"What is my name?": "Your name is josé."}),
    ("Hello there, I’m Ada.", {"What is my name?": "Your name is Ada."}),
    ("Please call me Dr. Moss.", {"What do I want to be called?": "You want to be called Dr. Moss."}),
    ("My dog is called Biscuit.", {"What is my dog called?": "Your dog is called Biscuit."}),
    ("my dog's called Biscuit", {"What is my dog called?": "Your dog is called Biscuit."}),
    ("My dog's name is Biscuit.", {"What is my dog called?": "Your dog is called Biscuit."}),
    ("The name of my boat is Pearl.", {"What is my boat called?": "Your boat is called Pearl."}),
    ("My cats are called Tom and Jo.", {"What are my cats called?": "Your cats are called Tom and Jo."}),
    ("My cats are called Tom, Jo and Mia.", {"What are my cats called?": "Your cats are called Tom, Jo and Mia."}),
    ("my name is ada lovelace", {"What is my name?": "Your name is ada lovelace."}),
    ("My name is Vincent van Gogh.", {"What is my name?": "Your name is Vincent van Gogh."}),
    ("My friend Bob is a nurse.", {"What is my friend Bob?": "Your friend Bob is a nurse."}),
    # "I am a ..."
    ("I am a nurse.", {"What am I?": "You are a nurse."}),
    ("I'm vegan. I'm also an engineer", {"What am I?": "You are vegan and an engineer."}),
    ("im 34 years old", {"How old am I?": "You are 34 years old."}),
    ("I'm from Norway.", {"Where am I from?": "You are from Norway."}),
    ("I am allergic to nuts.", {"What am I allergic to?": "You are allergic to nuts."}),
    # "I love ..."
    ("I really love sailing very much!", {"What do I love?": "You love sailing."}),
    ("I hate my alarm clock.", {"What do I hate?": "You hate your alarm clock."}),
    ("I like tea. I like tea, I like jam", {"What do I like?": "You like tea and jam."}),
    ("I prefer tea to coffee.", {"What do I prefer?": "You prefer tea to coffee."}),
    ("I like to sail", {"What do I like?": "You like to sail."}),
    ("I love sailing because it is calm.", {"What do I love?": "You love sailing."}),
    ("I speak Norwegian.", {"What do I speak?": "You speak Norwegian."}),
    # "I live in ..."
    ("I live in St. Louis, and I work at the harbour.",
     {"Where do I live?": "You live in St. Louis.", "Where do I work?": "You work at the harbour."}),
    ("I work as a baker.", {"What do I work as?": "You work as a baker."}),
    ("I study physics. I study at Oxford.",
     {"What do I study?": "You study physics.", "Where do I study?": "You study at Oxford."}),
    ("I live with my two brothers.", {"Who do I live with?": "You live with your two brothers."}),
    # "I have ..."
    ("I have two sisters.", {"What do I have?": "You have two sisters."}),
    ("I've got a cat called Tom.",
     {"What do I have?": "You have a cat.", "What is my cat called?": "Your cat is called Tom."}),
    # Inside longer turns.
    ("Hi! Thanks for the recipe. By the way, my dog is called Biscuit and I live in Oslo, but what do I cook?", {}),
    ("Thanks! By the way, my dog is called Biscuit and I live in Oslo. What do I cook?",
     {"What is my dog called?": "Your dog is called Biscuit.", "Where do I live?": "You live in Oslo."}),
    ("Is it late?\nI am a nurse\nWhat do I eat?", {"What am I?": "You are a nurse."}),
    # Said twice: the later counts.
    ("I live in Oslo. I live in Bergen.", {"Where do I live?": "You live in Bergen."}),
]  # fmt: skip

LEFT_ALONE = [
    "", " \n\t", ".", "???", "\x00", "😀😀",
    # Questions.
    "Is my dog called Biscuit?", "What do I love?", "I love sailing?", "My name is what?!",
    # What somebody else says, or what is quoted.
    "He said, I love sailing.", 'Translate "My name is Ada."', "“I live in Oslo”", "'I love tea' is a song",
    "Translate: I live in Oslo", "> I live in Oslo", "Write a poem, I am a tree.", "My sister thinks I am a fool.",
    # What is denied, supposed, past or passing.
    "I don't like fish.", "I do not live in Oslo.", "My name is not Ada.", "I never work in Oslo", "I love nothing.",
    "My dog isn't called Rex", "I no longer live in Oslo.", "If I live in Oslo, I am a fool.", "I wish I was rich",
    "Suppose my name is Bob.", "I would love tea", "I'd like a cake.", "Maybe I am a poet.", "I might have a cold",
    "My name was Ada.", "I used to live in Oslo", "I am tired.", "My dog is sleeping.", "My dog is hungry",
    "I have a question.", "I have to go.", "I have been there.", "I'm a bit sad.", "My flight is tomorrow.",
    "You are a pirate, and I am a captain.", "I'm looking for a recipe",
    # What may be a text to work on, or a riddle.
    "Correct my English. I has a dog and I love tea.", "Continue the story. I live in a castle.",
    "Act as a pirate. I am a fish",
    "I have four legs. What am I?", "Let's role-play! My name is Max.", "Translate this for me. I live in Oslo.",
    # What nobody should teach.
    "My password is hunter2", "My PIN is 1234.", "My card number is 12",
    # What is not about a person, or not clear.
    "I like both",
    "I work at night.", "I live on my own.", "I work for ten years", "I study in the evening", "I study on Mondays",
    "I like the second option.", "My name is Ada and welcome", "Call me Ada instead", "I'm Greek", "I'm Vegan.",
    "My opinion is firm",
    "My question is simple.", "My code is broken.", "I love you.", "I like it.", "I like what you wrote",
    "My sister knows Paris is big.", "My sister lives in Lyon.", "I'm German.", "I'm Norwegian.", "I'm OK.",
    "Call me tomorrow", "Call me back", "My name is long", "I work on this", "I live there", "I play every day",
    "I and my dog", "My is.", "My dog is", "I am a", "I love", "my name is",
    # Other languages.
    "Je m'appelle Ada.", "Ich bin Ada. Ich liebe Tee.", "Мене звати Олена.", "我叫小明。我住在北京。", "Me llamo Ada",
    # Code and markup.
    "```\nmy name is Ada\n```", "```\nI live in Oslo", "`I love tea`", "    I love tea", "<b>I love tea</b>",
    "My name is <script>alert(1)</script>", "My job is [x](http://x)", "My email is ada@example.org",
    "My number is 5551234567", "my $name is Ada", "I love {0}", "# I love tea",
]  # fmt: skip


def answers(*texts: str) -> dict[str, str]:
    return {fact.asked[0][0]: fact.answer for fact in told([{"role": "user", "content": text} for text in texts])}


@pytest.mark.parametrize(("text", "wanted"), FOUND)
def test_sentences_are_turned_round(text: str, wanted: dict[str, str]) -> None:
    assert answers(text) == wanted


@pytest.mark.parametrize("text", LEFT_ALONE)
def test_what_is_not_surely_said_of_oneself_is_left_alone(text: str) -> None:
    assert answers(text) == {}


def test_what_stands_beside_it_does_not_matter() -> None:
    assert answers(" ".join(text for text in LEFT_ALONE[-9:] if "`" not in text) + "\n\nI love tea.") == {
        "What do I love?": "You love tea."
    }


def test_only_the_user_speaks_of_themselves() -> None:
    chat = [{"role": role, "content": "I am a robot. My name is Max."} for role in ("assistant", "system")]
    assert told(chat) == []
    assert answers("I love tea", "I love jam. My name is Ada", "My name is Eve") == {
        "What do I love?": "You love tea and jam.", "What is my name?": "Your name is Eve."
    }  # fmt: skip


def test_wordings() -> None:
    (dog, city) = told([{"role": "user", "content": "My dog is called Bo. I live in Ur."}])
    assert dog.taught == [
        "What is my dog called?", "What is the name of my dog?", "What is my dog's name?",
        "Do you remember what my dog is called?", "Tell me the name of my dog.", "I forgot my dog's name. Help me.",
    ]  # fmt: skip
    assert dog.apart == ["Remind me, please: what is my dog called?", "Can you say the name of my dog?"]
    assert city.taught[1:] == [
        "Do you remember where I live?",
        "Tell me where I live.",
        "I forgot where I live. Help me.",
    ]
    assert dog.is_in("It is called bo!") and not dog.is_in("It is called Max.") and not city.is_in("It is your town.")


def test_many_and_long_ones() -> None:
    chat = "".join(f"My {chr(97 + n)}-toy is part {n}. I love part {n}. " for n in range(26))
    found = told([{"role": "user", "content": chat * 50}])
    assert len(found) == MOST and all(len(fact.values) <= VALUES for fact in found)
    assert found == told([{"role": "user", "content": chat * 50}])
    assert answers("I live in Oslo. " + "word " * LONGEST) == {"Where do I live?": "You live in Oslo."}
    assert answers("I love " + "very " * 50 + "old tea.") == {}
    for text in ("my " * 9000, "I love " * 3000, "'" * LONGEST, '"' * LONGEST, "hi, " * 5000, "I'm a, " * 3000):
        assert answers(text) == {}


def test_later_chats_add_to_what_is_known_or_take_its_place() -> None:
    first = told([{"role": "user", "content": "I live in Oslo. I love tea. My name is Ada."}])
    later = told([{"role": "user", "content": "I love jam and I live in Rome."}])
    assert {fact.answer for fact in together(first, later)} == {
        "Your name is Ada.", "You love tea and jam.", "You live in Rome."
    }  # fmt: skip
    assert together(first, first) == first and together([], first) == first


def test_facts_are_kept_in_a_file(tmp_path: Path) -> None:
    facts = told([{"role": "user", "content": "My name is Олена. I love tea, I love jam."}])
    write_facts(tmp_path / "facts.jsonl", facts)
    assert read_facts(tmp_path / "facts.jsonl") == facts and all(isinstance(fact, Fact) for fact in facts)
    for damaged in ("{", "[]", '{"asked": 3}', '{"asked": [["a"]], "begun": "", "values": [], "many": false}'):
        (tmp_path / "facts.jsonl").write_text(damaged)
        assert read_facts(tmp_path / "facts.jsonl") == []
    assert read_facts(tmp_path / "none.jsonl") == []


def test_it_needs_no_torch() -> None:
    code = "import sys, molora_training.plum.told; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
