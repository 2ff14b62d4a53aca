"""Grouped execution of many LoRA adapters over the tokens that they act on."""

from molora_kernels.dispatch import Dispatch, Group, dispatch
from molora_kernels.reference import Factors, add_lora

__all__ = ["Dispatch", "Factors", "Group", "add_lora", "dispatch"]
