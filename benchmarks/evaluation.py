"""What an evaluation costs: passes over the images, images a second, seconds a protocol, and what sharing saves.

    python benchmarks/evaluation.py --arch vit_small --images 900 --resolution 224

Writes three data sets of labelled phantoms and a checkpoint with random weights to a temporary folder, runs a suite of
14 evaluations over them with a baseline beside the checkpoint, and counts. Then, on the features of one set: the grid
of 52 linear heads at once against 52 trainings of one head each, in the same run. Speed does not depend on what the
weights have learned.
"""

import json
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import click
import structlog
import torch

from sonoforge_trainer.contract import ARCHS, EvalSuiteSpec, EvaluationRequest, ModelCard
from sonoforge_trainer.contract.config import Arch, ModelConfig
from sonoforge_trainer.evaluate import linear as linear_probe
from sonoforge_trainer.evaluate.dataset import select
from sonoforge_trainer.evaluate.problem import Problem
from sonoforge_trainer.evaluate.protocols import Material, problem_of
from sonoforge_trainer.evaluate.run import gather
from sonoforge_trainer.evaluate.subjects import open_subject
from sonoforge_trainer.evaluate.suite import CHECKPOINT, Entry, run_suite, tallies
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.reader import read_manifest
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.checkpoint import write_imported

SETS = 3
CUTS = (("knn",), ("linear",), ("logreg",), ("fewshot",), ("segment-probe", "health"))
"""Protocols of the evaluations of a set; the last set lacks one, which makes 14."""


def checkpoint(arch: Arch, resolution: int, folder: Path, storage: Storage) -> tuple[str, str]:
    """URI and digest of a checkpoint with random weights."""
    model = ModelConfig(arch=arch, patch_size=16, registers=4, in_channels=1, pos_embed="antialias", drop_path=0.0)
    backbone = Backbone(model, resolution)
    initialise(backbone, 0)
    shape = ARCHS[arch]
    card = ModelCard(
        arch=arch,
        embed_dim=shape.embed_dim,
        depth=shape.depth,
        heads=shape.heads,
        patch_size=16,
        registers=4,
        in_channels=1,
        ffn="mlp",
        pos_embed="antialias",
        mean=(0.18,),
        std=(0.22,),
        resolution=resolution,
    )
    ref = write_imported(backbone, card, (folder / "checkpoint").as_uri(), storage)
    return ref.uri, ref.manifest_digest


def suite_of(folder: Path, images: int, storage: Storage) -> EvalSuiteSpec:
    """14 evaluations over three sets, and raw pixels as a baseline."""
    evaluations = []
    for number in range(SETS):
        output = (folder / f"set-{number}").as_uri()
        rule = PhantomRule(images, size=224, frames=1, clips=6, seed=number)
        build_phantoms(output, rule, PlanRule(500, 0, (0.5, 0.2, 0.3)), storage)
        for cut in CUTS[: 14 - number * len(CUTS)]:
            name = f"set{number}-{cut[0]}"
            evaluations.append({"name": name, "shards": f"{output}/shards.json", "protocols": list(cut)})
    assert len(evaluations) == 14
    return EvalSuiteSpec.parse({"evaluations": evaluations, "baselines": [{"name": "pixels", "kind": "raw-pixels"}]})


def one_by_one(problem: Problem, seed: int, device: torch.device) -> float:
    """Seconds of 52 trainings of one head each, on features that are there already."""
    rates = linear_probe.LEARNING_RATES
    start = time.perf_counter()
    try:
        for name, by_split in problem.inputs.items():
            for rate in rates:
                linear_probe.LEARNING_RATES = (rate,)  # the grid of this run
                alone = Problem(problem.classes, {name: by_split}, problem.targets, problem.groups)
                linear_probe.linear(alone, epochs=10, resamples=0, seed=seed, device=device)
    finally:
        linear_probe.LEARNING_RATES = rates
    return time.perf_counter() - start


def at_once(problem: Problem, seed: int, device: torch.device) -> float:
    """Seconds of the grid of 52 heads."""
    start = time.perf_counter()
    linear_probe.linear(problem, epochs=10, resamples=0, seed=seed, device=device)
    return time.perf_counter() - start


def problem_for(entry: Entry, storage: Storage, device: torch.device) -> Problem:
    """The labelled features of an entry's data set, from a pass of their own."""
    request: EvaluationRequest = entry.request
    model = open_subject(request, storage, device).model
    gathered = gather(
        request.evaluation.shards, model, read_manifest(request.evaluation.shards, storage), storage, None
    )
    selection = select(gathered.table, request.evaluation)
    return problem_of(Material(request.evaluation, model, gathered.features, selection, device), "linear")


def protocol_seconds(entries: list[Entry]) -> dict[str, float]:
    """Mean seconds of each protocol on the checkpoint."""
    found: dict[str, list[float]] = {}
    for entry in entries:
        if entry.model == CHECKPOINT and entry.result:
            for name, seconds in entry.result.seconds.items():
                if name in entry.result.request.evaluation.protocols:
                    found.setdefault(name, []).append(seconds)
    return {name: sum(values) / len(values) for name, values in found.items()}


def measure(arch: Arch, images: int, resolution: int) -> dict[str, Any]:
    """The whole record."""
    device, storage = torch.device("cpu"), Storage()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        suite = suite_of(folder, images, storage)
        entries = run_suite(suite, *checkpoint(arch, resolution, folder, storage), storage, device)
        assert not any(entry.fault for entry in entries), [entry.fault for entry in entries if entry.fault]
        passing = [e.result.seconds["features"] for e in entries if e.model == CHECKPOINT and e.result and e.passes]
        linear = next(e for e in entries if e.model == CHECKPOINT and "linear" in e.request.evaluation.protocols)
        problem = problem_for(linear, storage, device)
        together, apart = at_once(problem, 0, device), one_by_one(problem, 0, device)
    pass_seconds = sum(passing) / len(passing)
    return {
        "arch": arch,
        "resolution": resolution,
        "images": images,
        "evaluations": {tally.model: tally.evaluations for tally in tallies(entries)},
        "passes": {tally.model: tally.passes for tally in tallies(entries)},
        "images_a_second": images / pass_seconds,
        "seconds": protocol_seconds(entries),
        "heads_at_once_seconds": together,
        "heads_one_by_one_seconds": apart,
        "heads_ratio": apart / together,
        "heads_with_own_passes_ratio": (apart + 52 * pass_seconds) / (together + pass_seconds),
    }


def lines(record: dict[str, Any]) -> list[str]:
    """The record as text."""
    evaluations, passes = record["evaluations"], record["passes"]
    found = [f"{record['arch']} at {record['resolution']} px, {record['images']} images a set, {SETS} sets"]
    found += [f"feature passes  {passes[m]} for {evaluations[m]} evaluations ({m})" for m in passes]
    found.append(f"feature pass    {record['images_a_second']:.1f} images/s, reading and decoding included")
    found += [f"{name:<15} {seconds:.2f} s" for name, seconds in record["seconds"].items()]
    together, apart = record["heads_at_once_seconds"], record["heads_one_by_one_seconds"]
    found.append(f"52 heads        {together:.2f} s at once, {apart:.2f} s one by one: {record['heads_ratio']:.1f} x")
    found.append(f"                {record['heads_with_own_passes_ratio']:.1f} x where each run makes its own pass")
    return found


@click.command()
@click.option("--arch", default="vit_small", show_default=True, type=click.Choice(get_args(Arch)), help="Backbone.")
@click.option("--images", default=900, show_default=True, help="Images of each data set.")
@click.option("--resolution", default=224, show_default=True, help="Side of the input in pixels.")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
@click.option("--quick", is_flag=True, help="Only show that it runs.")
def main(arch: Arch, images: int, resolution: int, as_json: bool, quick: bool) -> None:
    """Measure what evaluations cost on this machine."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(30))
    torch.set_num_threads(1)
    record = measure("vit_tiny", 72, 48) if quick else measure(arch, images, resolution)
    click.echo(json.dumps(record, indent=1) if as_json else "\n".join(lines(record)))


if __name__ == "__main__":
    main()
