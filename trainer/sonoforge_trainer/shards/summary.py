"""What is in a data set, in numbers and class names: nothing that names a patient, a clip or an image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sonoforge_trainer.contract import ShardManifest
from sonoforge_trainer.shards.reader import iterate
from sonoforge_trainer.storage import Storage


def summarise(manifest: ShardManifest) -> dict[str, Any]:
    """What the manifest alone tells. Histograms are texts of a range to the number of clips or patients in it."""
    clips = Counter(clip for shard in manifest.shards for clip in shard.clips)
    patients = Counter(patient for shard in manifest.shards for patient in shard.patients)
    unknown = patients.pop("", 0)
    lengths = [length for shard in manifest.shards for length in shard.lengths]
    counts = [shard.samples for shard in manifest.shards]
    return {
        "name": manifest.name,
        "synthetic": manifest.synthetic,
        "licence": manifest.licence,
        "citation": manifest.citation,
        "datasetDigest": manifest.dataset_digest,
        "samples": manifest.samples,
        "bytes": manifest.bytes,
        "imageBytes": {"least": min(lengths), "mean": round(sum(lengths) / len(lengths)), "most": max(lengths)},
        "shards": {"count": len(counts), "fewestSamples": min(counts), "mostSamples": max(counts)},
        "classes": list(manifest.classes),
        "maskClasses": list(manifest.mask_classes),
        "clips": {"count": len(clips), "byFrames": _histogram(clips.values())},
        "patients": {"count": len(patients), "samplesWithout": unknown, "byImages": _histogram(patients.values())},
    }


def tabulate(manifest: ShardManifest, base_uri: str, storage: Storage) -> dict[str, Any]:
    """Samples by split and label, masks and other fields; every shard is read and its digest checked."""
    splits: dict[str, Counter[str]] = {}
    fields: Counter[str] = Counter()
    masks = 0
    for sample in iterate(manifest, base_uri, storage):
        splits.setdefault(sample.fields["split"], Counter())[sample.fields["label"]] += 1
        fields.update(sample.fields.keys())
        masks += sample.mask is not None
    return {
        "splits": {name: dict(sorted(counts.items())) for name, counts in sorted(splits.items())},
        "masks": masks,
        "fields": dict(sorted(fields.items())),
    }


def _histogram(sizes: Iterable[int]) -> dict[str, int]:
    """Sizes in powers of two: `1`, `2-3`, `4-7` ..."""
    powers = Counter(size.bit_length() - 1 for size in sizes)
    return {(f"{2**power}-{2 ** (power + 1) - 1}" if power else "1"): count for power, count in sorted(powers.items())}
