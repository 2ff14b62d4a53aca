"""The ways in which the people of read_people.py are asked; several are kept for their test questions."""

from .forms import FORMS, Form
from .items import Item, Split
from .text import stable_fraction, stable_index


def _forms(seen: list[str], unseen: list[str]) -> tuple[Form, ...]:
    kept = [Form(f"seen{number}", template) for number, template in enumerate(seen)]
    return (*kept, *(Form(f"unseen{number}", template, unseen=True) for number, template in enumerate(unseen)))


PEOPLE_FORMS: dict[str, tuple[Form, ...]] = {
    **{kind: FORMS[kind] for kind in ("passage", "correct-ukrainian", "continue-ukrainian")},
    "rating": _forms(
        [
            "What would you give {title} ({genres})?",
            "{title} ({genres}): how many stars?",
            "Rate {title}. It is filed under {genres}.",
            "How much did you like {title}? {genres}",
            "Your rating, from 0.5 to 5.\n\n{title}\n{genres}",
            "I think of watching {title} ({genres}). What do you say, out of 5?",
            "{genres}: {title}. Stars?",
            "Out of five, where do you put {title} ({genres})?",
            "Film: {title}\nGenres: {genres}\nRating:",
            "Score this film for me: {title} ({genres}).",
        ],
        [
            "You have just come out of {title} ({genres}). Fill in the card by the door.",
            "{title} / {genres} / ? of 5",
            "If {title} were on tonight, and it is {genres}, what number would you put to it?",
        ],
    ),
    "reply": _forms(
        [
            "{quoted}",
            "Subject: {subject}\n\n{quoted}",
            "Answer this for me.\n\n{quoted}",
            'What would I write back? The subject is "{subject}".\n\n{quoted}',
            "Somebody wrote: {quoted}\n\nMy reply:",
            "Re: {subject}\n{quoted}\n\nWrite my answer.",
            "{quoted}\n\nReply in my own way.",
            "On the list, about {subject}:\n{quoted}",
            "I have to react to this. {quoted}",
            "Draft my response.\n---\n{quoted}",
        ],
        [
            "This came in while I was out, please deal with it as I would.\n\n{quoted}",
            "[unread] {subject}\n> {quoted}",
            "They are waiting for me to say something about this: {quoted}",
        ],
    ),
    "letter": _forms(
        [
            "{subject}",
            "Write my e-mail about this: {subject}",
            "Subject: {subject}",
            'I want to tell the list about "{subject}". Draft it.',
            "Please write a message for me. Subject: {subject}",
            "To the list: {subject}\n\n",
            "New mail, {subject}. Write it the way I do.",
            'What would I write under the heading "{subject}"?',
        ],
        [
            'Only the subject line of my mail survived, it said "{subject}". Restore the rest.',
            "compose > {subject}",
        ],
    ),
}


def choose_form(item: Item, split: Split) -> Form:
    """The form of an item, by hash of its id: seen ones, and in the test split an unseen one every second time."""
    unseen = split == "test" and stable_fraction(f"unseen:{item.id}") < 0.5
    choices = [form for form in PEOPLE_FORMS[item.kind] if form.unseen == unseen]
    return choices[stable_index(f"form:{item.id}", len(choices))]
