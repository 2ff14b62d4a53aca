"""The wheel carries the starter stack inside the package, where molora/starter.py looks for it: it lies beside the
package here, and setuptools can only name what lies within one. All else is in pyproject.toml."""

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class WithStarter(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:  # an editable installation finds it in the repository
            target = Path(self.build_lib) / "molora" / "starter"
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree("starter", target)


setup(cmdclass={"build_py": WithStarter})
