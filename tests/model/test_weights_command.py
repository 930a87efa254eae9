"""`sonoforge weights`: what a person sees of a file, and what they get from it."""

import os
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from sonoforge_trainer.checkpoint import CheckpointStore
from sonoforge_trainer.contract import COMMIT, ContractError, ExitCode
from sonoforge_trainer.storage import Storage
from sonoforge_trainer.weights.cli import command
from sonoforge_trainer.weights.loading import load_weights

JOB = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainJob
metadata: {{name: fetal}}
spec:
  training:
    model: {{arch: vit_tiny, depth: 3, patchSize: 8, registers: {registers}, inChannels: 1}}
    data: {{shards: "s3://bucket/shards.json"}}
    recipe: {{preset: tiny, crops: {{globalSize: 48, localSize: 24}}}}
  checkpoints: {{uri: "s3://bucket/run"}}
"""


@pytest.fixture
def published(lively, tmp_path):
    """A file as the authors of DINOv2 publish it, with the heads of a training run left in."""
    state = dict(lively(registers=4, pos_embed="antialias").state_dict())
    save_file({**state, "dino_head.last_layer.weight": torch.ones(2)}, tmp_path / "published.safetensors")
    return tmp_path / "published.safetensors"


def said(*arguments):
    ended = CliRunner().invoke(command, [str(argument) for argument in arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output.splitlines()


def test_inspect_says_what_a_file_is_and_what_became_of_its_keys(published):
    lines = said("inspect", published)
    assert lines[0].split() == ["layout", "dinov2"]
    assert "vit_tiny, 3 blocks of width 192, mlp" in lines[1]
    assert "3 x 32 x 32, patches of 8, 4 registers" in lines[2]
    assert "mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225" in lines[3]
    assert "none missing or unexpected" in lines[5]
    assert lines[6].split(maxsplit=2) == ["left", "out", "1: dino_head.last_layer.weight"]


def test_inspect_compares_with_a_job(published, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(registers=4))
    lines = said("inspect", published, "--against", job)
    assert lines[-1].startswith("fits")
    adapted = [line.split()[1].rstrip(":") for line in lines if line.startswith("adapts")]
    assert adapted == [
        "training.model.inChannels",
        "training.data.mean",
        "training.data.std",
        "training.recipe.crops.globalSize",
    ]


def test_a_file_that_does_not_fit_ends_as_a_configuration_error_that_names_the_field(published, tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(JOB.format(registers=2))
    ended = subprocess.run(
        [sys.executable, "-m", "sonoforge_trainer", "weights", "inspect", str(published), "--against", str(job)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    assert ended.returncode == ExitCode.CONFIG
    assert "training.model.registers: found 2. Allowed: 4, which the file has" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_convert_makes_a_gray_checkpoint_of_another_resolution(published, tmp_path):
    said("convert", published, tmp_path / "gray", "--gray", "--resolution", 48)
    storage, uri = Storage(), (tmp_path / "gray").as_uri()
    digest = storage.read(f"{uri}/{COMMIT}").decode()
    teacher = CheckpointStore(storage, uri).load_teacher(uri, digest)
    assert (teacher.card.in_channels, teacher.card.resolution, teacher.card.registers) == (1, 48, 4)
    assert teacher.card.mean == pytest.approx((0.449,), abs=1e-6)
    assert teacher.card.source.layout == "dinov2"
    assert teacher.tensors["pos_embed"].shape == (1, 37, 192)


def test_export_writes_a_folder_that_is_read_back(published, tmp_path):
    said("convert", published, tmp_path / "converted")
    said("export", tmp_path / "converted", tmp_path / "exported", "--layout", "timm")
    assert "reg_token" in load_file(tmp_path / "exported" / "model.safetensors")
    weights = load_weights((tmp_path / "exported" / "model.safetensors").as_uri(), Storage())
    assert (weights.translated.layout, weights.card.registers) == ("timm", 4)


@pytest.mark.parametrize(
    ("text", "message"), [("kind: EvalSuite", "found no PretrainJob"), ("a: [", "job.yaml, line 1")]
)
def test_a_file_without_a_job_is_refused(published, tmp_path, text, message):
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(ContractError, match=message):
        said("inspect", published, "--against", job)


def test_a_missing_file_is_a_configuration_error(tmp_path):
    with pytest.raises(ContractError, match=r"missing\.safetensors"):
        said("inspect", tmp_path / "missing.safetensors")
