"""The wheels of the images, from the lock and checked against its digests: fetched once, used without a network.

python images/wheelhouse.py [FOLDER]
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LOCKS = tuple(ROOT / "requirements" / f"{name}.lock" for name in ("installer", "operator", "trainer"))
"""What installs, and what is installed in each image."""
PYTHON = "3.11"
"""Version of Python in the base image, if nothing else is said."""


class WheelhouseError(Exception):
    """A wheel is missing and cannot be fetched; the message says which."""


def default_folder() -> Path:
    """Outside the checkout, so that clones share it: the wheels of torch with CUDA are 3 GB."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sonoforge" / "wheels"


def fill(folder: Path, python: str = PYTHON) -> None:
    """Fetch the wheels that are missing. Asks nobody where all are there. Raises WheelhouseError."""
    done = folder / f"complete-{digest(python)}"
    if done.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    print(f"fetching the wheels of the images into {folder}, once: 3 GB", file=sys.stderr, flush=True)
    for lock in LOCKS:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        options = ["--no-deps", "--require-hashes", "--only-binary=:all:", f"--python-version={python}"]
        where = [f"--dest={folder}", f"--find-links={folder}", f"--requirement={lock}"]
        fetched = subprocess.run([*command, *options, *where], capture_output=True, text=True, check=False)
        if fetched.returncode:
            raise WheelhouseError(
                f"wheels of {lock.relative_to(ROOT)} for Python {python} cannot be fetched; run this once where a "
                f"package index is reached, or copy a filled folder to {folder}:\n{fetched.stderr[-1000:]}"
            )
    done.touch()


def digest(python: str = PYTHON) -> str:
    """Names what the wheelhouse holds: the locks and the version of Python."""
    return hashlib.sha256(b"".join([python.encode(), *(lock.read_bytes() for lock in LOCKS)])).hexdigest()[:16]


if __name__ == "__main__":
    try:
        fill(Path(sys.argv[1]) if len(sys.argv) > 1 else default_folder())
    except WheelhouseError as error:
        sys.exit(str(error))
