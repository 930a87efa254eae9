"""The contract's table of metrics, by which a job file is checked, is what the protocols report."""

import torch
from evaluation_material import request_of

from sonoforge_trainer.contract import PROTOCOL_METRICS, FinetuneOptions, SegmentOptions, is_validation_score
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms


def test_the_metrics_of_the_contract_are_those_that_the_protocols_report(checkpoint, tmp_path, storage):
    """Two frames a clip and two clips a patient, so that the retrieval of both can be measured."""
    rule = PhantomRule(192, size=32, frames=2, clips=2)
    output = (tmp_path / "set").as_uri()
    build_phantoms(output, rule, PlanRule(200, 0, (0.5, 0.25, 0.25)), storage)
    request = request_of(
        checkpoint,
        f"{output}/shards.json",
        *PROTOCOL_METRICS,
        segment=SegmentOptions(steps=1, batch=2, shots=(3,)),
        finetune=FinetuneOptions(epochs=1, batch=16),
        seeds=2,
    )
    reported = evaluate(request, storage, torch.device("cpu")).scores
    reported = {name: score for name, score in reported.items() if not is_validation_score(name)}
    known = {f"{p}/{m}" for p in PROTOCOL_METRICS for m in request.evaluation.metrics(p)}
    # Training logs it, and this checkpoint has no log; test_run.py has one.
    assert sorted(reported) == sorted(known - {"health/teacher_entropy"})
