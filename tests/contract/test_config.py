"""The configuration says what is wrong and where, and presets carry the published numbers."""

from __future__ import annotations

import subprocess
import sys

import pytest

from sonoforge_trainer.contract import CheckpointConfig, ContractError, ModelConfig, TrainConfig, load_yaml, preset

DATA = {"shards": "s3://bucket/set/shards.json"}


def resolve(**parts: object) -> TrainConfig:
    return TrainConfig.resolve({"data": DATA, **parts})


def test_importing_the_contract_loads_nothing_heavy():
    heavy = "torch numpy boto3 botocore webdataset PIL sklearn safetensors torchvision kopf kubernetes structlog"
    code = f"import sys, sonoforge_trainer.contract\nprint(sorted(m for m in {heavy.split()!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (
            {"data": {**DATA, "clipawre": True}},
            "training.data.clipawre: unknown key; did you mean 'clipAware'? "
            "Allowed: blockShards, clipAware, datasetDigest, mean, shards, std",
        ),
        (
            {"data": {}},
            "training.data.shards: required, but not given. Allowed: a text matching ^(s3|file)://.+\\.json$",
        ),
        (
            {"data": DATA, "recipe": {"globalBatch": -3}},
            "training.recipe.globalBatch: found -3. Allowed: a whole number > 0",
        ),
        (
            {"data": DATA, "recipe": {"loss": {"centering": "mean"}}},
            "training.recipe.loss.centering: found 'mean'. Allowed: one of ema, sinkhorn",
        ),
        (
            {"data": DATA, "recipe": {"preset": "dinov3"}},
            "training.recipe.preset: found 'dinov3'. Allowed: one of dinov2-short, ultradino, tiny",
        ),
        (
            {"data": DATA, "recipe": {"crops": {"globalScale": [0.1, 2.0]}}},
            "training.recipe.crops.globalScale.1: found 2.0. Allowed: a number > 0 <= 1",
        ),
        (
            {"data": DATA, "recipe": {"crops": {"globalScale": [0.9, 0.3]}}},
            "training.recipe.crops.globalScale: found [0.9, 0.3]. Allowed: two numbers, the lower one first",
        ),
        (
            {"data": DATA, "recipe": {"crops": {"localScale": [0.3, 0.05]}}},
            "training.recipe.crops.localScale: found [0.3, 0.05]. Allowed: two numbers, the lower one first",
        ),
        (
            {"data": DATA, "recipe": {"crops": {"localScale": [0, 0.05]}}},
            "training.recipe.crops.localScale.0: found 0. Allowed: a number > 0 <= 1",
        ),
        (
            {"data": DATA, "recipe": {"masks": {"ratio": [0.5, 0.1]}}},
            "training.recipe.masks.ratio: found [0.5, 0.1]. Allowed: two numbers, the lower one first",
        ),
        (
            {"data": DATA, "recipe": {"augment": {"blurSigma": [2, 0.1]}}},
            "training.recipe.augment.blurSigma: found [2, 0.1]. Allowed: two numbers, the lower one first",
        ),
        (
            {"data": DATA, "recipe": {"augment": {"blurSigma": [0, 0.1]}}},
            "training.recipe.augment.blurSigma.0: found 0. Allowed: a number > 0",
        ),
        (
            {"data": DATA, "recipe": {"optim": {"betas": [0.9, 1.0]}}},
            "training.recipe.optim.betas.1: found 1.0. Allowed: a number >= 0 < 1",
        ),
        (
            {"data": DATA, "recipe": {"optim": {"minLr": 0.01}}},
            "training.recipe.optim.minLr: found 0.01. Allowed: at most optim.baseLr, 0.004",
        ),
        (
            {"data": DATA, "recipe": {"globalBatch": 64, "optim": {"minLr": 0.002}}},
            "training.recipe.optim.minLr: found 0.002. Allowed: at most 0.001, the peak of optim.baseLr 0.004 at "
            "globalBatch 64",
        ),
        (
            {"data": DATA, "recipe": {"budgetSamples": 64_000, "schedule": {"warmupSamples": 64_001}}},
            "training.recipe.schedule.warmupSamples: found 64001. Allowed: at most budgetSamples, 64000",
        ),
        (
            {"data": DATA, "recipe": {"budgetSamples": 2047}},
            "training.recipe.budgetSamples: found 2047. Allowed: at least one globalBatch, 2048",
        ),
        (
            {"data": DATA, "recipe": {"globalBatch": 32}},
            "training.recipe.virtualRanks: found 32. Allowed: at most globalBatch 32 / 2 with loss.koleo 0.1, which "
            "needs 2 images a virtual rank; or loss.koleo 0",
        ),
        (
            {"data": DATA, "model": {"depth": 0}},
            "training.model.depth: found 0. Allowed: a whole number > 0",
        ),
        (
            {"data": {**DATA, "datasetDigest": "x"}},
            "training.data.datasetDigest: found 'x'. Allowed: a text matching ^sha256:[0-9a-f]{64}$",
        ),
        (
            {"data": DATA, "recipe": {"globalBatch": 100}},
            "training.recipe.globalBatch: found 100. Allowed: a multiple of virtualRanks 32, for example 96",
        ),
        (
            {"data": DATA, "model": {"patchSize": 14}},
            "training.recipe.crops.localSize: found 96. Allowed: a multiple of model.patchSize 14, for example 98",
        ),
        (
            {"data": DATA, "model": {"inChannels": 1}},
            "training.data.mean: found [0.485, 0.456, 0.406]. Allowed: one number for each of model.inChannels 1\n"
            "training.data.std: found [0.229, 0.224, 0.225]. Allowed: one number for each of model.inChannels 1",
        ),
        ([], "training: found []. Allowed: a mapping with the keys model, data, recipe"),
    ],
)
def test_an_error_gives_the_path_what_was_found_and_what_is_allowed(document, message):
    with pytest.raises(ContractError) as error:
        TrainConfig.resolve(document)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"virtualRanks": True}, "virtualRanks: found True. Allowed: a whole number > 0"),
        ({"globalBatch": "32"}, "globalBatch: found '32'. Allowed: a whole number > 0"),
        ({"optim": {"baseLr": "0.004"}}, "optim.baseLr: found '0.004'. Allowed: a number > 0"),
        ({"optim": {"clipNorm": False}}, "optim.clipNorm: found False. Allowed: a number >= 0"),
        ({"optim": {"betas": [0.9, "0.99"]}}, "optim.betas.1: found '0.99'. Allowed: a number >= 0 < 1"),
    ],
)
def test_what_is_no_number_is_not_made_one(recipe, message):
    with pytest.raises(ContractError) as error:
        resolve(recipe=recipe)
    assert str(error.value) == f"training.recipe.{message}"


def test_an_optional_number_is_one_too():
    with pytest.raises(ContractError, match=r"^everySeconds: found True\. Allowed: a whole number > 0$"):
        CheckpointConfig.parse({"uri": "s3://b/run", "everySeconds": True})


def test_numbers_as_yaml_has_them_are_numbers():
    """YAML 1.1 reads an exponent without a dot, or without a sign, as a text."""
    text = (
        "{globalBatch: 1024, optim: {baseLr: 4e-3, minLr: 1E-6, clipNorm: 3, layerDecay: 9.0e-1, patchEmbedLr: 0.2e0}}"
    )
    recipe = resolve(recipe=load_yaml(text, where="recipe")).recipe
    assert (recipe.global_batch, recipe.optim.base_lr, recipe.optim.min_lr) == (1024, 0.004, 1e-6)
    assert (recipe.optim.clip_norm, recipe.optim.layer_decay, recipe.optim.patch_embed_lr) == (3.0, 0.9, 0.2)


def test_all_faults_are_told_at_once():
    with pytest.raises(ContractError) as error:
        resolve(recipe={"globalBatch": 0, "seed": "x", "loss": {"kolео": 1}})
    assert len(str(error.value).splitlines()) == 3


def test_fields_that_do_not_go_together_are_told_at_once():
    with pytest.raises(ContractError) as error:
        resolve(recipe={"budgetSamples": 100, "schedule": {"warmupSamples": 200}, "optim": {"minLr": 1}})
    paths = [line.split(":")[0].removeprefix("training.recipe.") for line in str(error.value).splitlines()]
    assert paths == ["budgetSamples", "schedule.warmupSamples", "optim.minLr"]


@pytest.mark.parametrize(
    "recipe",
    [
        {"crops": {"globalScale": [0.5, 0.5]}},
        {"masks": {"ratio": [0, 1]}},
        {"optim": {"minLr": 0.004}},
        {"budgetSamples": 2048, "schedule": {"warmupSamples": 2048}},
        {"globalBatch": 64},
        {"globalBatch": 32, "loss": {"koleo": 0}},
        {"optim": {"betas": [0, 0]}},
    ],
)
def test_the_ends_of_what_is_allowed_are_allowed(recipe):
    resolve(recipe=recipe)


def test_a_key_given_twice_is_an_error_and_not_a_silent_override():
    with pytest.raises(ContractError, match=r"job.yaml, line 3: key 'seed' is given twice"):
        load_yaml("seed: 1\nother: 2\nseed: 3\n", where="job.yaml")


def test_dinov2_short_has_the_reference_numbers():
    """ViT-L/16 short: 100 epochs of 1,250 steps of 2,048 images; warm-up 10, temperature 30, last layer 1 epoch."""
    config = resolve()
    recipe = config.recipe
    assert (recipe.steps, recipe.global_batch, recipe.micro_batch) == (125_000, 2048, 64)
    assert recipe.schedule.warmup_samples == 10 * 1250 * 2048
    assert recipe.schedule.teacher_temperature_samples == 30 * 1250 * 2048
    assert recipe.schedule.freeze_last_layer_samples == 1250 * 2048
    assert (recipe.optim.base_lr, recipe.optim.min_lr, recipe.optim.clip_norm) == (0.004, 1e-6, 3.0)
    assert (recipe.optim.layer_decay, recipe.optim.patch_embed_lr, recipe.optim.betas) == (0.9, 0.2, (0.9, 0.999))
    assert (recipe.schedule.weight_decay, recipe.schedule.teacher_momentum) == ((0.04, 0.4), (0.992, 1.0))
    assert recipe.schedule.teacher_temperature == (0.04, 0.07)
    assert (recipe.head.prototypes, recipe.head.bottleneck_dim, recipe.head.shared) == (65_536, 256, True)
    assert (recipe.loss.dino, recipe.loss.ibot, recipe.loss.koleo, recipe.loss.centering) == (1.0, 1.0, 0.1, "ema")
    assert (config.model.arch, config.model.drop_path, config.model.registers) == ("vit_large", 0.3, 0)
    assert recipe.augment.blur == (0.0, 0.9, 0.5)


def test_the_field_defaults_are_the_numbers_of_dinov2_short():
    document = {key: value for key, value in preset("dinov2-short").items() if key != "data"}
    plain = TrainConfig.parse({"data": DATA})
    assert plain == TrainConfig.parse({**document, "data": {**preset("dinov2-short")["data"], **DATA}})


def test_ultradino_is_gray_with_its_own_statistics_and_vertical_flips():
    config = resolve(recipe={"preset": "ultradino"})
    assert (config.model.in_channels, config.model.registers, config.model.patch_size) == (1, 4, 16)
    assert (config.data.mean, config.data.std) == ((0.1842924807,), (0.2187705424,))
    augment = config.recipe.augment
    assert (augment.horizontal_flip, augment.vertical_flip, augment.hue, augment.grayscale) == (0.0, 0.5, 0.0, 0.0)
    assert (config.recipe.steps, config.recipe.global_batch) == (2_000_000, 128)


def test_schedules_keep_their_share_of_a_changed_budget_unless_given():
    recipe = resolve(
        recipe={"preset": "ultradino", "budgetSamples": 64_000_000, "schedule": {"warmupSamples": 1000}}
    ).recipe
    assert recipe.schedule.warmup_samples == 1000
    assert recipe.schedule.teacher_temperature_samples == 19_200_000
    assert recipe.schedule.freeze_last_layer_samples == 640_000


def test_what_the_user_gives_replaces_the_preset_field_by_field():
    config = resolve(model={"arch": "vit_small"}, recipe={"preset": "ultradino", "augment": {"solarize": 0.0}})
    assert (config.model.arch, config.model.registers) == ("vit_small", 4)
    assert (config.recipe.augment.solarize, config.recipe.augment.vertical_flip) == (0.0, 0.5)


@pytest.mark.parametrize(
    ("model", "depth"),
    [
        ({}, 4),
        ({"arch": "vit_tiny"}, 4),
        ({"arch": "vit_small"}, None),
        ({"arch": "vit_small", "depth": 4}, 4),
        ({"depth": None}, None),
        ({"depth": 6}, 6),
        (None, 4),
    ],
)
def test_the_depth_of_a_preset_goes_with_its_architecture_and_null_resets_it(model, depth):
    assert resolve(model=model, recipe={"preset": "tiny"}).model.depth == depth


def test_null_for_what_cannot_be_null_is_an_error():
    with pytest.raises(ContractError, match=r"recipe.globalBatch: found None. Allowed: a whole number > 0"):
        resolve(recipe={"globalBatch": None})


def test_a_section_without_lines_and_a_length_of_null_leave_the_preset():
    schedule = {"warmupSamples": None, "freezeLastLayerSamples": 7}
    config = resolve(recipe={"preset": "tiny", "budgetSamples": 32_000, "crops": None, "schedule": schedule})
    assert config.recipe.crops.global_size == 48
    assert (config.recipe.schedule.warmup_samples, config.recipe.schedule.freeze_last_layer_samples) == (1600, 7)


def test_equal_configs_have_equal_digests_and_a_changed_seed_another():
    one, same, other = resolve(), resolve(model={"arch": "vit_large"}), resolve(recipe={"seed": 1})
    assert one.digest() == same.digest() != other.digest()


def test_a_config_survives_its_own_document():
    config = resolve(recipe={"preset": "tiny"})
    assert TrainConfig.from_json(config.to_json()) == config
    assert TrainConfig.resolve(config.document()) == config
    full = resolve(model={"depth": None}, recipe={"preset": "tiny"})
    assert TrainConfig.resolve(full.document()) == full


def test_configs_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        ModelConfig().depth = 3


def test_a_job_without_init_keeps_the_digest_that_it_had_before_there_was_one():
    """So that a run that goes on under a newer version finds its checkpoints."""
    assert "init" not in TrainConfig.resolve({"data": {"shards": "s3://bucket/shards.json"}}).document()


def test_the_weights_to_start_from_are_part_of_the_digest():
    documents = [
        {"data": {"shards": "s3://bucket/shards.json"}, **more}
        for more in (
            {},
            {"init": {"uri": "s3://bucket/a.pth"}},
            {"init": {"uri": "s3://bucket/b.pth"}},
            {"init": {"uri": "s3://bucket/a.pth", "sha256": "sha256:" + "0" * 64}},
            {"init": {"uri": "s3://bucket/a.pth", "freezeBackboneSamples": 0}},
        )
    ]
    assert len({TrainConfig.resolve(document).digest() for document in documents}) == 5


@pytest.mark.parametrize(
    ("init", "message"),
    [
        (
            {"uri": "https://host/a.pth"},
            r"training\.init\.uri: found 'https://host/a\.pth'\. Allowed: .*safetensors\|pth",
        ),
        ({"uri": "s3://bucket/a.pth", "sha256": "abc"}, r"training\.init\.sha256: found 'abc'"),
        (
            {"uri": "s3://bucket/a.pth", "freezeBackboneSamples": 256_000_000},
            r"training\.init\.freezeBackboneSamples: found 256000000\. Allowed: at most recipe\.budgetSamples 256",
        ),
    ],
)
def test_weights_that_cannot_be_started_from_are_refused_by_field(init, message):
    with pytest.raises(ContractError, match=message):
        TrainConfig.resolve({"data": {"shards": "s3://bucket/shards.json"}, "init": init})
