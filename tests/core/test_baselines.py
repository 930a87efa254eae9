"""Baselines of a suite: planned like floors, once for each run, and shown beside the checkpoints."""

from builders import JOB, World, said_scores

from sonoforge_operator.api import parse_job_file
from sonoforge_operator.scores import scores_table
from sonoforge_trainer.contract import Activity, Termination

BASELINES = """
  baselines:
    - {name: dinov2, kind: weights, uri: "s3://b/dinov2.pth"}
    - {name: pixels, kind: raw-pixels}
"""


def world_with(text=JOB + BASELINES):
    return World(file=parse_job_file(text, where="job.yaml"))


def evaluated(world):
    """A run whose checkpoint was scored."""
    world.turn()
    world.report(10, 10)
    world.turn()
    world.end("eval-", 0, said_scores(0.5))
    world.turn()
    return world


def requests(world):
    return {c.name: c.request for c in world.last.children if c.name.startswith("floor-")}


def test_each_baseline_runs_once_after_the_checkpoint_and_is_named_in_the_request():
    world = evaluated(world_with())
    (request,) = requests(world).values()
    assert (request.baseline.name, request.evaluation.name) == ("dinov2", "planes")
    assert request.result_uri.startswith("s3://b/run/baselines/weights-")
    world.end("floor-", 0, said_scores(0.4))
    world.turn()
    (request,) = requests(world).values()
    assert request.baseline.name == "pixels"
    world.end("floor-", 0, said_scores(0.1))
    world.report(20, 10, 20)
    world.turn()
    world.end("eval-", 0, said_scores(0.6))
    world.turn()
    assert world.running("floor-") == []
    assert len([name for name in world.started if name.startswith("floor-")]) == 2
    scores = {n: s.value for f in world.status.floors for n, s in f.scores.items() if "val_" not in n}
    assert scores == {"dinov2:planes-knn/f1_macro": 0.4, "pixels:planes-knn/f1_macro": 0.1}


def test_baselines_are_rows_below_the_checkpoints_and_none_of_them_is_best():
    world = evaluated(world_with())
    for value in (0.9, 0.1):
        world.end("floor-", 0, said_scores(value))
        world.turn()
    assert world.status.best == world.status.checkpoints[0].ref.id
    rows = [line.split() for line in scores_table(world.status, "planes-knn/f1_macro").splitlines()[-2:]]
    assert [row[2:] for row in rows] == [["0.9000", "0.9000", "dinov2"], ["0.1000", "0.1000", "pixels"]]


def test_a_baseline_that_cannot_be_measured_is_told_and_the_job_succeeds():
    world = evaluated(world_with())
    world.report(100, 10, 100, activity=Activity.FINISHED)
    world.end("worker-")
    for _ in range(16):
        world.turn()
        if world.running("eval-"):
            world.end("eval-", 0, said_scores(0.5))
        if world.running("floor-"):
            world.end("floor-", 78, Termination(cause="config", message="not a ViT"))
    assert world.status.phase == "Succeeded"
    assert [f.reason for f in world.status.floors] == ["config: not a ViT"] * 2


def test_a_suite_that_gains_a_baseline_keeps_what_was_measured():
    world = evaluated(world_with())
    for value in (0.4, 0.1):
        world.end("floor-", 0, said_scores(value))
        world.turn()
    more = JOB + BASELINES + '    - {name: usfm, kind: weights, uri: "s3://b/usfm.pth"}\n'
    world.file = parse_job_file(more, where="job.yaml")
    world.turn()
    assert [request.baseline.name for request in requests(world).values()] == ["usfm"]
    assert [f.phase for f in world.status.floors] == ["Succeeded", "Succeeded", "Running"]


def test_a_floor_does_only_what_needs_no_weights():
    text = (JOB + BASELINES).replace("protocols: [knn]", "protocols: [health]")
    world = world_with(text.replace(", bestBy: planes-knn/f1_macro", ""))
    world.turn()
    assert [(f.baseline, f.name) for f in world.status.floors] == [("dinov2", "planes")]
