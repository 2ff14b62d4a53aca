"""Where the starter stack lies: the saved MoLoRA that every command uses when it is given none."""

import os
from pathlib import Path

from molora.errors import StackError

VARIABLE = "MOLORA_STARTER"
MANIFEST = "molora.json"


def starter_folder() -> Path:
    """The folder of the starter stack: ``$MOLORA_STARTER``, else ``starter`` of the repository or of the package.

    Raises:
        StackError: there is none.
    """
    chosen = os.environ.get(VARIABLE)
    if chosen:
        folder = Path(chosen).expanduser()
        if not (folder / MANIFEST).is_file():
            raise StackError(f"{VARIABLE} is {folder}, which holds no {MANIFEST}: name the folder of a saved MoLoRA.")
        return folder
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "starter", package / "starter"):
        if (folder / MANIFEST).is_file():
            return folder
    raise StackError(f"This installation carries no starter stack: name a saved MoLoRA, or set {VARIABLE} to one.")
