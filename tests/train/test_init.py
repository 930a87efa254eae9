"""Continued pretraining: the run starts as the model it starts from, the heads learn first, then the backbone."""

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from sonoforge_trainer.checkpoint import CheckpointStore
from sonoforge_trainer.contract import ContractError, Evaluation, EvaluationRequest, ExitCode, InitConfig
from sonoforge_trainer.contract.config import ModelConfig
from sonoforge_trainer.evaluate.run import evaluate
from sonoforge_trainer.model import Backbone, initialise
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms
from sonoforge_trainer.storage import IntegrityError, Storage
from sonoforge_trainer.weights.checkpoint import write_imported
from sonoforge_trainer.weights.loading import load_weights

STORAGE = Storage()


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    """URI of published weights: for RGB images of 32 pixels, with ImageNet's normalisation. The job has neither."""
    model = ModelConfig(arch="vit_tiny", depth=1, patch_size=8, registers=2, in_channels=3, layer_scale=0.5)
    backbone = Backbone(model, 32)
    initialise(backbone, 3)
    path = tmp_path_factory.mktemp("published") / "weights.safetensors"
    path.write_bytes(save(dict(backbone.state_dict())))
    return path.as_uri()


def from_weights(config, uri, **given):
    training = config.training.model_copy(update={"init": InitConfig(uri=uri, **given)})
    return config.model_copy(update={"training": training})


def test_the_first_checkpoint_scores_as_the_weights_that_the_run_starts_from(here, source, tmp_path):
    """k-NN at step 0, on one gray channel of 16 pixels, equals that of the RGB model of 32 pixels at 16 pixels."""
    output = (tmp_path / "labelled").as_uri()
    build_phantoms(output, PhantomRule(144, size=48, frames=1, clips=6), PlanRule(100, 0, (0.5, 0.25, 0.25)), STORAGE)
    evaluation = Evaluation(
        name="phantoms", shards=f"{output}/shards.json", protocols=("knn",), k=(5, 10), bootstrap=0, resolution=16
    )
    config = from_weights(here.config(steps=2), source)
    assert here.run_here(config) is ExitCode.OK

    weights = load_weights(source, STORAGE)
    published = write_imported(weights.backbone, weights.card, (tmp_path / "published").as_uri(), STORAGE)
    step_0 = CheckpointStore(STORAGE, config.checkpoints.uri).committed()[0]
    assert step_0.step == 0
    found = [
        evaluate(
            EvaluationRequest(checkpoint_uri=ref.uri, checkpoint_digest=ref.manifest_digest, evaluation=evaluation),
            STORAGE,
            torch.device("cpu"),
        ).scores
        for ref in (published, step_0)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("frozen_samples", [48, 16])
def test_the_heads_learn_while_the_backbone_is_frozen_and_then_it_learns_too(here, source, frozen_samples):
    """6 steps of 8 images: the backbone is frozen for all of them, or for the first two."""
    config = from_weights(here.config(steps=6), source, freeze_backbone_samples=frozen_samples, ramp_backbone_samples=0)
    assert here.run_here(config) is ExitCode.OK
    expected = load_weights(source, STORAGE).fitted(
        mean=config.training.data.mean, std=config.training.data.std, resolution=16
    )
    store = CheckpointStore(STORAGE, config.checkpoints.uri)
    first, *_, last = store.committed()
    assert (first.step, last.step) == (0, 6)
    before, after = (store.load(ref).tensors for ref in (first, last))
    for network in ("student", "teacher"):
        moved = [
            name
            for name, tensor in expected.tensors.items()
            if not torch.equal(after[f"{network}.backbone.{name}"], tensor)
        ]
        if frozen_samples == 48:
            assert moved == []
        else:
            assert len(moved) > len(expected.tensors) / 2
    heads = [name for name in before if name.startswith("student.dino_head")]
    assert any(not torch.equal(after[name], before[name]) for name in heads)
    for name in before:
        if name.startswith("student."):
            assert torch.equal(before[name], before[name.replace("student.", "teacher.", 1)]), name


def test_a_run_that_goes_on_needs_the_file_no_more(here, source, tmp_path):
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes(Path(source.removeprefix("file://")).read_bytes())
    assert here.run_here(from_weights(here.config(steps=4), copy.as_uri())) is ExitCode.OK
    copy.unlink()
    assert here.run_here(from_weights(here.config(steps=4), copy.as_uri())) is ExitCode.OK


def test_a_file_with_another_digest_is_refused(here, source):
    data = Path(source.removeprefix("file://")).read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    with pytest.raises(IntegrityError):
        here.run_here(from_weights(here.config(steps=2), source, sha256=f"sha256:{digest[::-1]}"))
    assert here.run_here(from_weights(here.config(steps=2), source, sha256=f"sha256:{digest}")) is ExitCode.OK


def test_weights_that_do_not_fit_the_model_are_refused_by_field(here, source):
    config = from_weights(here.config(steps=2), source)
    model = config.training.model.model_copy(update={"registers": 4})
    config = config.model_copy(update={"training": config.training.model_copy(update={"model": model})})
    with pytest.raises(
        ContractError, match=r"training\.model\.registers: found 4\. Allowed: 2, which the weights have"
    ):
        here.run_here(config)
