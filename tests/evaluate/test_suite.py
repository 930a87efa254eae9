"""A suite: one pass for each model and data set, every baseline once, and the same as the evaluations one by one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlparse

import pytest
import torch
from evaluation_material import backbone_of, model_card, request_of, write_checkpoint
from safetensors.torch import save

from sonoforge_trainer.contract import ContractError, EvalSuiteSpec, Evaluation, read_suite, suite_requests
from sonoforge_trainer.evaluate.features import BackboneModel
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.evaluate.subjects import open_subject
from sonoforge_trainer.evaluate.suite import CHECKPOINT, run_suite, tallies
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.checkpoint import write_imported
from sonoforge_trainer.weights.loading import load_weights

CPU = torch.device("cpu")
QUICK = {"bootstrap": 0, "k": (5,), "shots": (1,), "seeds": 2, "linear_epochs": 1}


@pytest.fixture(scope="session")
def sets(tmp_path_factory, phantoms):
    """URIs of three data sets."""
    found = [phantoms]
    for number in (1, 2):
        output = tmp_path_factory.mktemp("set").as_uri()
        rule = PhantomRule(72, size=48, frames=1, clips=6, seed=number)
        build_phantoms(output, rule, PlanRule(100, 0, (0.5, 0.25, 0.25)), Storage())
        found.append(f"{output}/shards.json")
    return found


@pytest.fixture
def natural(tmp_path):
    """URI of a file of weights for RGB images, as the authors of DINOv2 publish them."""
    card = model_card(in_channels=3, mean=(0.5,) * 3, std=(0.2,) * 3, registers=0, pos_embed="offset")
    (tmp_path / "natural.safetensors").write_bytes(save(dict(backbone_of(card, 7).state_dict())))
    return (tmp_path / "natural.safetensors").as_uri()


def fourteen(sets):
    """14 evaluations over 3 data sets, as a suite may cut them."""
    cuts = [("knn",), ("knn", "health"), ("health",), ("knn",), ("knn",)]
    named = [(shards, protocols) for shards in sets for protocols in cuts][:14]
    return tuple(
        Evaluation(name=f"e{number}", shards=shards, protocols=protocols, **QUICK)
        for number, (shards, protocols) in enumerate(named)
    )


def test_fourteen_evaluations_over_three_data_sets_cost_three_passes_a_model(checkpoint, sets, natural, storage):
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [e.document() for e in fourteen(sets)],
            "baselines": [
                {"name": "natural", "kind": "weights", "uri": natural},
                {"name": "random", "kind": "random"},
                {"name": "pixels", "kind": "raw-pixels"},
                {"name": "texture", "kind": "hog-lbp"},
            ],
        }
    )
    costs = {cost.model: cost for cost in tallies(run_suite(suite, *checkpoint, storage, CPU))}
    assert list(costs) == [CHECKPOINT, "natural", "random", "pixels", "texture"]
    assert {model: cost.passes for model, cost in costs.items()} == dict.fromkeys(costs, 3)
    assert {model: cost.sets for model, cost in costs.items()} == dict.fromkeys(costs, 3)
    # Floors have no health: 3 of the 14 are nothing else.
    evaluations = {CHECKPOINT: 14, "natural": 14, "random": 14, "pixels": 11, "texture": 11}
    assert {model: cost.evaluations for model, cost in costs.items()} == evaluations
    assert str(costs["natural"]) == "natural: 14 evaluations over 3 data sets, 3 feature passes"


def test_a_suite_that_is_run_again_costs_nothing_and_says_the_same(checkpoint, phantoms, natural, storage):
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [{"name": "planes", "shards": phantoms, "protocols": ["knn"], "bootstrap": 20}],
            "baselines": [{"name": "natural", "kind": "weights", "uri": natural}],
        }
    )
    first, again = (run_suite(suite, *checkpoint, storage, CPU) for _ in range(2))
    assert [(e.made, e.passes) for e in first] == [(True, 1), (True, 1)]
    assert [(e.made, e.passes) for e in again] == [(False, 0), (False, 0)]
    assert [e.result for e in again] == [e.result for e in first]


def test_a_baseline_is_evaluated_once_for_all_checkpoints_of_a_run(tmp_path, phantoms, natural, storage):
    """And another run has its own."""
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [{"name": "planes", "shards": phantoms, "protocols": ["knn"], "bootstrap": 0}],
            "baselines": [{"name": "natural", "kind": "weights", "uri": natural}],
        }
    )
    made = []
    for run, step in (("a", 10), ("a", 20), ("b", 10)):
        checkpoint = write_checkpoint(storage, (tmp_path / run).as_uri(), step=step, seed=step)
        _, natural_entry = run_suite(suite, *checkpoint, storage, CPU)
        made.append(natural_entry.made)
    assert made == [True, False, True]
    assert len(list(tmp_path.glob("a/baselines/weights-*/eval/planes-*.json"))) == 1


def test_weights_of_others_score_as_the_checkpoint_that_they_are_converted_to(
    tmp_path, checkpoint, phantoms, natural, storage
):
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [{"name": "planes", "shards": phantoms, "protocols": ["knn", "logreg"], "bootstrap": 0}],
            "baselines": [{"name": "natural", "kind": "weights", "uri": natural, "mean": [0.5] * 3, "std": [0.2] * 3}],
        }
    )
    entry = run_suite(suite, *checkpoint, storage, CPU)[1]
    weights = load_weights(natural, storage, mean=(0.5,) * 3, std=(0.2,) * 3)
    ref = write_imported(weights.backbone, weights.card, (tmp_path / "converted").as_uri(), storage)
    request = request_of((ref.uri, ref.manifest_digest), phantoms, "knn", "logreg", name="planes", bootstrap=0)
    alone = evaluate(request.model_copy(update={"evaluation": suite.evaluations[0]}), storage, CPU)
    assert entry.result.scores == alone.scores
    assert (alone.step, alone.samples) == (0, 0)


def test_weights_made_gray_score_like_the_weights_they_were(tmp_path, phantoms, natural, storage):
    """Phantoms are gray, so three channels that see the same say what one says."""
    weights = load_weights(natural, storage)
    found = []
    for name, fitted in (("rgb", weights), ("gray", weights.fitted(mean=(0.18,), std=(0.22,)))):
        ref = write_imported(fitted.backbone, fitted.card, (tmp_path / name).as_uri(), storage)
        found.append(evaluate(request_of((ref.uri, ref.manifest_digest), phantoms, "knn", bootstrap=0), storage, CPU))
    assert found[0].scores.keys() == found[1].scores.keys()
    for name, score in found[0].scores.items():
        assert found[1].scores[name].value == pytest.approx(score.value, abs=0.03), name


def test_what_is_wrong_with_one_baseline_does_not_hold_up_the_others(tmp_path, checkpoint, phantoms, storage):
    (tmp_path / "broken.safetensors").write_bytes(b"no tensors here")
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [{"name": "planes", "shards": phantoms, "protocols": ["knn"], "bootstrap": 0}],
            "baselines": [
                {"name": "broken", "kind": "weights", "uri": (tmp_path / "broken.safetensors").as_uri()},
                {"name": "pixels", "kind": "raw-pixels"},
            ],
        }
    )
    _, broken, pixels = run_suite(suite, *checkpoint, storage, CPU)
    assert broken.result is None
    assert broken.fault.startswith("broken.safetensors: not a safetensors file")
    assert pixels.result is not None
    assert str(tallies([broken])[0]) == "broken: 0 evaluations over 0 data sets, 0 feature passes, 1 failed"


def test_random_weights_depend_on_the_seed_and_not_on_the_checkpoint(tmp_path, phantoms, storage):
    scores = []
    for run, seed, baseline in (("a", 1, 0), ("b", 2, 0), ("c", 1, 5)):
        checkpoint = write_checkpoint(storage, (tmp_path / run).as_uri(), seed=seed)
        suite = EvalSuiteSpec.parse(
            {
                "evaluations": [{"name": "planes", "shards": phantoms, "protocols": ["health"]}],
                "baselines": [{"name": "random", "kind": "random", "seed": baseline}],
            }
        )
        scores.append(run_suite(suite, *checkpoint, storage, CPU)[1].result.scores)
    assert scores[0] == scores[1] != scores[2]


@pytest.mark.parametrize("said", [None, 0.25])
def test_random_weights_are_trained_from_layerscale_one_and_looked_at_as_pretraining_starts(tmp_path, storage, said):
    """Their features have to be those of step 0; a training on labels that starts at 1e-5 would be held back."""
    checkpoint = write_checkpoint(storage, (tmp_path / "run").as_uri(), layer_scale=said)
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [{"name": "planes", "shards": "file:///e/shards.json", "protocols": ["finetune"]}],
            "baselines": [{"name": "random", "kind": "random", "seed": 4}],
        }
    )
    _, (_, request) = suite_requests(suite, *checkpoint)
    subject = open_subject(request, storage, CPU)
    step_0 = Backbone(subject.backbone.config.model_copy(update={"layer_scale": said or 1e-5}), 32).eval()
    initialise(step_0, 4)
    image = torch.arange(32 * 32).view(1, 1, 32, 32).remainder(251).to(torch.uint8)
    expected, _ = BackboneModel(step_0, subject.card, None, CPU)(image)
    assert torch.equal(subject.model(image)[0]["cls"], expected["cls"])
    for name, value in subject.backbone.state_dict().items():
        assert torch.equal(value, torch.ones_like(value) if name.endswith("gamma") else step_0.state_dict()[name]), name
    assert not subject.backbone.training


YAML = """
apiVersion: sonoforge.dev/v1alpha1
kind: EvalSuite
metadata: {{name: planes}}
spec:
  evaluations:
    - {{name: planes, shards: "{shards}", protocols: [knn], bootstrap: 0}}
    - {{name: again, shards: "{shards}", protocols: [logreg], bootstrap: 0}}
  baselines:
    - {{name: pixels, kind: raw-pixels}}
"""


def test_the_command_runs_a_suite_file_and_says_what_it_cost(tmp_path, checkpoint, phantoms):
    suite = tmp_path / "suite.yaml"
    suite.write_text(YAML.format(shards=phantoms))
    folder = Path(urlparse(checkpoint[0]).path)
    ended = subprocess.run(
        [sys.executable, "-m", "sonoforge_trainer", "eval", str(folder), "--suite", str(suite), "--threads", "1"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
        check=True,
    )
    told = json.loads(ended.stdout)
    assert told["featurePasses"] == {"checkpoint": 1, "pixels": 1}
    assert {"planes-knn/f1_macro", "again-logreg/f1_macro"} <= told["scores"]["pixels"].keys()
    assert "checkpoint: 2 evaluations over 1 data set, 1 feature pass" in ended.stderr


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"baselines": [{"name": "a", "kind": "weights"}]}, r"spec\.baselines\.0\.uri: found None\. Allowed: the URI"),
        (
            {"baselines": [{"name": "a", "kind": "random", "uri": "s3://b/a.pth"}]},
            r"spec\.baselines\.0\.uri: found 's3://b/a\.pth'\. Allowed: nothing, with kind random",
        ),
        (
            {"baselines": [{"name": "a", "kind": "hog"}, {"name": "a", "kind": "random"}]},
            r"^spec\.baselines\.1\.name: found 'a'\. Allowed: a name of its own, baselines\.0 has this one$",
        ),
        (
            {"baselines": [{"name": "a", "kind": "hog"}, {"name": "b", "kind": "hog"}]},
            r"^spec\.baselines\.1: found 'b'\. Allowed: a model other than baselines\.0$",
        ),
    ],
)
def test_a_suite_that_cannot_be_is_refused_by_field(spec, message):
    evaluations = [{"name": "e", "shards": "s3://b/shards.json", "protocols": ["knn"]}]
    with pytest.raises(ContractError, match=message):
        EvalSuiteSpec.parse({"evaluations": evaluations, **spec}, where="spec")


def test_a_file_without_a_suite_is_refused():
    with pytest.raises(ContractError, match=r"jobs\.yaml: found 0 EvalSuite documents\. Allowed: exactly one"):
        read_suite("kind: PretrainJob\n", where="jobs.yaml")


def test_a_random_baseline_that_is_finetuned_is_training_from_scratch_and_floors_have_none(
    checkpoint, phantoms, natural, storage
):
    suite = EvalSuiteSpec.parse(
        {
            "evaluations": [
                {
                    "name": "planes",
                    "shards": phantoms,
                    "protocols": ["finetune"],
                    "bootstrap": 0,
                    "finetune": {"epochs": 1, "batch": 32, "augment": False},
                }
            ],
            "baselines": [
                {"name": "scratch", "kind": "random"},
                {"name": "natural", "kind": "weights", "uri": natural},
                {"name": "pixels", "kind": "raw-pixels"},
            ],
        }
    )
    entries = run_suite(suite, *checkpoint, storage, CPU)
    assert [entry.model for entry in entries] == [CHECKPOINT, "scratch", "natural"]
    assert all("finetune/f1_macro" in entry.result.scores for entry in entries), [entry.fault for entry in entries]
