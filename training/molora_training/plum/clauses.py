"""The parts of a text that its writer says of themselves, in no question and in no doubt."""

import re
from collections.abc import Iterator

_LEFT_OUT = "\x00"  # where something was; what stands around it is not understood
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`|^(?: {4}|\t|>)[^\n]*$", re.DOTALL | re.MULTILINE)
_QUOTED = re.compile(r"[\"“„«][^\"”“»]*(?:[\"”“»]|\Z)|(?<!\w)'[^'\n]*'(?!\w)")
_END = re.compile(r"[.!?…]+(?=\s|\Z)|\n+|;")
_ABBREVIATION = re.compile(r"(?:\b(?:mr|mrs|ms|dr|st|mt|prof|jr|sr|vs)|\b[a-z]|\be\.g|\bi\.e)\.$", re.IGNORECASE)
# A sentence with one of these is not surely true, of now and for long, or not surely said by the person for themselves.
_DOUBTFUL = re.compile(
    r"\b(?:if|unless|would|could|might|maybe|perhaps|possibly|probably|suppose|assume|wish|hope|should"
    r"|(?-i:will)|shall|were|was|had|used to|once|no longer|any ?more|almost|nearly|as though|role"
    r"|says?|said|saying|tells?|told|asks?|asked|writes?|wrote|thinks?|thought|claims?|believes?|heard|dreamt|dreamed"
    r"|kidding|joking|lying|you are|you're|example"
    r"|not|never|no|none|nobody|nothing|neither|nor|without|hardly|barely|cannot|\w+n't|dont"
    r"|today|tonight|tomorrow|yesterday|now|currently|soon|ago|lately|moment|sometimes|rarely)\b"
    r"|\bi'(?:d|ll)\b|[:@#<>{}\[\]()|\\=_*/~$%^\x00]|\d{7,}",
    re.IGNORECASE,
)
# In a turn with one of these what is said may be a text to work on, or a part that is played.
_PLAYED = re.compile(
    r"\b(?:translat\w+|rewrite|rephrase|paraphrase|proofread|summari[sz]e|correct|grammar|sentence|stor(?:y|ies)|poem"
    r"|lyrics|novel|riddle|role-?play|pretend|act as|imagine|character|(?:what|who) am i)\b",
    re.IGNORECASE,
)
_SUBJECT = r"(?:i|i'm|im|i've|my|call me|you can call me|the name of my)\b"
_CUT = re.compile(rf"(?:\s*,\s*(?:(?:and|but|so)\s+)?|\s+(?:and|but)\s+|\s+[-–—]+\s+)(?={_SUBJECT})", re.IGNORECASE)
_LEAD = re.compile(
    r"^(?:(?:hi|hello|hey|there|well|so|oh|ok|okay|yes|yeah|and|but|also|actually|please|btw|by the way|honestly|sure"
    r"|remember that|note that|thanks|thank you|good (?:morning|evening|day))\b[\s,]*)+",
    re.IGNORECASE,
)


def clauses(text: str) -> Iterator[str]:
    """Parts of a turn that begin with the person, of sentences that are no questions and in no doubt."""
    text = text.replace("’", "'").replace("‘", "'").replace("\r", "\n")
    for pattern in (_CODE, _QUOTED):
        text = pattern.sub(_LEFT_OUT, text)
    if _PLAYED.search(text):
        return
    for sentence in _sentences(text):
        if not _DOUBTFUL.search(sentence):
            for clause in _CUT.split(sentence):
                yield _LEAD.sub("", clause).strip(" ,-")


def _sentences(text: str) -> Iterator[str]:
    start = 0
    for match in _END.finditer(text):
        if match.group() == "." and _ABBREVIATION.search(text[max(start, match.end() - 8) : match.end()]):
            continue
        sentence, start = text[start : match.start()], match.end()
        if "?" not in match.group():
            yield " ".join(sentence.split())
    yield " ".join(text[start:].split())
