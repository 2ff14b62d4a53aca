"""Curves for TensorBoard, where it is installed."""

import sys
from pathlib import Path
from typing import Any


def curves(folder: Path, first_step: int) -> Any:
    """A TensorBoard writer, or None (told once) where TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("No curves are written: TensorBoard is missing (pip install 'molora[train]').", file=sys.stderr)
        return None
    return SummaryWriter(str(folder), purge_step=first_step + 1)
