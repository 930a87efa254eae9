"""MetaImage, NIfTI and NumPy object arrays are read to the value, and broken or hostile files are refused."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from layouts import mha, nifti, npy

from sonoforge_trainer.datasets.formats.metaimage import frames, read_array, read_header
from sonoforge_trainer.datasets.formats.nifti import read_nifti
from sonoforge_trainer.datasets.formats.objectarray import read_dictionary
from sonoforge_trainer.shards.faults import ImageError

VOLUME = np.arange(5 * 4 * 3).reshape(5, 4, 3)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ["uint8", "int16", "uint16", "float32"])
def test_metaimage_is_read_slowest_dimension_first(tmp_path: Path, kind: str, compressed: bool) -> None:
    values = VOLUME.astype(kind)
    file = mha(tmp_path / "a.mha", values, (0.28, 0.3, 1.0), compressed=compressed)
    found = read_array(file)
    assert found.dtype == values.dtype
    assert (found == values).all()
    assert read_header(file).spacing == (1.0, 0.3, 0.28)
    assert [frame.shape for frame in frames(file)] == [(4, 3)] * 5


def test_a_large_compressed_metaimage_is_read_in_pieces(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 3, (40, 300, 400), np.uint8)
    file = mha(tmp_path / "a.mha", values, (1, 1, 1), compressed=True)
    for number, frame in enumerate(frames(file)):
        assert (frame == values[number]).all()
    assert number == 39


@pytest.mark.parametrize("compressed", [False, True])
def test_a_truncated_metaimage_is_refused(tmp_path: Path, compressed: bool) -> None:
    values = np.random.default_rng(0).integers(0, 255, (4, 30, 40), np.uint8)
    file = mha(tmp_path / "a.mha", values, (1, 1, 1), compressed=compressed)
    file.write_bytes(file.read_bytes()[:-400])
    with pytest.raises(ImageError, match="truncated"):
        read_array(file)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (b"ElementDataFile = LOCAL", b"ElementDataFile = other.raw", "in another file"),
        (b"MET_UCHAR", b"MET_OTHER", "unknown kind"),
        (b"DimSize = 3 4 5", b"DimSize = 3 4 x", "readable DimSize"),
        (b"DimSize = 3 4 5", b"DimSize = 3 4 0", "empty one"),
        (b"DimSize = 3 4 5", b"DimSize = 99999 99999 99999", "more than"),
        (b"ElementDataFile", b"Elsewhere", "does not end with ElementDataFile"),
    ],
)
def test_what_a_metaimage_header_says_is_checked(tmp_path: Path, old: bytes, new: bytes, said: str) -> None:
    file = mha(tmp_path / "a.mha", VOLUME.astype(np.uint8), (1, 1, 1))
    assert old in file.read_bytes()
    file.write_bytes(file.read_bytes().replace(old, new))
    with pytest.raises(ImageError, match=said):
        read_array(file)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_nifti_is_upright(tmp_path: Path, name: str, order: str) -> None:
    """Libraries show (width, height); the value right of the first one in the file is to its right in the picture."""
    shown = np.arange(12, dtype=np.int16).reshape(4, 3)  # 4 wide, 3 high
    found = read_nifti(nifti(tmp_path / name, shown, order=order))
    assert found.values.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]
    assert found.spacing == pytest.approx((0.308, 0.154))


def test_nifti_scales_and_drops_dimensions_of_length_one(tmp_path: Path) -> None:
    file = nifti(tmp_path / "a.nii.gz", np.full((4, 3, 1), 10, np.uint8), scale=(2.0, 5.0))
    assert read_nifti(file).values.tolist() == [[25.0] * 4] * 3


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_truncated_nifti_is_refused(tmp_path: Path, name: str) -> None:
    file = nifti(tmp_path / name, np.random.default_rng(0).integers(0, 255, (40, 30)).astype(np.uint8))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ImageError, match=r"truncated|gzip|more than"):
        read_nifti(file)


def test_other_bytes_are_no_nifti(tmp_path: Path) -> None:
    file = tmp_path / "a.nii"
    file.write_bytes(b"x" * 500)
    with pytest.raises(ImageError, match="not a NIfTI"):
        read_nifti(file)


CONTENT = {
    "image": np.arange(24, dtype=np.uint8).reshape(4, 6),
    "structures": {"liver": np.eye(4, 6, dtype=np.uint8), "vein": np.asfortranarray(np.ones((4, 6), np.uint8))},
}


def _same(found: dict, wanted: dict) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        if isinstance(value, dict):
            _same(found[name], value)
        else:
            assert found[name].dtype == value.dtype
            assert (found[name] == value).all()


def test_a_saved_dictionary_is_read(tmp_path: Path) -> None:
    _same(read_dictionary(npy(tmp_path / "a.npy", CONTENT)), CONTENT)


@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_dictionaries_of_older_and_newer_libraries_are_read(tmp_path: Path, protocol: int) -> None:
    """NumPy 1 wrote protocol 3 and the module's old name; protocol 2 keeps bytes as text."""
    whole = np.empty((), object)
    whole[()] = {**CONTENT, "wide": np.arange(3, dtype=">i4"), "n": 5, "f": 0.5, "l": [1, None, True], "t": (1, "é")}
    stream = pickle.dumps(whole, protocol)
    if protocol < 4:
        assert b"numpy._core.multiarray" in stream
        stream = stream.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    found = read_dictionary(_object_file(tmp_path, stream))
    _same({name: found[name] for name in CONTENT}, CONTENT)
    assert found["wide"].tolist() == [0, 1, 2]
    assert (found["n"], found["f"], found["l"], found["t"]) == (5, 0.5, [1, None, True], (1, "é"))


def _object_file(folder: Path, stream: bytes) -> Path:
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = folder / "a.npy"
    path.write_bytes(file.getvalue() + stream)
    return path


class Hostile:
    """Unpickling this makes a folder."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize("inside", [False, True])
def test_nothing_in_a_pickle_is_ever_run(tmp_path: Path, protocol: int, inside: bool) -> None:
    trap = tmp_path / "trap"
    hostile = Hostile(os.mkdir, str(trap))
    whole = np.empty((), object)
    whole[()] = {**CONTENT, "structures": {"liver": hostile}} if inside else hostile
    stream = pickle.dumps(whole, protocol)
    with pytest.raises(ImageError, match="pickle"):
        read_dictionary(_object_file(tmp_path, stream))
    assert not trap.exists()
    pickle.loads(stream)
    assert trap.is_dir()  # the trap is a real one


@pytest.mark.parametrize(
    "value",
    [
        Hostile(eval, "1"),
        Hostile(getattr, "a", "upper"),
        Hostile(np.dtype, "V8"),
        {"image": np.array(["text"])},
        {"image": np.array([object()])},
        {"image": complex(1, 2)},
        {1, 2},
        [1, 2],
        "text",
    ],
    ids=["eval", "getattr", "dtype", "text-array", "object-array", "complex", "set", "list", "text"],
)
def test_a_pickle_of_anything_else_is_refused(tmp_path: Path, value: object) -> None:
    whole = np.empty((), object)
    whole[()] = value
    with pytest.raises(ImageError):
        read_dictionary(_object_file(tmp_path, pickle.dumps(whole)))


def test_every_truncated_pickle_is_refused(tmp_path: Path) -> None:
    data = npy(tmp_path / "whole.npy", CONTENT).read_bytes()
    file = tmp_path / "a.npy"
    for length in range(0, len(data) - 1, 7):
        file.write_bytes(data[:length])
        with pytest.raises(ImageError):
            read_dictionary(file)


def test_every_damaged_byte_is_read_or_refused_and_nothing_else(tmp_path: Path) -> None:
    data = npy(tmp_path / "whole.npy", {"image": np.zeros((2, 2), np.uint8)}).read_bytes()
    file = tmp_path / "a.npy"
    refused = 0
    for place in range(len(data)):
        for value in (0, 255, data[place] ^ 1):
            file.write_bytes(data[:place] + bytes([value]) + data[place + 1 :])
            try:
                read_dictionary(file)
            except ImageError:
                refused += 1
    assert refused > len(data)


def test_a_small_pickle_that_shares_its_parts_does_not_grow(tmp_path: Path) -> None:
    """Ten lists of ten references to the list before would be 10 billion entries when taken apart."""
    value: list = [1]
    for _ in range(10):
        value = [value] * 10
    whole = np.empty((), object)
    whole[()] = {"image": value}
    assert list(read_dictionary(_object_file(tmp_path, pickle.dumps(whole)))) == ["image"]
    loop: list = []
    loop.append(loop)
    whole[()] = {"image": loop}
    with pytest.raises(ImageError, match="broken"):
        read_dictionary(_object_file(tmp_path, pickle.dumps(whole)))


def test_an_array_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    stream = pickle.dumps(np.array({"image": np.zeros(100, np.uint8)}, object), 4)
    assert stream.count(b"Kd\x85") == 1  # the shape (100,)
    with pytest.raises(ImageError, match="does not fit its bytes"):
        read_dictionary(_object_file(tmp_path, stream.replace(b"Kd\x85", b"Ke\x85")))
