"""Every data set that can be imported by name."""

from __future__ import annotations

from sonoforge_trainer.datasets import african_planes, fetal_planes, hc18
from sonoforge_trainer.datasets.importer import Importer

IMPORTERS: dict[str, Importer] = {
    module.IMPORTER.about.name: module.IMPORTER for module in (fetal_planes, african_planes, hc18)
}
"""By name on the command line."""
