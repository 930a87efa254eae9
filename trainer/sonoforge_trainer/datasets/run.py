"""An import from its folder to shards and data card: read, look, split, refuse leaks, build, say what was found."""

from __future__ import annotations

import csv
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click

from sonoforge_trainer.datasets import inspect, leaks, shortcuts
from sonoforge_trainer.datasets.card import CARD, DataCard, count_splits, finding_cards, lines
from sonoforge_trainer.datasets.findings import Check, Findings
from sonoforge_trainer.datasets.importer import Importer, Source
from sonoforge_trainer.datasets.record import Record
from sonoforge_trainer.datasets.render import RecordRenderer
from sonoforge_trainer.datasets.splits import draw_splits, draw_validation, groups_of, listed
from sonoforge_trainer.shards.build import DataSetCard
from sonoforge_trainer.shards.faults import SourceError
from sonoforge_trainer.shards.images import ImageRule
from sonoforge_trainer.shards.options import Target, build_rows
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.storage import Storage

_UNLISTED = Check("unlisted", "note", "samples are in none of the lists; they were left out")
_PROGRESS = 1000


@dataclass(frozen=True)
class SplitChoice:
    """What the user says of the splits."""

    lists: Mapping[str, Sequence[Path]]
    """Split to published lists."""
    images: bool = False
    """Draw images where the set names no patients."""


def import_set(
    importer: Importer,
    root: Path,
    choice: SplitChoice,
    target: Target,
    images: ImageRule,
    *,
    options: str = "",
    private: Path | None = None,
) -> None:
    """Import a set and print its report. `options` is what else decides the bytes; `private` gets names of samples.

    Raises SourceError, DataSetError, StorageError.
    """
    everywhere = (*inspect.CHECKS, *leaks.CHECKS, *leaks.NEAR, leaks.MISSING, shortcuts.SIZE, _UNLISTED)
    findings = Findings((*importer.checks, *everywhere))
    with tempfile.TemporaryDirectory(prefix="sonoforge-import-") as scratch:
        records = importer.read(Source(root, Path(scratch), findings, target.rule.workers))
        _check_references(records)
        looks = inspect.inspect(records, findings, images, importer.look, target.rule.workers, _say_progress)
        digests = {number: look.digest for number, look in looks.items()}
        records, rule = _split(importer, records, digests, choice, target.plan, findings)
        records = leaks.without_leaks(records, digests, findings)
        leaks.count_near_duplicates(records, looks, findings)
        leaks.count_missing_classes(records, findings)
        shortcuts.look_for_size(records, looks, findings)
        masked = frozenset(record.row.number for record in records if record.mask is not None)
        rows = [record.row for record in records]
        click.echo("\n".join(lines(importer.about, rule, count_splits(rows, masked), findings.all())))
        _write_private(private, findings)
        about = replace(
            importer.about,
            licence=target.licence or importer.about.licence,
            citation=target.citation or importer.about.citation,
        )
        render = RecordRenderer(about.name, records, images, options)
        shards = DataSetCard(
            target.name, licence=about.licence, citation=about.citation, mask_classes=about.mask_classes
        )
        placed = replace(target, plan=PlanRule(target.plan.shard_samples, target.plan.seed))
        result = build_rows(rows, placed, render, render.options, shards)
    left_out = {fault.number for fault in result.rejected}
    card = DataCard(
        name=target.name,
        importer=about.name,
        title=about.title,
        source=about.source,
        licence=about.licence,
        citation=about.citation,
        dataset_digest=result.manifest.dataset_digest,
        mask_classes=about.mask_classes,
        split_rule=rule,
        splits=count_splits([row for row in rows if row.number not in left_out], masked),
        findings=finding_cards(findings.all()),
    )
    Storage.from_env().write(f"{target.output}/{CARD}", card.to_json().encode() + b"\n")
    click.echo(f"{target.output}/{CARD}")


def _split(
    importer: Importer,
    records: list[Record],
    digests: Mapping[int, str],
    choice: SplitChoice,
    plan: PlanRule,
    findings: Findings,
) -> tuple[list[Record], str]:
    """Records with splits, and the rule in words."""
    groups = groups_of(records, digests)
    if choice.lists:
        records, rest = listed(records, choice.lists)
        findings.add("unlisted", len(rest), [record.row.reference for record in rest])
        rule = "published lists, given with --split"
    elif plan.splits is not None or importer.split.apply is None:
        if importer.split.apply is None and not choice.images:
            raise SourceError(
                "the set names no patients, so that a split by patient is impossible; "
                f"{importer.split.advice}, or draw images with --split-images, which makes scores too good"
            )
        fractions = dict(zip(("train", "val", "test"), plan.splits or (0.7, 0.1, 0.2), strict=True))
        free = [_free(record) for record in records]
        records = draw_splits(free, groups, fractions, plan.seed)
        shares = ", ".join(f"{share:g} {split}" for split, share in fractions.items())
        what = "image, as no patients are known" if importer.split.apply is None else "patient"
        rule = f"drawn by {what}: {shares}; seed {plan.seed}"
    else:
        records, rule = importer.split.apply(records, groups, plan.seed), importer.split.sentence
        rule += f"; seed {plan.seed}" * importer.split.drawn
    if plan.validation:
        if any(record.row.split == "val" for record in records):
            raise SourceError("the source has a val split already; leave out --validation")
        records = draw_validation(records, groups, plan.validation, plan.seed)
        rule += f"; {plan.validation:g} of the training patients drawn as val, seed {plan.seed}"
    return records, rule


def _free(record: Record) -> Record:
    """Without the split that the set gave; what has no labels stays apart."""
    if record.row.split in ("", "unlabelled"):
        return record
    return replace(record, row=replace(record.row, split=""))


def _check_references(records: Sequence[Record]) -> None:
    if not records:
        raise SourceError("PATH: found no samples; give the folder of the unpacked download")
    assert len({record.row.reference for record in records}) == len(records), "references name samples"


def _say_progress(done: int) -> None:
    if done % _PROGRESS == 0:
        click.echo(f"looked at {done} images", err=True)


def _write_private(file: Path | None, findings: Findings) -> None:
    """Which samples tripped which check. Names may identify patients, so the file is for its writer only."""
    if file is None:
        return
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.fchmod(descriptor, 0o600)
    with open(descriptor, "w", newline="", encoding="utf-8") as stream:  # noqa: PTH123 - a descriptor
        writer = csv.writer(stream)
        writer.writerow(("check", "sample"))
        writer.writerows(findings.references())
