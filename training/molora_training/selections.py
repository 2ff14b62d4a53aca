"""Selections for batches of any size, made once."""

from molora import MoLoRAModel
from molora.selection import ResolvedSelection, Selection


class KeptSelections:
    """A selection for as many sequences as asked, on the model's device. Kept: a captured step reads it where it lies.

    Args:
        model: whose stack does not change.
        selection: of every sequence.
    """

    def __init__(self, model: MoLoRAModel, selection: Selection) -> None:
        self.model, self.selection = model, selection
        self._kept: dict[int, ResolvedSelection] = {}  # by sequences

    def __call__(self, sequences: int) -> ResolvedSelection:
        if sequences not in self._kept:
            resolved = self.model._resolve(self.selection).expand(sequences)
            self._kept[sequences] = resolved.to(self.model.device)
        return self._kept[sequences]
