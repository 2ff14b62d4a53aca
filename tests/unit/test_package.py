"""What a wheel is made of: the packages, with the starter stack and the networks beside it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    steps = ["egg_info", "--egg-base", str(folder), "build_py", "--build-lib", str(folder / "lib")]
    subprocess.run([sys.executable, "setup.py", "-q", *steps], cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


def files(folder: Path) -> dict[str, int]:
    return {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}


def test_the_starter_is_in_it_whole(built: Path) -> None:
    assert "molora.json" in files(ROOT / "starter")
    assert files(built / "molora" / "starter") == files(ROOT / "starter")


def test_an_installed_package_finds_it(built: Path, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MOLORA_STARTER"}
    found = subprocess.run(
        [sys.executable, "-c", "import molora.starter as here; print(here.starter_folder())"],
        cwd=tmp_path, env={**environment, "PYTHONPATH": str(built)}, check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert Path(found.stdout.strip()) == built / "molora" / "starter"
