"""What a keyed layer finds an adapter by, a file beside its weights: what the base makes of questions that are its own,
and no text (:mod:`molora.keys`)."""

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from molora.errors import AdapterFormatError, NonFiniteError

KEY_FILE = "key.safetensors"
MOST, MOST_BYTES = 256, 1 << 20  # questions that a key keeps, and their bytes
_QUESTIONS = "questions"


def kept(questions: torch.Tensor) -> torch.Tensor:
    """As many of ``questions`` [n, hidden] as a key keeps, spread evenly over their order; float32, on the CPU."""
    most = max(1, min(MOST, MOST_BYTES // (4 * questions.shape[1])))
    count = min(len(questions), most)
    return questions[torch.arange(count) * len(questions) // count].float().cpu()


def read_key(folder: Path) -> torch.Tensor | None:
    """The questions [n, hidden] of an adapter's folder, None if it has no key.

    Raises:
        AdapterFormatError: the file is damaged. NonFiniteError: it holds NaN or infinite values.
    """
    file = folder / KEY_FILE
    if not file.is_file():
        return None
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise AdapterFormatError(f"{file} is damaged or not safetensors ({error}).") from error
    questions = tensors.get(_QUESTIONS)
    if set(tensors) != {_QUESTIONS} or questions is None or questions.dim() != 2 or not len(questions):
        raise AdapterFormatError(f"{file} must hold {_QUESTIONS!r} alone, [questions, features].")
    if questions.dtype != torch.float32:
        raise AdapterFormatError(f"{file}: {_QUESTIONS} has dtype {questions.dtype}; a key is float32.")
    if not torch.isfinite(questions).all():
        raise NonFiniteError(f"{file} holds NaN or infinite values. Nothing was loaded.")
    return questions


def write_key(folder: Path, questions: torch.Tensor) -> None:
    """Gives an adapter's folder a key."""
    save_file({_QUESTIONS: kept(questions).contiguous()}, folder / KEY_FILE)
