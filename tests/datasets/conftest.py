"""Data sets are tested with the small images and the helpers of the shard tests."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.shards.conftest import (  # noqa: F401 - fixtures
    _own_configuration,
    call,
    contents,
    encoded,
    folder,
    real,
    speckle,
    storage,
    table,
)

from sonoforge_trainer.contract import ShardManifest
from sonoforge_trainer.datasets.cli import command
from sonoforge_trainer.shards.reader import Sample, iterate, read_manifest
from sonoforge_trainer.storage import Storage

sys.path.insert(0, str(Path(__file__).parent))  # for layouts.py; tests are no package


@dataclass(frozen=True)
class Imported:
    """What an import wrote and printed."""

    manifest: ShardManifest
    samples: list[Sample]
    card: dict[str, Any]
    output: str

    @property
    def found(self) -> dict[str, int]:
        """Findings that are not zero."""
        return {finding["code"]: finding["count"] for finding in self.card["findings"] if finding["count"]}

    def by(self, *fields: str) -> list[tuple[str, ...]]:
        """Fields of all samples, sorted."""
        return sorted(tuple(str(sample.fields[field]) for field in fields) for sample in self.samples)


@pytest.fixture
def imported(tmp_path: Path, call: Callable[..., Any], storage: Storage) -> Callable[..., Imported]:  # noqa: F811
    """Import a set and read what was written."""

    def run(name: str, root: Path, *options: object, out: str = "out") -> Imported:
        result = call(command, "import", name, root, *options, "--output", tmp_path / out)
        assert result.exit_code == 0, result.output
        manifest = read_manifest((tmp_path / out / "shards.json").as_uri(), storage)
        samples = list(iterate(manifest, (tmp_path / out).as_uri(), storage))
        card = json.loads((tmp_path / out / "card.json").read_text())
        assert card["datasetDigest"] == manifest.dataset_digest
        return Imported(manifest, samples, card, result.output)

    return run


@pytest.fixture
def refused(tmp_path: Path, call: Callable[..., Any]) -> Callable[..., str]:  # noqa: F811
    """Try to import a set and give what was said; nothing may be written."""

    def run(name: str, root: Path, *options: object) -> str:
        result = call(command, "import", name, root, *options, "--output", tmp_path / "refused")
        assert result.exit_code in (64, 65), result.output
        assert not (tmp_path / "refused" / "shards.json").exists()
        return str(result.output)

    return run
