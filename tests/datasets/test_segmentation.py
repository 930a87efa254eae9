"""The sets with masks: each miniature copy has what is known to go wrong in the real one, and ends as class indices."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from layouts import box, mha, nifti, npy, outline, png, speckle, table
from PIL import Image

from sonoforge_trainer.shards.cli import command as shards
from sonoforge_trainer.shards.images import decode

Import = Callable[..., Any]


def masks_by(found: Any, field: str = "label") -> dict[str, list[dict[int, int]]]:
    """Pixels by value of each mask, grouped."""
    groups: dict[str, list[dict[int, int]]] = {}
    for sample in found.samples:
        counts = dict(zip(*np.unique(decode(sample.mask), return_counts=True), strict=True)) if sample.mask else {}
        groups.setdefault(sample.fields[field], []).append({int(v): int(n) for v, n in counts.items()})
    return groups


# HC18

RADII = [(30, 20), (35, 28), (25, 25), (40, 30), (28, 18), (33, 22)]
NAMES = ["000", "001", "010", "010_2", "014", "014_3"]


def hc18(root: Path, *, cut: bool = False) -> Path:
    """Six heads of four exams, two without annotation, and one whose line the border cuts."""
    rows = []
    for number, (name, (a, b)) in enumerate(zip(NAMES, RADII, strict=True)):
        stem = f"{name}_HC" if "_" not in name else f"{name}HC"
        left = -20 if cut and number == 0 else 10
        png(root / "training_set" / f"{stem}.png", speckle(number, 80, 120))
        line = outline((120, 80), (left, 8, left + 2 * a, 8 + 2 * b))
        png(root / "training_set" / f"{stem}_Annotation.png", line)
        # Ellipse with half axes a - 0.5 and b - 0.5 in the middle of the line, 0.1 mm a pixel.
        a, b = a - 0.5, b - 0.5
        h = ((a - b) / (a + b)) ** 2
        length = np.pi * (a + b) * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))
        rows.append((f"{stem}.png", 0.1, round(length * 0.1, 3)))
    header = ("filename", "pixel size(mm)", "head circumference (mm)")
    table(root / "training_set_pixel_size_and_HC.csv", header, rows)
    for number in range(2):
        png(root / "test_set" / f"{number:03d}_HC.png", speckle(50 + number, 80, 120))
    table(root / "test_set_pixel_size.csv", header[:2], [(f"{n:03d}_HC.png", 0.1) for n in range(2)])
    return root


def test_outlines_of_heads_are_filled(tmp_path: Path, imported: Import) -> None:
    found = imported("hc18", hc18(tmp_path / "hc18"), "--splits", "0.5,0.25,0.25")
    heads = {s.fields["head_circumference_mm"]: int(decode(s.mask).sum()) for s in found.samples if s.mask}
    assert len(heads) == 6
    for (a, b), area in zip(RADII, (heads[key] for key in _in_order(found)), strict=True):
        assert area == pytest.approx(np.pi * (a + 0.5) * (b + 0.5), rel=0.03)
    assert found.manifest.mask_classes == ("background", "fetal head")
    assert found.found == {"count": 993 + 333, "repeats": 2, "no-patient": 8}
    assert Counter(s.fields["split"] for s in found.samples)["unlabelled"] == 2
    assert found.card["splits"]["unlabelled"]["masks"] == 0
    clips: dict[int, set[str]] = {}
    for sample in found.samples:
        clips.setdefault(sample.fields["clip"], set()).add(sample.fields["split"])
    assert len(clips) == 6
    assert all(len(splits) == 1 for splits in clips.values())


def _in_order(found: Any) -> list[str]:
    """Circumferences in the order of RADII, which the table has."""
    values = {s.fields["head_circumference_mm"] for s in found.samples if s.mask}
    wanted = []
    for a, b in RADII:
        a, b = a - 0.5, b - 0.5
        h = ((a - b) / (a + b)) ** 2
        length = 0.1 * np.pi * (a + b) * (1 + 3 * h / (10 + np.sqrt(4 - 3 * h)))
        wanted.append(min(values, key=lambda value: abs(float(value) - length)))
    return wanted


def test_an_outline_that_the_border_cuts_is_filled_by_its_ellipse(tmp_path: Path, imported: Import) -> None:
    found = imported("hc18", hc18(tmp_path / "hc18", cut=True))
    assert found.found["outline-open"] == 1
    assert "circumference" not in found.found
    cut = next(s for s in found.samples if s.mask and decode(s.mask)[:, 0].any())
    # The ellipse spans columns -20 to 40, of which 0 to 40 are seen: more than half of its area.
    assert int(decode(cut.mask).sum()) == pytest.approx(np.pi * 30.5 * 20.5 * 0.71, rel=0.04)


def test_a_circumference_that_does_not_fit_its_outline_is_said(tmp_path: Path, imported: Import) -> None:
    root = hc18(tmp_path / "hc18")
    file = root / "training_set_pixel_size_and_HC.csv"
    file.write_text(file.read_text().replace("000_HC.png,0.1,", "000_HC.png,0.11,"))
    assert imported("hc18", root).found["circumference"] == 1


def test_real_heads_get_the_areas_of_their_outlines(real: Path, tmp_path: Path, imported: Import) -> None:
    """The layout of the download, made of real heads: each real mask's border is drawn as the published line."""
    source = real / "segmentation" / "hc18_head.csv"
    if not source.is_file():
        pytest.skip("the real heads are not there")
    with source.open() as stream:
        rows = list(csv.DictReader(stream))[:40]
    wanted, listed = [], []
    for row in rows:
        name = Path(row["mask"]).name
        inside = np.asarray(Image.open(real / row["mask"])) > 0
        padded = np.pad(inside, 1)
        around = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
        png(
            tmp_path / "training_set" / name.replace(".png", "_Annotation.png"),
            ((inside & ~around) * 255).astype(np.uint8),
        )
        png(tmp_path / "training_set" / name, Image.open(real / row["image"]))
        listed.append((name, row["pixel_size_mm"], row["head_circumference_mm"]))
        wanted.append((float(row["head_circumference_mm"]), int(inside.sum())))
    header = ("filename", "pixel size(mm)", "head circumference (mm)")
    table(tmp_path / "training_set_pixel_size_and_HC.csv", header, listed)
    found = imported("hc18", tmp_path)
    areas = sorted((float(s.fields["head_circumference_mm"]), int(decode(s.mask).sum())) for s in found.samples)
    assert areas == sorted(wanted)
    assert "circumference" not in found.found
    assert "outline-open" not in found.found


# JNU-IFM


def jnu_ifm(root: Path) -> Path:
    """Four videos of three frames; one has masks that somebody renamed, one frame is labelled wrongly."""
    for video in range(1, 5):
        folder = root / "us_data" / f"2019_{video}"
        values = (1, 2) if video == 4 else (7, 8)
        labels = []
        for frame in range(3):
            stem = f"{folder.name}_{frame}"
            mask = np.zeros((24, 32), np.uint8)
            mask[2:6, 2:6] = values[0] if frame else 0
            mask[10:20, 10:20] = values[1] if frame == 2 else 0
            png(folder / "image" / f"{stem}.png", speckle(10 * video + frame))
            png(folder / "mask" / f"{stem}_mask.png", mask)
            png(folder / "mask_enhance" / f"{stem}_mask.png", mask * 20)
            labels.append((frame, (3, 4, 6)[frame] if video < 3 or frame else 5))
        table(folder / "frame_label.csv", ("frame_id", "frame_label"), labels)
    return root


def test_values_7_and_8_become_classes_and_videos_stay_together(tmp_path: Path, imported: Import) -> None:
    found = imported("jnu-ifm", jnu_ifm(tmp_path / "jnu"))
    assert masks_by(found)["symphysis and head"] == [{0: 768 - 116, 1: 16, 2: 100}] * 4
    assert masks_by(found)["symphysis only"] == [{0: 752, 1: 16}] * 4
    assert found.found == {
        "renamed-values": 2,
        "label-mask": 2,
        "enhanced": 4,
        "no-patient": 12,
        "mask-empty": 4,
        "class-missing": 3,
    }
    videos: dict[int, set[str]] = {}
    for sample in found.samples:
        videos.setdefault(sample.fields["clip"], set()).add(sample.fields["split"])
    assert len(videos) == 4
    assert all(len(splits) == 1 for splits in videos.values())


def test_other_mask_values_are_refused_with_what_is_allowed(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = jnu_ifm(tmp_path / "jnu")
    png(root / "us_data" / "2019_1" / "mask" / "2019_1_1_mask.png", box(9, 2, 2, 6, 6))
    assert "the mask has the value 9; allowed: 0, 7, 8" in refused("jnu-ifm", root)
    png(root / "us_data" / "2019_1" / "mask" / "2019_1_1_mask.png", box(7, 2, 2, 6, 6) + box(1, 9, 9, 12, 12))
    assert "the mask has the value 7; allowed: 0, 1, 2" in refused("jnu-ifm", root)


# PSFHS and FH-PS-AOP


def symphysis(root: Path, folder: str) -> Path:
    for number in range(10):
        name = f"{number:05d}.mha"
        pixels = np.repeat(speckle(number, 32, 32)[None], 3, axis=0)
        mask = box(1, 2, 2, 6, 6, 32, 32) + box(2, 10, 10, 20, 20, 32, 32)
        mha(root / folder / "image_mha" / name, pixels, (1, 1, 1), compressed=number % 2 == 0)
        mha(root / folder / "label_mha" / name, mask, (1, 1), compressed=number % 2 == 1)
    return root


@pytest.mark.parametrize(
    ("name", "folder", "missing"),
    [
        ("psfhs", "PSFHS", 1348),
        ("fh-ps-aop", "Pubic Symphysis-Fetal Head Segmentation and Angle of Progression", 3990),
    ],
)
def test_pictures_without_patients_need_lists_or_a_word(
    tmp_path: Path, imported: Import, refused: Callable[..., str], name: str, folder: str, missing: int
) -> None:
    root = symphysis(tmp_path / "download", folder)
    said = refused(name, root)
    assert "names no patients, so that a split by patient is impossible" in said
    assert "give" in said
    assert "--split-images" in said
    assert "is impossible" in refused(name, root, "--splits", "0.5,0.2,0.3")
    found = imported(name, root, "--split-images")
    assert found.found == {"count": missing, "no-patient": 10}
    assert "warning: no-patient: 10" in found.output
    assert found.card["splitRule"] == "drawn by image, as no patients are known: 0.7 train, 0.1 val, 0.2 test; seed 0"
    assert Counter(s.fields["split"] for s in found.samples) == {"train": 7, "val": 1, "test": 2}
    assert masks_by(found, "label")[""] == [{0: 1024 - 116, 1: 16, 2: 100}] * 10
    assert {decode(s.image).shape for s in found.samples} == {(32, 32)}
    lists = []
    for split, numbers in {"train": range(6), "val": range(6, 8), "test": range(8, 10)}.items():
        file = tmp_path / f"{split}.txt"
        file.write_text("".join(f"{n:05d}\n" for n in numbers))
        lists += ["--split", f"{split}={file}"]
    listed = imported(name, root, *lists, out="listed")
    assert Counter(s.fields["split"] for s in listed.samples) == {"train": 6, "val": 2, "test": 2}


# ACOUSLIC


def acouslic(root: Path) -> Path:
    """Five sweeps of four subjects; each has a few annotated frames, and one row has no volume."""
    base = root / "acouslic-ai-train-set"
    rows = []
    for number in range(5):
        uuid = f"0a{number}c-{number}"
        images = np.stack([speckle(100 * number + frame) for frame in range(12)])
        masks = np.zeros_like(images)
        masks[3] = box(1, 4, 4, 14, 14)
        masks[4] = box(2, 4, 4, 12, 12)
        if number == 0:
            masks[5] = box(1, 0, 0, 4, 4) + box(2, 8, 8, 12, 12)
        mha(base / "images/stacked_fetal_ultrasound" / f"{uuid}.mha", images, (0.28, 0.28, 1), compressed=True)
        mha(base / "masks/stacked_fetal_abdomen" / f"{uuid}.mha", masks, (0.28, 0.28, 1), compressed=True)
        rows.append((uuid, f"subject{min(number, 3)}", *[200.0] * 6))
    rows.append(("missing", "subject9", *[200.0] * 6))
    header = ("uuid", "subject_id", *(f"sweep_{n}_ac_mm" for n in range(1, 7)))
    table(base / "circumferences/fetal_abdominal_circumferences_per_sweep.csv", header, rows)
    return root


def test_annotated_frames_are_taken_out_of_volumes(tmp_path: Path, imported: Import) -> None:
    found = imported("acouslic", acouslic(tmp_path / "download"))
    assert found.found == {"no-volume": 1, "both-values": 1}
    assert Counter(found.by("label", "frame")) == {
        ("optimal plane", "3"): 5,
        ("sub-optimal plane", "4"): 5,
        ("optimal plane", "5"): 1,
    }
    assert sorted(masks_by(found)["sub-optimal plane"], key=str) == [{0: 768 - 64, 1: 64}] * 5
    assert len({s.fields["patient"] for s in found.samples}) == 4
    assert {s.fields["pixel_size_mm"] for s in found.samples} == {"0.28"}
    images = {decode(s.image).tobytes() for s in found.samples if s.fields["frame"] == "3"}
    assert images == {speckle(100 * number + 3).tobytes() for number in range(5)}
    assert "CC BY-NC-SA" in found.manifest.licence


def test_a_broken_volume_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = acouslic(tmp_path / "download")
    file = next(root.rglob("stacked_fetal_abdomen/*.mha"))
    file.write_bytes(file.read_bytes()[:-60])
    assert "1 of 5 volumes are broken" in refused("acouslic", root)


# FASS


def fass(root: Path) -> Path:
    """Eight patients; structures of one overlap, one has no vein, and one picture has a single channel."""
    for patient in range(1, 9):
        stem = f"P{patient:02d}_IMG1"
        pixels = speckle(patient)
        structures = {
            "artery": box(1, 0, 0, 4, 4),
            "liver": box(1, 10, 10, 20, 20),
            "stomach": box(1, 10, 24, 16, 30),
            "vein": box(1, 2, 20, 4, 24),
        }
        if patient == 1:
            structures["artery"] = box(1, 10, 10, 12, 12)  # inside the liver
        if patient == 2:
            del structures["vein"]
        colour = pixels if patient == 3 else np.repeat(pixels[..., None], 3, axis=2)
        png(root / "FASS" / "IMAGES" / f"{stem}.png", colour)
        npy(root / "FASS" / "ARRAY_FORMAT" / f"{stem}.npy", {"image": colour, "structures": structures})
    return root


def test_pickled_structures_are_painted_in_the_documented_order(tmp_path: Path, imported: Import) -> None:
    found = imported("fass", fass(tmp_path / "download"))
    assert found.found == {"overlap": 1, "absent": 1, "count": 1580}
    plain = {0: 768 - 160, 1: 16, 2: 100, 3: 36, 4: 8}
    counts = [tuple(sorted(c.items())) for c in masks_by(found)[""]]
    assert Counter(counts) == {
        tuple(plain.items()): 6,
        ((0, 768 - 144), (1, 4), (2, 96), (3, 36), (4, 8)): 1,
        ((0, 768 - 152), (1, 16), (2, 100), (3, 36)): 1,
    }
    assert found.manifest.mask_classes == ("background", "artery", "liver", "stomach", "vein")
    assert {decode(s.image).ndim for s in found.samples} == {2}
    assert len({s.fields["patient"] for s in found.samples}) == 8


def test_a_hostile_pickle_ends_the_import_and_is_not_run(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = fass(tmp_path / "download")
    trap = tmp_path / "trap"

    class Hostile:
        def __reduce__(self) -> tuple:
            return Path.mkdir, (trap,)

    npy(root / "FASS" / "ARRAY_FORMAT" / "P08_IMG1.npy", {"image": Hostile(), "structures": {}})
    said = refused("fass", root)
    assert "the file is refused: it may be hostile" in said
    assert not trap.exists()
    assert "P08" not in said


def test_an_unknown_structure_is_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    root = fass(tmp_path / "download")
    content = {"image": speckle(1), "structures": {"spleen": box(1, 0, 0, 4, 4)}}
    npy(root / "FASS" / "ARRAY_FORMAT" / "P08_IMG1.npy", content)
    assert "1 unknown structures; allowed: artery, liver, stomach, vein" in refused("fass", root)


# BUSI


def busi(root: Path) -> Path:
    """Names with spaces and parentheses, two masks for one image, an RGB mask, one in between, and duplicates."""
    base = root / "Dataset_BUSI_with_GT"
    seed = 0
    for name, count in (("benign", 6), ("malignant", 4), ("normal", 3)):
        for number in range(1, count + 1):
            seed += 1
            png(base / name / f"{name} ({number}).png", np.repeat(speckle(seed)[..., None], 3, axis=2))
            mask = box(0 if name == "normal" else 255, 2, 2, 8, 8)
            png(base / name / f"{name} ({number})_mask.png", np.repeat(mask[..., None], 3, 2) if number == 2 else mask)
    png(base / "benign" / "benign (4)_mask_1.png", box(255, 6, 6, 10, 10))
    png(base / "benign" / "benign (5)_mask.png", box(150, 2, 2, 8, 8))
    (base / "malignant" / "malignant (1).png").write_bytes((base / "benign" / "benign (1).png").read_bytes())
    return root


def test_several_masks_are_joined_and_duplicates_are_told(tmp_path: Path, imported: Import) -> None:
    found = imported("busi", busi(tmp_path / "download"), "--split-images")
    areas = {label: sorted(c.get(1, 0) for c in masks) for label, masks in masks_by(found).items()}
    assert areas == {"benign": [36] * 5 + [36 + 16 - 4], "malignant": [36] * 4, "normal": [0] * 3}
    assert found.found == {
        "several-masks": 1,
        "mask-between": 1,
        "count": 780 - 13,
        "mask-empty": 3,
        "no-patient": 13,
        "duplicates": 1,
        "duplicate-labels": 1,
        "class-missing": 3,
    }
    assert "is impossible" in found.card["splitRule"] or "no patients are known" in found.card["splitRule"]


# CAMUS


def fan(seed: int, height: int = 40, width: int = 30) -> np.ndarray:
    """A sector with its tip at the top, of a picture `width` wide."""
    rows, columns = np.mgrid[:height, :width]
    inside = np.abs(columns - (width - 1) / 2) <= rows * 0.35
    return np.where(inside, speckle(seed, height, width) | 1, 0).astype(np.uint8)


def camus(root: Path, *, turned: bool = False) -> Path:
    """Five patients; arrays are (width, height), as the libraries of the set show them."""
    for patient in range(1, 6):
        folder = root / "database_nifti" / f"patient{patient:04d}"
        for view in ("2CH", "4CH"):
            for phase in ("ED", "ES"):
                picture = fan(hash_of(patient, view, phase))
                mask = box(1, 10, 12, 20, 18, 40, 30) + box(2, 20, 12, 24, 18, 40, 30) + box(3, 26, 12, 30, 18, 40, 30)
                stem = f"patient{patient:04d}_{view}_{phase}"
                nifti(folder / f"{stem}.nii.gz", picture if turned else picture.T)
                nifti(folder / f"{stem}_gt.nii.gz", mask if turned else mask.T)
            frames = np.stack([fan(n).T for n in range(3)], axis=-1)
            nifti(folder / f"patient{patient:04d}_{view}_half_sequence.nii.gz", frames)
            (folder / f"Info_{view}.cfg").write_text(
                "ED: 1\nES: 20\nNbFrame: 20\nSex: F\nAge: 56\nImageQuality: Good\n"
            )
    return root


def hash_of(patient: int, view: str, phase: str) -> int:
    return patient * 4 + (view == "4CH") * 2 + (phase == "ES")


def test_hearts_are_upright_and_split_by_patient(tmp_path: Path, imported: Import) -> None:
    found = imported("camus", camus(tmp_path / "download"))
    assert found.found == {"count": 495}
    assert Counter(found.by("label", "phase", "image_quality")) == {
        (label, phase, "Good"): 5
        for label in ("two-chamber", "four-chamber")
        for phase in ("end-diastole", "end-systole")
    }
    assert {decode(s.image).tobytes() for s in found.samples} == {
        fan(hash_of(p, v, f)).tobytes() for p in range(1, 6) for v in ("2CH", "4CH") for f in ("ED", "ES")
    }
    mask = decode(found.samples[0].mask)
    assert (mask[10:20, 12:18] == 1).all()
    assert (mask[26:30, 12:18] == 3).all()
    splits = {s.fields["patient"]: s.fields["split"] for s in found.samples}
    assert Counter(splits.values()) == {"train": 3, "val": 1, "test": 1}


def test_hearts_that_lie_on_their_side_are_told(tmp_path: Path, imported: Import) -> None:
    found = imported("camus", camus(tmp_path / "download", turned=True))
    assert found.found["lying"] == 20


def test_lists_of_patients_are_taken(tmp_path: Path, imported: Import, call: Callable[..., Any]) -> None:
    root = camus(tmp_path / "download")
    lists = []
    for split, patients in {"train": (1, 2, 3), "val": (4,), "test": (5,)}.items():
        file = tmp_path / f"subgroup_{split}.txt"
        file.write_text("\n".join(f"patient{n:04d}" for n in patients) + "\n")
        lists += ["--split", f"{split}={file}"]
    found = imported("camus", root, *lists)
    assert Counter(s.fields["split"] for s in found.samples) == {"train": 12, "val": 4, "test": 4}
    assert call(shards, "verify", tmp_path / "out", "--decode").exit_code == 0
