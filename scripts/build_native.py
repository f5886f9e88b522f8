"""Builds the runtime library into src/prunus/runtime, for work in the source folder: python scripts/build_native.py.

`pip install -e .` does the same. Needs a C++ compiler; CMake and Ninja are taken from the environment's own packages if
they are there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def main() -> None:
    """Configure and build; CMake's own messages say what is wrong if it fails."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    cmake = shutil.which("cmake", path=path)
    if cmake is None:
        sys.exit("cmake is not installed: pip install cmake ninja")
    generator = ["-G", "Ninja"] if shutil.which("ninja", path=path) else []
    build = ROOT / "build" / "native"
    environment = os.environ | {"PATH": path}
    subprocess.run([cmake, *generator, "-S", ROOT, "-B", build, *sys.argv[1:]], check=True, env=environment)
    subprocess.run([cmake, "--build", build], check=True, env=environment)


if __name__ == "__main__":
    main()
