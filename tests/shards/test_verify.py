"""Every kind of damage is found, and the object that has it is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from sonoforge_trainer.contract import ShardManifest, dataset_digest
from sonoforge_trainer.shards.cli import command
from sonoforge_trainer.shards.faults import DataSetError
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.reader import iterate, read_manifest
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import IntegrityError, ObjectNotFoundError, Storage

Call = Callable[..., Result]


@pytest.fixture
def phantoms(tmp_path: Path, storage: Storage) -> Path:
    """12 images of 32 pixels in three shards."""
    build_phantoms((tmp_path / "set").as_uri(), PhantomRule(12, 32, frames=1), PlanRule(4), storage)
    return tmp_path / "set"


def _verify(call: Call, folder: Path) -> list[str]:
    """The lines about faults of a data set that is not in order."""
    result = call(command, "verify", folder, "--decode")
    assert result.exit_code == 65
    *lines, last = result.output.strip().splitlines()
    assert last.endswith("copy or build them again")
    assert all(line.startswith(folder.as_uri()) for line in lines)
    return [line.removeprefix(folder.as_uri()).lstrip("/") for line in lines]


def _manifest(folder: Path, storage: Storage) -> ShardManifest:
    return read_manifest((folder / "shards.json").as_uri(), storage)


def test_a_data_set_in_order_passes(phantoms: Path, call: Call) -> None:
    result = call(command, "verify", phantoms, "--decode")
    assert result.output == "12 samples in 3 shards are as the manifest says\n"
    assert result.exit_code == 0
    assert call(command, "verify", (phantoms / "shards.json").as_uri()).exit_code == 0


def test_a_missing_shard_is_named(phantoms: Path, call: Call, storage: Storage) -> None:
    (phantoms / "phantoms-00001.tar").unlink()
    assert _verify(call, phantoms) == ["phantoms-00001.tar: is missing"]
    with pytest.raises(ObjectNotFoundError, match=r"phantoms-00001.tar"):
        list(iterate(_manifest(phantoms, storage), phantoms.as_uri(), storage))


def test_a_shard_cut_between_two_members_is_named(phantoms: Path, call: Call, storage: Storage) -> None:
    shard = phantoms / "phantoms-00001.tar"
    border = _manifest(phantoms, storage).shards[1].offsets[2] - 512
    shard.write_bytes(shard.read_bytes()[:border])
    first, second, third = _verify(call, phantoms)
    assert first.startswith(f"phantoms-00001.tar: damaged or cut at byte {border}")
    assert (
        second
        == f"phantoms-00001.tar: has {border} bytes, the manifest says {_manifest(phantoms, storage).shards[1].bytes}"
    )
    assert third == "phantoms-00001.tar: has another SHA-256 than the manifest says: it was altered"
    with pytest.raises(IntegrityError, match=r"phantoms-00001.tar"):
        list(iterate(_manifest(phantoms, storage), phantoms.as_uri(), storage))


def test_one_flipped_byte_of_an_image_is_found(phantoms: Path, call: Call, storage: Storage) -> None:
    shard = phantoms / "phantoms-00002.tar"
    data = bytearray(shard.read_bytes())
    data[_manifest(phantoms, storage).shards[2].offsets[0] + 400] ^= 1
    shard.write_bytes(data)
    assert "phantoms-00002.tar: has another SHA-256 than the manifest says: it was altered" in _verify(call, phantoms)
    with pytest.raises(IntegrityError):
        list(iterate(_manifest(phantoms, storage), phantoms.as_uri(), storage))


def test_a_tar_that_is_not_in_the_manifest_is_named(phantoms: Path, call: Call) -> None:
    (phantoms / "extra.tar").write_bytes((phantoms / "phantoms-00000.tar").read_bytes())
    assert _verify(call, phantoms) == ["extra.tar: is not in the manifest"]


def test_an_edited_manifest_is_refused(phantoms: Path, call: Call) -> None:
    file = phantoms / "shards.json"
    document = json.loads(file.read_text())
    document["shards"][0]["clips"][0] += 1
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"the manifest was edited or damaged"):
        ShardManifest.from_json(file.read_bytes())
    assert call(command, "verify", phantoms).exit_code == 64


def test_a_manifest_that_disagrees_with_its_shards_is_found_sample_by_sample(
    phantoms: Path, call: Call, storage: Storage
) -> None:
    """The digests fit, so only reading the samples can tell."""
    manifest = _manifest(phantoms, storage)
    first = manifest.shards[0]
    shard = first.model_copy(
        update={
            "offsets": (first.offsets[0] + 1, *first.offsets[1:]),
            "patients": (first.patients[0], "", *first.patients[2:]),
            "keys": (*first.keys[:3], "00000003-00000000"),
        }
    )
    shards = (shard, *manifest.shards[1:])
    changed = manifest.model_copy(
        update={
            "shards": shards,
            "dataset_digest": dataset_digest(shards),
            "classes": (),
            "mask_classes": ("background",),
        }
    )
    (phantoms / "shards.json").write_text(changed.to_json())
    lines = _verify(call, phantoms)
    for wanted in (
        "phantoms-00000.tar: holds 4 samples, the manifest 4, or their keys or order differ",
        "phantoms-00000.tar: sample 0: the image is not at the offset, or not of the length, that the manifest says",
        "phantoms-00000.tar: sample 1: the JSON names another clip or patient than the manifest",
        "phantoms-00001.tar: sample 0: the label is none of the manifest's classes",
    ):
        assert wanted in lines
    assert any("but there are 1 mask classes" in line for line in lines)
    with pytest.raises(DataSetError, match=r"phantoms-00000.tar: sample 3 has no readable JSON member"):
        list(iterate(changed, phantoms.as_uri(), storage))


def test_inspect_counts_without_identifiers(phantoms: Path, call: Call, storage: Storage) -> None:
    result = call(command, "inspect", phantoms, "--json")
    assert result.exit_code == 0
    found = json.loads(result.output)
    assert found["synthetic"] is True
    assert (found["samples"], found["shards"]["count"], found["masks"]) == (12, 3, 12)
    assert found["clips"] == {"count": 12, "byFrames": {"1": 12}}
    assert found["patients"] == {"count": 2, "samplesWithout": 0, "byImages": {"4-7": 2}}
    assert found["splits"] == {"": dict.fromkeys(("abdomen", "background", "femur", "head", "heart", "spine"), 2)}
    text = call(command, "inspect", phantoms).output
    assert "classes: abdomen, background, femur, head, heart, spine" in text
    for shard in _manifest(phantoms, storage).shards:
        for name in (*shard.keys, *shard.patients):
            assert name not in result.output + text
    assert "splits" not in json.loads(call(command, "inspect", phantoms, "--json", "--manifest-only").output)
