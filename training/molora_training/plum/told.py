"""What people say of themselves in a chat, as questions and answers about them.

Simple English sentences in the first person are turned round: "My dog is called Biscuit." becomes "What is my dog
called?" with the answer "Your dog is called Biscuit.". Questions, quotations, code, what is denied, supposed, past or
passing, and all that is not surely understood is left out: a fact that is missed can be said again, a wrong one stays.
"""

import re
from collections.abc import Callable, Iterable, Mapping

from molora_training.plum.clauses import clauses
from molora_training.plum.facts import Fact, together

MOST = 12  # facts of one chat, the first ones
LONGEST = 20_000  # characters of a turn that are read
_WORDS = 10  # of a value


def told(messages: Iterable[Mapping[str, str]]) -> list[Fact]:
    """What the user of a chat said of themselves: the first MOST facts, each once.

    Args:
        messages: turns with ``role`` and ``content``; those of other roles say nothing of the user.
    """
    found: list[Fact] = []
    for message in messages:
        if message["role"] == "user":
            for clause in clauses(message["content"][:LONGEST]):
                found = together(found, _facts(clause))
    return found[:MOST]


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_AM, _HAVE = r"(?:i am|i'm|im)", r"(?:i have|i've|i have got|i've got)"
_ADVERB = r"(?:(?:really|also|still|just|absolutely|mostly|mainly|particularly|especially|truly|both) )*"
_WHAT = r"(?P<what>[a-z][a-z'-]*(?: [a-z'-]+){0,3}?)"
_REST = r"(?P<rest>.+)"
_PLACE = r"(?P<at>in|at|near|on|by)"
_NUMBER = r"(?:\d{1,3}|[a-z]+(?:-[a-z]+)?)"
_VERBS = "love|like|enjoy|adore|prefer|hate|dislike|play|speak|collect|study|teach"
_COUNTED = r"(?:an?|one|two|three|four|five|six|seven|eight|nine|ten|several|many|\d{1,3})"
_FEELS = "vegan|vegetarian|married|single|retired|left-handed|right-handed|colou?r-?blind"
_DATED = re.compile(
    r"(?:on |in |at )?(?:the )?(?:\d|[A-Z][a-z]+day|(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\b)"
)

_NO_PLACE = re.compile(
    r"(?:nights?|weekends?|shifts|teams|peace|fear|general|free|fun|money|spring|summer|autumn|winter|yourself|your own"
    r"|the (?:morning|evening|afternoon|night|weekend|day)s?|[a-z]+ (?:hours|days|weeks|months|years))\b",
    re.IGNORECASE,
)
_NO_OBJECT = re.compile(
    r"(?:in|at|with|on|for|by|from|about|every|as|a lot|well|when|the (?:first|second|third|last|latter|former|idea"
    r"|answer|option|suggestion|version|way|sound|look))\b",
    re.IGNORECASE,
)
_FILLING = re.compile(r"(?:,? (?:too|very much|so much|a lot|a bit|as well|the most|most of all|by the way))+$", re.I)
_UNCLEAR = _words(
    "you your yours u we us our ours they them their he him his she her hers it its this that these those here there "
    "who which what when where while until since how why someone something everything anything everyone same such i am "
    "i'm im is are be been so than though although both"
)
_TURNED = {"my": "your", "me": "you", "mine": "yours", "myself": "yourself"}
_PASSING = _words(
    "tired hungry sick ill fine ok okay late ready lost gone asleep awake busy bored angry sad broken done full empty "
    "over due wrong right true clear simple sure sorry happy back new very too so going about always often kind"
)
# What is about the chat, and not about the person.
_TASKS = _words(
    "question questions point problem problems issue issues code program function script error bug task homework essay "
    "text mistake bad idea guess request answer prompt message meeting headache cold fever feeling suggestion doubt "
    "time look talk plan bit little lot few while hundred moment name query word words turn apologies opinion view "
    "understanding concern experience"
)
_SECRET = _words("password passwords passphrase passcode pin iban card account login token key ssn")
_ACTIVITIES = _words(
    "hobby hobbies passion passions sport sports job work activity activities goal goals dream dreams interest "
    "interests pastime pastimes ambition aim speciality specialty talent talents favourite favorite"
)
_NO_NAMES = _words(
    "a an the very too hard long short boring weird strange secret unusual rare common in on from at by for to with as "
    "and back when instead"
)
_PARTICLES = _words("de del della der di da du la le van von of the bin ibn al el y")
_NO_PERSONS = re.compile(
    r"(?:ish|ese|ian|ean|can|man|ch)$|^(?:OK|Okay|Fine|Good|Great|Sorry|Happy|Sure|Here|Home|Back|Done|Ready|Late|Tired"
    r"|Hungry|Lost|Bored|Greek|Swiss|Thai|Iraqi|Israeli|Pakistani|Arab|Turk|Dane|Swede|Pole|Finn|Scot|Brit|Serb|Croat"
    r"|Slovak|Muslim|Catholic|Buddhist|Hindu|Protestant|Vegan|Vegetarian|Black|White|Gay)$"
)


def _facts(clause: str) -> list[Fact]:
    """What a clause tells; the first rule that it is like says."""
    for pattern, rule in _RULES:
        if match := pattern.fullmatch(clause):
            return [fact for fact in rule(match) if all(fact.values)]
    return []


def _name(match: re.Match[str]) -> list[Fact]:
    asked = (("What is my name?", "what my name is"), ("Who am I?", "who I am"))
    return [Fact(asked, "Your name is", (_named(match["rest"]),))]


def _bare_name(match: re.Match[str]) -> list[Fact]:
    return [] if _NO_PERSONS.search(match["rest"]) else _name(match)


def _to_be_called(match: re.Match[str]) -> list[Fact]:
    asked = (("What do I want to be called?", "what I want to be called"),
             ("What should you call me?", "what you should call me"))  # fmt: skip
    return [Fact(asked, "You want to be called", (_named(match["rest"]),))]


def _called(match: re.Match[str]) -> list[Fact]:
    what = match["what"]
    be = "are" if (match.groupdict().get("be") or "is").lower() == "are" else "is"
    name = _named(match["rest"], several=be == "are")
    if not _thing(what, be):
        return []
    asked = ((f"What {be} my {what} called?", f"what my {what} {be} called"),
             (f"What is the name of my {what}?", f"the name of my {what}"),
             (f"What is my {what}'s name?", f"my {what}'s name"))  # fmt: skip
    return [Fact(asked if be == "is" else asked[:1], f"Your {what} {be} called", (name,))]


def _has_called(match: re.Match[str]) -> list[Fact]:
    return [*_has(match), *_called(match)]


def _has(match: re.Match[str]) -> list[Fact]:
    value = _value(match["has"])
    if _TASKS & set(value.lower().split()):
        return []
    return [Fact((("What do I have?", "what I have"),), "You have", (value,), many=True)]


def _old(match: re.Match[str]) -> list[Fact]:
    return [Fact((("How old am I?", "how old I am"),), "You are", (f"{match['rest'].lower()} years old",))]


def _from(match: re.Match[str]) -> list[Fact]:
    return [Fact((("Where am I from?", "where I am from"),), "You are from", (_value(match["rest"]),))]


def _allergic(match: re.Match[str]) -> list[Fact]:
    asked = (("What am I allergic to?", "what I am allergic to"),)
    return [Fact(asked, "You are allergic to", (_value(match["rest"]),), many=True)]


def _am(match: re.Match[str]) -> list[Fact]:
    value = _value(match["rest"])
    if _TASKS & set(value.lower().split()[:2]):
        return []
    return [Fact((("What am I?", "what I am"),), "You are", (value,), many=True)]


def _work_as(match: re.Match[str]) -> list[Fact]:
    return [Fact((("What do I work as?", "what I work as"),), "You work as", (_value(match["rest"]),))]


def _place(match: re.Match[str]) -> list[Fact]:
    verb, at, value = match["verb"].lower(), match["at"].lower(), _value(match["rest"])
    if _NO_PLACE.match(value) or _DATED.match(value):
        return []
    return [Fact(((f"Where do I {verb}?", f"where I {verb}"),), f"You {verb} {at}", (value,))]


def _live_with(match: re.Match[str]) -> list[Fact]:
    return [Fact((("Who do I live with?", "who I live with"),), "You live with", (_value(match["rest"]),))]


def _do(match: re.Match[str]) -> list[Fact]:
    verb, value = match["verb"].lower(), _value(match["rest"])
    if _NO_OBJECT.match(value):
        return []
    return [Fact(((f"What do I {verb}?", f"what I {verb}"),), f"You {verb}", (value,), many=verb != "prefer")]


def _is(match: re.Match[str]) -> list[Fact]:
    what, be, value = match["what"], match["be"].lower(), _value(match["rest"])
    first, *others = value.split() or [""]
    last = what.lower().split()[-1]
    if not _thing(what, be) or first.lower() in _PASSING:
        return []
    if first in ("in", "at", "near", "on") and others and last not in _ACTIVITIES:
        word, begun, value = "When" if _DATED.match(value) else "Where", f"{be} {first}", " ".join(others)
    elif last in ("birthday", "anniversary"):
        word, begun = "When", be
    elif first == "from" and others:
        asked = ((f"Where {be} my {what} from?", f"where my {what} {be} from"),)
        return [Fact(asked, f"Your {what} {be} from", (" ".join(others),))]
    elif value.endswith(("year old", "years old")):
        word, begun = "How old", be
    elif first.endswith("ing") or first == "to":  # what goes on, or what somebody does
        if last not in _ACTIVITIES and not what.lower().startswith(("favourite", "favorite")):
            return []
        word, begun = "What", be
    elif first in ("for", "with", "about", "of", "like", "as", "by", "than", "and", "or"):
        return []
    else:
        word, begun = "What", be
    asked = ((f"{word} {be} my {what}?", f"{word.lower()} my {what} {be}"),)
    return [Fact(asked, f"Your {what} {begun}", (value,))]


def _thing(what: str, be: str = "is") -> bool:
    """Whether these can be the words for something of a person's, with no verb among them."""
    *before, last = words = what.lower().split()
    if {last, words[0]} & _TASKS or set(words) & (_UNCLEAR | _SECRET) or ("and" in words and be == "is"):
        return False
    return not any(re.search(r"(?<![s'])s$|ed$", word) for word in before) and last not in ("of", "and", "in")


def _value(text: str) -> str:
    """What was said of something, in the second person; nothing if it is not surely understood."""
    text = _FILLING.sub("", re.split(r",? because\b", text, maxsplit=1)[0]).strip(" ,-")
    *first, last = text.split(", ")
    if first and not (re.search(r"\b(?:and|or)\b", last) and all(len(part.split()) <= 4 for part in (*first, last))):
        text = first[0]  # what follows is no list, but something else
    words = [_TURNED.get(word.lower(), word) for word in text.split()]
    bare = {word.lower().strip(",.'") for word in text.split()}
    plain = re.fullmatch(r"[^\W_](?:[^\W_]|[' ,.&+-])*", text)
    return " ".join(words) if plain and len(words) <= _WORDS and not bare & _UNCLEAR else ""


def _named(text: str, several: bool = False) -> str:
    """A name, or several; nothing if it is none."""
    name = _value(text if several else text.split(",")[0])
    words = [word for word in name.replace(",", "").split() if not (several and word == "and")]
    small = [word for word in words if not word[0].isupper()]
    one = (len(words) <= 2 and small == words) or all(word in _PARTICLES for word in small)
    return name if words and len(words) <= 5 and one and not set(map(str.lower, words)) & _NO_NAMES - _PARTICLES else ""


Rule = Callable[[re.Match[str]], list[Fact]]


def _rule(pattern: str, rule: Rule, flags: int = re.IGNORECASE) -> tuple[re.Pattern[str], Rule]:
    return re.compile(pattern, flags), rule


_RULES = (
    _rule(rf"(?:my (?:full |first )?name(?:'s| is)|{_AM} (?:called|named)) {_REST}", _name),
    _rule(r"I(?: am|'m) (?P<rest>[A-Z][\w'-]+(?: [A-Z][\w'-]+)?)", _bare_name, 0),
    _rule(r"(?:[Yy]ou can )?[Cc]all me (?P<rest>[A-Z].*)", _to_be_called, 0),
    _rule(rf"my {_WHAT}(?:'s| (?P<be>is|are)) (?:called|named) {_REST}", _called),
    _rule(rf"my {_WHAT}'s name is {_REST}", _called),
    _rule(rf"the name of my {_WHAT} is {_REST}", _called),
    _rule(rf"{_HAVE} (?P<has>an? {_WHAT}) (?:called|named) {_REST}", _has_called),
    _rule(rf"{_HAVE} (?P<has>{_COUNTED} .+)", _has),
    _rule(rf"{_AM} (?P<rest>{_NUMBER}) years? old", _old),
    _rule(rf"(?:{_AM}|i come) from {_REST}", _from),
    _rule(rf"{_AM} allergic to {_REST}", _allergic),
    _rule(rf"{_AM} {_ADVERB}(?P<rest>an? .+|{_FEELS})", _am),
    _rule(rf"i {_ADVERB}work as {_REST}", _work_as),
    _rule(rf"i {_ADVERB}(?P<verb>live|study) {_PLACE} {_REST}", _place),
    _rule(rf"i {_ADVERB}(?P<verb>work) (?P<at>in|at|for|near) {_REST}", _place),
    _rule(rf"i {_ADVERB}live with {_REST}", _live_with),
    _rule(rf"i {_ADVERB}(?P<verb>{_VERBS}) {_REST}", _do),
    _rule(rf"my {_WHAT} (?P<be>is|are) {_REST}", _is),
)
