"""The ways a question is asked. Several forms a kind are kept for the test split, to see whether routing reads the
subject or only the wording of a prompt.

A form is a template over an item's body and the style of answer it asks for. Bare forms hold no instruction at all;
they are listed twice where they are to come twice as often.
"""

from dataclasses import dataclass

from .items import Example, Item, Split
from .text import stable_fraction, stable_index


@dataclass(frozen=True)
class Form:
    """One wording: `template` over the body's names, `style` of the answer, `unseen` for test-only wordings."""

    name: str
    template: str
    style: str = "plain"
    unseen: bool = False


def _forms(seen: list[str | tuple[str, str]], unseen: list[str | tuple[str, str]]) -> tuple[Form, ...]:
    made = []
    for number, entry in enumerate([*seen, *unseen]):
        template, style = (entry, "plain") if isinstance(entry, str) else entry
        held_out = number >= len(seen)
        name = f"unseen{number - len(seen)}" if held_out else f"seen{number}"
        made.append(Form(name, template, style, held_out))
    return tuple(made)


FORMS: dict[str, tuple[Form, ...]] = {
    "math": _forms(
        [
            "{question}",
            "{question}",
            ("Solve this step by step, then put the result after ####.\n\n{question}", "hashes"),
            "Could you help me with this problem? {question}",
            "{question}\n\nShow your working.",
            "Here's one I'm stuck on:\n{question}",
            ("{question}\nBox the final result.", "boxed"),
            "Please work this out: {question}",
            "Q: {question}\nA:",
            "{question} Explain how you get there.",
            "Homework. {question}",
            ("Find the result and write it in bold at the end.\n{question}", "bold"),
        ],
        [
            "My daughter brought this home from school and I can't do it any more. {question} Many thanks!",
            ("I need the reasoning as well as the number in a box.\n---\n{question}\n---", "boxed"),
            "Exercise\n========\n{question}",
        ],
    ),
    "code": _forms(
        [
            "{task}",
            "{task}",
            ("{task} Put it in a code block.", "fenced"),
            "In {language}: {goal}",
            ("I need some {language} to {goal} Can you write it?", "fenced"),
            "{order} Use {language}. No explanation please.",
            ("Please implement this in {language}: {goal}", "fenced"),
            "{language}, one function: {goal}",
            ("How would I {goal} I'm using {language}.", "fenced"),
            "# {language}\n# TODO: {goal}",
            ("Show me {language} to {goal}", "fenced"),
            "{order}\n\nLanguage: {language}",
        ],
        [
            ("My colleague left a gap in our {language} sources: it should {goal} Would you fill it in?", "fenced"),
            "{language} / {goal}",
            ("Given this ticket, send a patch.\n\nTitle: {order}\nStack: {language}", "fenced"),
        ],
    ),
    "medicine": _forms(
        [
            "{question}",
            "{question}",
            "Choose the best option.\n\n{question}",
            "{question}\n\nWhich is right, and why?",
            "Could you help me revise? {question}",
            "Exam practice:\n{question}",
            "{question}\n\nPick one.",
            "Please answer the following.\n{question}",
            "I keep getting this wrong: {question}",
            "{question}\nExplain briefly if you can.",
            "Single best answer. {question}",
            "What would you tick here?\n\n{question}",
        ],
        [
            "Our study group disagrees about this item, could you settle it for us?\n\n{question}",
            "{question}\n\n(no calculators, two minutes)",
            "From last year's paper >> {question}",
        ],
    ),
    "science": _forms(
        [
            "{question}",
            "{question}",
            "{question}\n\nWhich one, and what is the reason?",
            "From a science test:\n{question}",
            "Can you answer this? {question}",
            "{question}\n\nPick one.",
            "Choose the best option.\n\n{question}",
            "My teacher asked: {question}",
            "Please answer the following.\n{question}",
            "{question}\nExplain briefly if you can.",
            "Quiz. {question}",
            "I am not sure about this one.\n\n{question}",
        ],
        [
            "We were arguing about it over dinner, so please decide.\n\n{question}",
            "[worksheet, last page] {question}",
            "A pupil of mine will ask me this tomorrow. {question} What do I say?",
        ],
    ),
    "puzzles": _forms(
        [
            "{question}",
            "{question}",
            ("{question} Answer in a sentence.", "sentence"),
            "Riddle: {question}",
            "Can you crack this?\n\n{question}",
            ("Say it in full. {question}", "sentence"),
            "{question}\n\nThe answer alone will do.",
            "Puzzle of the day\n{question}",
            "Try this one: {question}",
            ("{question}\nReply with a whole sentence, please.", "sentence"),
            "I bet you can't solve it. {question}",
            "{question} Just the answer.",
        ],
        [
            "This is from the back of a cereal box: {question}",
            ("Write the solution out as a sentence for the answer key.\n\n{question}", "sentence"),
            "Level 7 :: {question} :: go",
        ],
    ),
    "reading": _forms(
        [
            "{passage}\n\n{question}",
            "{passage}\n\n{question}",
            "{question}\n\n{passage}",
            "Read this and answer.\n\n{passage}\n\n{question}",
            "Text: {passage}\nQ: {question}\nA:",
            "Here is a text.\n{passage}\n\nMy question: {question}",
            "Please answer from the passage only. {passage} {question}",
            "{passage}\n---\n{question}",
            "I can't find it in here: {question}\n\n{passage}",
            "Going by this: {passage}\n\n{question}",
            "{question} (see below)\n\n{passage}",
        ],
        [
            "My glasses are broken, could you look it up for me? {question}\n\n> {passage}",
            "<page>{passage}</page> {question}",
            "Comprehension, part two.\n\n{passage}\n\n1. {question}",
        ],
    ),
    "commonsense": _forms(
        [
            "{question}",
            "{question}",
            "What is most likely?\n\n{question}",
            "{question}\n\nPick one.",
            "Choose the best option.\n\n{question}",
            "What makes sense here? {question}",
            "Just guess: {question}",
            "{question}\nWhich would you say?",
            "Please answer the following.\n{question}",
            "Think of everyday life. {question}",
            "Can you answer this? {question}",
        ],
        [
            "Which of these would my grandmother call obvious?\n\n{question}",
            "{question} << the sensible one, please",
            "A riddle for people, easy for them and hard for machines: {question}",
        ],
    ),
    "summary": _forms(
        [
            "{document}",
            "Summarise this case.\n\n{document}",
            "{document}\n\nWhat is this litigation about, in short?",
            "Give me the gist of the following proceedings: {document}",
            "{document}\n\nTL;DR",
            "Please write a short summary of the case below.\n{document}",
            "I have to brief a partner on this. Shorten it.\n\n{document}",
            "Case history:\n{document}\n\nSummary:",
            "What happened here? {document}",
            "Boil this down to a few sentences.\n---\n{document}",
        ],
        [
            "A journalist wants to know what came of this suit. What should I tell her?\n\n{document}",
            "{document}\n\n^ condense",
        ],
    ),
    "sequel": _forms(
        [
            "{document}",
            "{document}\n\nHow did the case go on?",
            "Continue this case history.\n\n{document}",
            "What happened next? {document}",
            "Please write the next part of these proceedings:\n{document}",
            "{document} ...",
            "Go on from here:\n\n{document}",
            "Carry on with the report.\n{document}",
        ],
        ["The second page of this docket note is lost. Can you restore it?\n\n{document}", "{document}\n\n[cont.]"],
    ),
    "clause": _forms(
        [
            "{question}",
            "{question} What would the policy say?",
            "Draft a clause that answers a customer who asks: {question}",
            "A user of our app wants to know: {question} Write the wording.",
            "Which terms would cover this? {question}",
            "Write it as it would stand in the terms: {question}",
            "Question from a reader: {question}",
            "Please give the passage that deals with this. {question}",
            "{question}\n\nReply in the language of a notice.",
            "FAQ: {question}",
        ],
        [
            "Our counsel is away; what do we publish if somebody asks us '{question}'?",
            "Support inbox, unanswered > {question}",
        ],
    ),
    "contract": _forms(
        [
            "{contract}\n\n{question}",
            "{question}\n\n{contract}",
            "Going by these terms: {contract}\n\n{question}",
            "Terms:\n{contract}\n\nQ: {question}\nA:",
            "Please read this and answer yes or no. {contract} {question}",
            "{question} Here is what I signed up to:\n{contract}",
        ],
        ["I am about to click 'accept' on the text below and only wonder: {question}\n\n> {contract}"],
    ),
    "support": _forms(
        [
            "{claim}\n\nWhich supports it?\n{options}",
            "{options}\n\nWhich of these backs the following: {claim}",
            "Pick the authority for this statement.\n{claim}\n\n{options}",
            "Claim: {claim}\n{options}",
            "Please choose the holding that fits. {claim}\n{options}",
        ],
        ["The judge asked me for a citation behind this: {claim} Which do I hand up?\n{options}"],
    ),
    "correct-ukrainian": _forms(
        [
            "{text}",
            "Виправ помилки: {text}",
            "{text}\n\nПеревір, будь ласка, цей текст.",
            "Чи є тут помилки? {text}",
            "Please correct my Ukrainian.\n\n{text}",
            "Відредагуй:\n{text}",
            "Я написав це швидко, подивися, чи все правильно. {text}",
            "{text}\n\nЯк це написати грамотно?",
            "Текст: {text}\nВиправлений текст:",
            "Допоможи з граматикою.\n{text}",
            "Proofread: {text}",
            "Зроби цей уривок правильним: {text}",
        ],
        [
            "Учителька сказала переписати без помилок. {text} Дякую!",
            "Знайди, що не так, і перепиши повністю.\n---\n{text}",
            "My colleague in Kyiv sent a draft and asks for a corrected version:\n{text}",
        ],
    ),
    "continue-ukrainian": _forms(
        [
            "{opening}",
            "{opening}",
            "Продовж: {opening}",
            "{opening}\n\nЩо далі?",
            "Continue this Ukrainian text: {opening}",
            "Допиши, будь ласка, цей абзац.\n{opening}",
            "{opening} ...",
            "Початок тексту: {opening}\nПродовження:",
            "Як могла б іти далі ця думка? {opening}",
            "Напиши наступні речення.\n\n{opening}",
            "Ось мій перший рядок: {opening}",
            "Розкажи далі. {opening}",
        ],
        [
            "Сторінку з продовженням загублено, віднови її: {opening}",
            "Go on in the same language.\n{opening}",
            "«{opening}» — і тут він замовк. Допиши за нього.",
        ],
    ),
    "passage": _forms(
        [
            "{opening}",
            "{opening}",
            "Continue: {opening}",
            "{opening}\n\nGo on.",
            "Write the paragraph that begins like this.\n\n{opening}",
            "Please carry on from here: {opening}",
            "My speech starts so: {opening} What comes next?",
            "Finish this passage.\n{opening}",
            "{opening} ...",
            "Draft: {opening}\n\nNow the rest, in my own voice.",
            "Keep writing.\n\n{opening}",
            "Here is my first sentence: {opening}",
        ],
        [
            "I lost my notes after this line, can you fill in what I would have said?\n\n{opening}",
            "[teleprompter] {opening} [more]",
            "Speechwriter, please take over: {opening}",
        ],
    ),
}


def choose_form(item: Item, split: Split) -> Form:
    """The form of an item, by hash of its id: seen ones, and in the test split an unseen one every second time."""
    unseen = split == "test" and stable_fraction(f"unseen:{item.id}") < 0.5
    choices = [form for form in FORMS[item.kind] if form.unseen == unseen]
    return choices[stable_index(f"form:{item.id}", len(choices))]


def to_example(item: Item) -> Example:
    """Puts an item into its form and its split."""
    split = item.split
    form = choose_form(item, split)
    messages = (
        {"role": "user", "content": form.template.format(**item.body)},
        {"role": "assistant", "content": item.answers.get(form.style, item.answers["plain"])},
    )
    return Example(item.id, item.domain, split, messages, f"{item.kind}/{form.name}", form.unseen)
