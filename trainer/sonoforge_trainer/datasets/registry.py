"""Every data set that can be imported by name."""

from __future__ import annotations

from sonoforge_trainer.datasets import (
    acouslic,
    african_planes,
    busi,
    camus,
    fass,
    fetal_planes,
    hc18,
    jnu_ifm,
    symphysis,
)
from sonoforge_trainer.datasets.importer import Importer

_ALL = (
    fetal_planes.IMPORTER,
    african_planes.IMPORTER,
    hc18.IMPORTER,
    jnu_ifm.IMPORTER,
    fass.IMPORTER,
    symphysis.PSFHS_IMPORTER,
    symphysis.AOP_IMPORTER,
    acouslic.IMPORTER,
    busi.IMPORTER,
    camus.IMPORTER,
)
IMPORTERS: dict[str, Importer] = {importer.about.name: importer for importer in _ALL}
"""By name on the command line."""
