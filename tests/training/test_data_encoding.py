"""Rendering and encoding conversations, with a tokenizer made here: answers' borders, pairs, domains, padding."""

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from molora.chat import pieces, render
from molora.errors import BaseModelError, DataError
from molora_training.data import DOMAINS, IGNORED, Example, Part, collate, encode, encode_within

CONVERSATION = [
    {"role": "user", "content": "How many ducks?"},
    {"role": "assistant", "content": "Nine ducks, all told."},
    {"role": "user", "content": "Sort a list."},
    {"role": "assistant", "content": "def f(x):\n    return sorted(x)"},
]


def byte_tokenizer(template: str | None = None, marks: bool = True) -> PreTrainedTokenizerFast:
    """One token a byte, plus ChatML's two marks: nothing is ever merged across a border or lost."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner)
    if marks:
        tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = template
    return tokenizer


def test_chatml_has_no_system_message_of_its_own() -> None:
    template = "{{ '<|im_start|>system\nYou are a helpful AI<|im_end|>' }}"
    turns = CONVERSATION[:1]
    expected = "<|im_start|>user\nHow many ducks?<|im_end|>\n<|im_start|>assistant\n"
    assert render(byte_tokenizer(template), turns, add_generation_prompt=True) == expected
    assert render(byte_tokenizer(), turns, add_generation_prompt=True) == expected


def test_other_formats_use_their_own_template() -> None:
    template = (
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}</s> {% endfor %}"
        "{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    tokenizer = byte_tokenizer(template, marks=False)
    assert render(tokenizer, CONVERSATION[:1], True) == "[user] How many ducks?</s> [assistant] "
    found = pieces(tokenizer, CONVERSATION)
    assert "".join(piece.text for piece in found) == render(tokenizer, CONVERSATION)
    assert next(piece.text for piece in found if piece.answer) == "Nine ducks, all told.</s>"


def test_a_base_without_a_chat_format_and_bad_turns_are_refused() -> None:
    with pytest.raises(BaseModelError, match="chat template"):
        render(byte_tokenizer(marks=False), CONVERSATION)
    with pytest.raises(DataError, match="Message 1"):
        render(byte_tokenizer(), [CONVERSATION[0], {"role": "robot", "content": "x"}])
    with pytest.raises(DataError, match="at least one"):
        render(byte_tokenizer(), [])


def test_labels_are_exactly_the_answers_with_their_end() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(CONVERSATION, tokenizer, ["math", "code"])
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, CONVERSATION)
    answers = ["Nine ducks, all told.<|im_end|>", "def f(x):\n    return sorted(x)<|im_end|>"]
    for segment, answer in enumerate(answers):
        labelled = (encoded.labels != IGNORED) & (encoded.segments == segment)
        assert tokenizer.decode(encoded.input_ids[labelled]) == answer
        assert torch.equal(encoded.labels[labelled], encoded.input_ids[labelled])
    assert torch.equal(encoded.domain_ids, encoded.segments)  # math is domain 0 and pair 0, code 1 and 1
    assert all(tensor.dtype == torch.int64 for tensor in vars(encoded).values())


def test_a_system_turn_belongs_to_the_first_pair() -> None:
    turns = [{"role": "system", "content": "Be brief."}, *CONVERSATION]
    encoded = encode(turns, byte_tokenizer(), ["law", "code"])
    assert encoded.segments[0] == 0
    assert encoded.domain_ids[0] == DOMAINS.index("law")
    assert int(encoded.segments.max()) == 1


def test_encode_refuses_wrong_domains() -> None:
    with pytest.raises(DataError, match="2 pairs, but 1"):
        encode(CONVERSATION, byte_tokenizer(), ["math"])
    with pytest.raises(DataError, match="'cooking'"):
        encode(CONVERSATION, byte_tokenizer(), ["math", "cooking"])
    assert encode(CONVERSATION, byte_tokenizer(), ["math", "cooking"], ["cooking", "math"]).domain_ids[-1] == 0


TWO = (
    (Part("How many ducks?\n\nAlso: ", 0, False), Part("Sort a list.", 1, False)),
    (Part("Nine.\n\n", 0, True), Part("sorted(x)", 1, True)),
)


def turns_of(parts: tuple[tuple[Part, ...], ...]) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": r, "content": "".join(p.text for p in turn)} for r, turn in zip(roles, parts, strict=True)]


def test_parts_of_a_turn_have_their_own_pairs_and_domains() -> None:
    tokenizer, turns = byte_tokenizer(), turns_of(TWO)
    encoded = encode(turns, tokenizer, ["code", "law"], parts=TWO)
    assert tokenizer.decode(encoded.input_ids) == render(tokenizer, turns)
    for pair, (question, answer, domain) in enumerate(
        [("ducks?\n\nAlso: ", "Nine.\n\n", "code"), ("Sort a list.<|im_end|>\n", "sorted(x)<|im_end|>", "law")]
    ):
        own = encoded.segments == pair
        assert (encoded.domain_ids[own] == DOMAINS.index(domain)).all()
        labelled = own & (encoded.labels != IGNORED)
        assert tokenizer.decode(encoded.input_ids[labelled]) == answer
        assert question in tokenizer.decode(encoded.input_ids[own & ~labelled])


def test_a_document_is_judged_on_its_answers_alone() -> None:
    tokenizer = byte_tokenizer()
    text = (Part("1+1?\n", 0, False), Part("2", 0, True), Part("\n\nA tort?\n", 1, False), Part("A wrong.", 1, True))
    parts = ((Part("Page 1", 0, False),), text)
    encoded = encode(turns_of(parts), tokenizer, ["math", "law"], parts=parts)
    written = encoded.labels != IGNORED
    assert tokenizer.decode(encoded.input_ids[written]) == "2A wrong.<|im_end|>"
    assert encoded.domain_ids[written][0] == DOMAINS.index("math")


def test_parts_that_are_not_the_content_are_refused() -> None:
    turns = turns_of(TWO)
    with pytest.raises(DataError, match="turn 1 do not make up"):
        encode(turns, byte_tokenizer(), ["code", "law"], parts=(TWO[0], TWO[1][:1]))
    with pytest.raises(DataError, match="2 turns, but parts of 1"):
        encode(turns, byte_tokenizer(), ["code", "law"], parts=TWO[:1])


def test_collate_pads_on_the_right() -> None:
    tokenizer = byte_tokenizer()
    long = encode(CONVERSATION, tokenizer, ["math", "code"])
    short = encode(CONVERSATION[:2], tokenizer, ["law"])
    batch = collate([long, short], pad_id=0)
    size = short.input_ids.numel()
    assert batch.input_ids.shape == (2, long.input_ids.numel())
    assert batch.attention_mask.sum(dim=1).tolist() == [long.input_ids.numel(), size]
    assert torch.equal(batch.input_ids[1, :size], short.input_ids)
    for name, filler in (("input_ids", 0), ("labels", IGNORED), ("segments", -1), ("domain_ids", -1)):
        assert (getattr(batch, name)[1, size:] == filler).all()
    with pytest.raises(DataError):
        collate([], pad_id=0)


def test_examples_that_are_too_long_are_left_out_whole() -> None:
    rows = [
        Example(name, "math", "test", ({"role": "user", "content": name}, {"role": "assistant", "content": "Yes."}))
        for name in ("short", "x" * 400)
    ]
    assert len(encode_within(rows, byte_tokenizer(), max_tokens=200)) == 1
