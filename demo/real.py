"""`make real`: pretrain on the real ultrasound images beside the checkout; evaluate on liver and fetal head images.

Only the rows marked train or unlabelled are pretrained on, so no evaluation image was seen before. Everything is kept
in runs/real; the table at the end shows the scores of each checkpoint beside those of the random initialisation and of
methods without learning. The images are not part of the repository: see SOURCES.md in their folder.
"""

from __future__ import annotations

import os
import sys
import time

from run import ROOT, say, sonoforge

from sonoforge_trainer.storage.server import S3Server

IMAGES = ROOT.parent / "shared" / "data" / "ultrasound"
STATE = ROOT / "runs" / "real"
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
}


def main() -> int:
    """Start the server, make what is missing, run the job."""
    if not IMAGES.is_dir():
        sys.exit(f"the real images are not here: put them into {IMAGES}, or run `make demo`, which makes its own")
    began = time.monotonic()
    STATE.mkdir(parents=True, exist_ok=True)
    with S3Server(STATE / "s3") as server:
        environment = os.environ | server.environment() | {"OMP_NUM_THREADS": "1"}
        for number, (name, command) in enumerate(SOURCES.items(), start=1):
            say(began, f"{number}/4", f"importing {name}")
            output = [f"--output=s3://sonoforge/real/{name}", "--licence=CC BY 4.0", f"--citation={CITATION}"]
            sonoforge(environment, *command, f"--root={IMAGES}", *output)
        say(began, "4/4", "training and evaluating: manifests/samples/real.yaml")
        job = ROOT / "manifests" / "samples" / "real.yaml"
        code = sonoforge(environment, "run", str(job), f"--state={STATE}", check=False, show=True)
    say(began, "done", f"{time.monotonic() - began:.0f} s")
    return code


if __name__ == "__main__":
    sys.exit(main())
