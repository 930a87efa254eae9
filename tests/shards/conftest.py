"""Small images of every kind, made here; nothing is read from outside except where a fixture says so."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.storage import Storage

REAL = Path(__file__).parents[3] / "shared" / "data" / "ultrasound"


@pytest.fixture(autouse=True)
def _own_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or makes the user's key."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
    monkeypatch.delenv("SONOFORGE_HASH_KEY_FILE", raising=False)


@pytest.fixture
def storage() -> Storage:
    return Storage.from_env()


@pytest.fixture
def hasher() -> KeyHasher:
    return KeyHasher(b"0123456789abcdef")


@pytest.fixture
def speckle() -> Callable[..., np.ndarray]:
    """A gray picture that is different for each number."""

    def make(number: int = 0, height: int = 40, width: int = 48) -> np.ndarray:
        rng = np.random.default_rng(number)
        return np.clip(rng.rayleigh(40, (height, width)), 0, 255).astype(np.uint8)

    return make


@pytest.fixture
def encoded() -> Callable[..., bytes]:
    """A picture as the bytes of a file."""

    def make(pixels: np.ndarray | Image.Image, kind: str = "PNG", **options: Any) -> bytes:
        file = io.BytesIO()
        image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        image.save(file, kind, **options)
        return file.getvalue()

    return make


@pytest.fixture
def folder(tmp_path: Path, speckle: Callable[..., np.ndarray], encoded: Callable[..., bytes]) -> Callable[..., Path]:
    """A folder of JPEG files at the given relative paths."""

    def make(paths: Iterable[str], root: str = "source") -> Path:
        for number, path in enumerate(paths):
            file = tmp_path / root / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(encoded(speckle(number), "JPEG", quality=90))
        return tmp_path / root

    return make


@pytest.fixture
def table() -> Callable[..., Path]:
    """A CSV file of the given rows."""

    def make(file: Path, rows: list[Mapping[str, object]], delimiter: str = ",") -> Path:
        with file.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, list(rows[0]), delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
        return file

    return make


@pytest.fixture
def call() -> Callable[..., Result]:
    """Run a command in this process and give its exit code and output."""

    def run(command: Any, *arguments: object) -> Result:
        result = CliRunner().invoke(command, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder, hidden ones too."""

    def read(root: Path) -> dict[str, bytes]:
        return {str(f.relative_to(root)): f.read_bytes() for f in sorted(root.rglob("*")) if f.is_file()}

    return read


@pytest.fixture
def real() -> Path:
    """The folder of real ultrasound images."""
    if not (REAL / "mini").is_dir():
        pytest.skip(f"the real ultrasound images are not at {REAL}; see the readme for where to put them")
    return REAL
