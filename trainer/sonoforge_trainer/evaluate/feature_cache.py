"""Features of (checkpoint, data set, resolution), kept beside the checkpoint so that no pass is made twice.

features-KEY.json             which tensors, with their digest; written last and once: without it there are none
features-KEY-CONTENT.safetensors

They lie at the top of the checkpoint's prefix, so that retention removes them with its state; results, below `eval/`,
stay. What is damaged is made anew.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np
import numpy.typing as npt
import structlog
from safetensors.numpy import load, save

from sonoforge_trainer.contract import FEATURES, canonical_json
from sonoforge_trainer.evaluate.features import FeatureSet
from sonoforge_trainer.evaluate.once import write_first
from sonoforge_trainer.storage import IntegrityError, ObjectNotFoundError, Storage

VERSION = 1
"""Changes when the same images would give other features."""

_log = structlog.get_logger(__name__)


class FeatureCache:
    """The kept features of one key."""

    def __init__(
        self, storage: Storage, checkpoint_uri: str, *, checkpoint_digest: str, dataset_digest: str, resolution: int
    ) -> None:
        parts = [VERSION, checkpoint_digest, dataset_digest, resolution]
        key = hashlib.sha256(canonical_json(parts).encode()).hexdigest()[:16]
        self._storage, self._prefix = storage, checkpoint_uri
        self._base = f"{checkpoint_uri}/{FEATURES}{key}"

    def load(self) -> FeatureSet | None:
        """The features, or None where there are none that are sound."""
        try:
            index = json.loads(self._storage.read(f"{self._base}.json"))
            data = self._storage.read(f"{self._base}-{index['content']}.safetensors", sha256=index["sha256"])
            return FeatureSet.of_arrays(load(data))
        except ObjectNotFoundError:
            return None
        except (IntegrityError, ValueError, KeyError, TypeError) as error:
            _log.warning("kept features are damaged; the pass is made again", fault=type(error).__name__)
            self._storage.delete(f"{self._base}.json")
            return None

    def keep(self, features: FeatureSet) -> None:
        """Keep the features, unless another process was faster."""
        arrays: dict[str, npt.NDArray[Any]] = {n: np.ascontiguousarray(v) for n, v in features.arrays().items()}
        data = save(arrays)
        digest = hashlib.sha256(data).hexdigest()
        uri = f"{self._base}-{digest[:12]}.safetensors"
        self._storage.write(uri, data)
        index = canonical_json({"content": digest[:12], "sha256": f"sha256:{digest}"}).encode()
        if write_first(self._storage, self._prefix, f"{self._base}.json", index):
            return
        if json.loads(self._storage.read(f"{self._base}.json"))["content"] != digest[:12]:
            self._storage.delete(uri)
