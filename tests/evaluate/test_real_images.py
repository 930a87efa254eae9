"""Real ultrasound: the floors of AUL liver are where its description says, and evaluations work on an S3 server."""

from pathlib import Path

import pytest
import torch
from evaluation_material import request_of, write_checkpoint

from sonoforge_trainer.contract import Evaluation
from sonoforge_trainer.evaluate.floors import floors
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.redact import KeyHasher
from sonoforge_trainer.shards.build import BuildRule, DataSetCard, build
from sonoforge_trainer.shards.files import FileRenderer
from sonoforge_trainer.shards.images import ImageRule, MaskRule
from sonoforge_trainer.shards.plan import PlanRule, arrange
from sonoforge_trainer.shards.sources import Columns, read_csv

ROOT = Path(__file__).parents[2].parent / "shared" / "data" / "ultrasound"


@pytest.fixture(scope="module")
def rows():
    if not ROOT.is_dir():
        pytest.skip(f"{ROOT} is not there; it holds the real images that this test looks at")
    columns = Columns("image", label="label_name", split="split", patient="subject", extra=("one_scanner",))
    return read_csv(ROOT / "classification" / "aul_liver.csv", ROOT, columns, ",")


def build_rows(rows, output, storage):
    render = FileRenderer(storage, ImageRule(), MaskRule())
    rule = BuildRule(render.options)
    build(arrange(rows, PlanRule(400)), DataSetCard("aul"), render, output, storage, KeyHasher(b"k" * 32), rule)
    return f"{output}/shards.json"


def test_floors_of_liver_classification_are_near_the_published_one(rows, tmp_path, storage):
    """SOURCES.md: HOG with LBP and logistic regression reach a balanced accuracy of .653; ours is HOG alone."""
    shards = build_rows(rows, (tmp_path / "aul").as_uri(), storage)
    evaluation = Evaluation(name="aul", shards=shards, protocols=("logreg",), bootstrap=100)
    found = floors(evaluation, storage)
    assert found["hog:aul-logreg/balanced_accuracy"].value == pytest.approx(0.61, abs=0.05)
    assert found["raw-pixels:aul-logreg/balanced_accuracy"].value == pytest.approx(0.65, abs=0.05)
    score = found["hog:aul-logreg/balanced_accuracy"]
    assert score.low < score.value < score.high


def test_an_evaluation_of_one_scanner_shares_the_pass_of_the_whole_set_on_an_s3_server(rows, s3):
    few = [row for row in rows if dict(row.fields)["one_scanner"] == "1"] + rows[:60:3]
    shards = build_rows(list({row.number: row for row in few}.values()), f"{s3.uri}/aul", s3.storage)
    checkpoint = write_checkpoint(s3.storage, f"{s3.uri}/run")
    device = torch.device("cpu")
    whole = evaluate(request_of(checkpoint, shards, "knn", name="all"), s3.storage, device)
    request = request_of(checkpoint, shards, "knn", name="one", where={"one_scanner": "1"})
    part = evaluate(request, s3.storage, device)
    assert (whole.feature_passes, part.feature_passes) == (1, 0)
    assert part.counts == {"train": 158, "val": 26, "test": 48}
    assert sum(whole.counts.values()) > 232
    assert evaluate(request, s3.storage, device) == part
