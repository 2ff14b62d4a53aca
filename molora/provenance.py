"""What a result says of where it comes from."""

import os
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of this code: MOLORA_COMMIT where it was brought without its history, "unknown" without either."""
    if os.environ.get("MOLORA_COMMIT"):
        return os.environ["MOLORA_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
