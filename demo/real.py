"""`make real`: pretrain on the real ultrasound images beside the checkout; evaluate on liver and fetal head images.

Only the rows marked train or unlabelled are pretrained on, so no test image was seen before. After training the first
checkpoint, which is the random initialisation, the last one and the baselines go through evalsuite-real.yaml.
Everything is kept in runs/NAME of the job, and the command goes on where it was interrupted. It prints the tables of
docs/real.md. The images are not part of the repository: see SOURCES.md in their folder.

    python demo/real.py [JOB.yaml]      another recipe, with another name and another place for its checkpoints
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from run import ROOT, say, sonoforge
from table import comparison, course

from sonoforge_operator.api import parse_job_file
from sonoforge_trainer.contract import read_suite
from sonoforge_trainer.report.runs import survey
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.storage.server import S3Server

IMAGES = ROOT.parent / "shared" / "data" / "ultrasound"
JOB = ROOT / "manifests" / "samples" / "real.yaml"
SUITE = ROOT / "manifests" / "samples" / "evalsuite-real.yaml"
CITATION = (
    "Contains images from HC18 (van den Heuvel et al. 2018), AUL (Xu et al. 2022), usgra-seg (Kandaouroff 2025), "
    "Drazan et al. 2019 and Seynnes & Cronin 2020; cropped, converted to grey, resized and recompressed"
)
SOURCES: dict[str, list[str]] = {
    "pretrain": [
        *("shards", "build", f"--csv={IMAGES}/pool/manifest.csv", "--split-column=split", "--patient-column=subject"),
        *("--where=split=train", "--where=split=unlabelled", "--unknown-patient=usgra_nerve:unknown"),
        "--shard-samples=250",
    ],
    "liver": [
        *("datasets", "import", "csv", f"{IMAGES}/classification/aul_liver.csv", "--path-column=image"),
        *("--label-column=label_name", "--patient-column=subject", "--split-column=split", "--column=one_scanner"),
    ],
    "head": [
        *("datasets", "import", "csv", f"{IMAGES}/segmentation/hc18_head.csv", "--path-column=image"),
        *("--mask-column=mask", "--patient-column=subject", "--split-column=split", "--validation=0.15"),
        *("--mask-class=background", "--mask-class=head"),
    ],
    "organ": [
        *("datasets", "import", "csv", f"{IMAGES}/segmentation/aul_liver.csv", "--path-column=image"),
        *("--mask-column=mask", "--patient-column=subject", "--split-column=split"),
        *("--mask-class=background", "--mask-class=liver"),
    ],
    "mass": [
        *("datasets", "import", "csv", f"{IMAGES}/segmentation/aul_mass.csv", "--path-column=image"),
        *("--mask-column=mask", "--patient-column=subject", "--split-column=split"),
        *("--mask-class=background", "--mask-class=mass"),
    ],
}
STEPS = len(SOURCES) + 2


def main(path: Path = JOB) -> int:
    """Start the server, make what is missing, run the job."""
    if not IMAGES.is_dir():
        sys.exit(f"the real images are not here: put them into {IMAGES}, or run `make demo`, which makes its own")
    job = parse_job_file(path.read_text(), where=str(path)).job
    state, run = ROOT / "runs" / job.metadata.name, job.spec.checkpoints.uri
    began = time.monotonic()
    state.mkdir(parents=True, exist_ok=True)
    with S3Server(state / "s3") as server:
        environment = os.environ | server.environment() | {"OMP_NUM_THREADS": "1"}
        for number, (name, command) in enumerate(SOURCES.items(), start=1):
            say(began, f"{number}/{STEPS}", f"importing {name}")
            output = [f"--output=s3://sonoforge/real/{name}", "--licence=CC BY 4.0", f"--citation={CITATION}"]
            sonoforge(environment, *command, f"--root={IMAGES}", *output)
        say(began, f"{STEPS - 1}/{STEPS}", f"training: {path.name}")
        code = sonoforge(environment, "run", str(path), f"--state={state}", check=False, show=True)
        if code:
            return code
        os.environ.update(server.environment())
        storage = Storage.from_env()
        found = survey(run, storage)
        print(course(found))  # noqa: T201 - for a person
        say(began, f"{STEPS}/{STEPS}", f"evaluating: {SUITE.relative_to(ROOT)}")
        for checkpoint in (found.checkpoints[0], found.checkpoints[-1]):
            sonoforge(environment, "eval", checkpoint.ref.uri, f"--suite={SUITE}")
        suite = read_suite(SUITE.read_text(), where=SUITE.name)
        print(comparison(survey(run, storage), suite, storage))  # noqa: T201 - for a person
        sonoforge(environment, "report", run, f"--output={state / 'comparison.html'}")
    say(began, "done", f"the same as a page: {state.relative_to(ROOT) / 'comparison.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
