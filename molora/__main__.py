"""``python -m molora``, which is what ``torchrun`` and ``accelerate launch`` start."""

from molora.cli import main

main()
