"""What the API server refuses by itself: rules in CEL, with messages that say what to do, and unique list entries."""

from __future__ import annotations

from collections.abc import Mapping

from sonoforge_operator import api, resources
from sonoforge_operator.schema import Rule, Schema
from sonoforge_trainer import contract
from sonoforge_trainer.contract import Part

RULES = (
    Rule(
        api.PretrainJobSpec,
        field="training",
        rule="self == oldSelf",
        message="training decides the result and cannot change; create another job with the new settings",
    ),
    Rule(
        contract.CheckpointConfig,
        field="uri",
        rule="self == oldSelf",
        message="the run continues from the checkpoints at this uri, so it cannot change; create another job",
    ),
    Rule(
        api.Workers,
        rule="self.minNodes <= self.maxNodes",
        message="minNodes is above maxNodes; lower minNodes or raise maxNodes",
    ),
    Rule(
        api.EvaluationPolicy,
        rule="!has(self.bestBy) || has(self.suiteRef)",
        message="bestBy needs evaluations to choose by; name an EvalSuite in suiteRef",
    ),
    Rule(
        api.EvaluationPolicy,
        rule="!has(self.stopAfterNoGain) || has(self.bestBy)",
        message="stopAfterNoGain needs a score that can gain; name it in bestBy as EVALUATION-PROTOCOL/METRIC",
    ),
    Rule(
        contract.Recipe,
        rule="!has(self.globalBatch) || !has(self.virtualRanks) || self.globalBatch % self.virtualRanks == 0",
        message="globalBatch is not a multiple of virtualRanks, which share it equally; change one of them",
    ),
    *(
        Rule(
            contract.TrainConfig,
            rule=(
                "!has(self.model) || !has(self.model.patchSize) || !has(self.recipe) || !has(self.recipe.crops)"
                f" || !has(self.recipe.crops.{size}) || self.recipe.crops.{size} % self.model.patchSize == 0"
            ),
            message=f"recipe.crops.{size} is not a multiple of model.patchSize; change one of them",
        )
        for size in ("globalSize", "localSize")
    ),
    Rule(
        contract.Baseline,
        rule="self.kind != 'weights' || has(self.uri)",
        message="a baseline of kind weights needs its file; give uri",
    ),
    Rule(
        contract.Baseline,
        rule="self.kind == 'weights' || !has(self.uri)",
        message="uri goes with kind weights only; change the kind or remove uri",
    ),
    Rule(
        api.Toleration,
        rule="self.operator != 'Exists' || !has(self.value) || self.value == ''",
        message="operator Exists compares no value; remove the value or use Equal",
    ),
    Rule(
        api.Toleration,
        rule="self.operator != 'Equal' || (has(self.key) && self.key != '')",
        message="operator Equal needs a key; give one or use Exists",
    ),
)
"""Rules on types and fields. They are checked at once, where those of the types are checked by the operator."""

LISTS: Mapping[tuple[type[Part], str], tuple[str, ...]] = {
    (api.EvalSuiteSpec, "evaluations"): ("name",),
    (api.EvalSuiteSpec, "baselines"): ("name",),
    (contract.Evaluation, "protocols"): (),
    (api.Images, "pullSecrets"): (),
    (api.Limits, "queues"): (),
    (api.Network, "storageCidrs"): (),
    (api.Network, "storagePorts"): (),
    (resources.PretrainJobStatus, "conditions"): ("type",),
}
"""Lists whose entries are unique: the fields of their key, or none for a set."""

_NAME_LENGTH = 63
SHORT_NAME: Schema = {
    "rule": f"size(self.metadata.name) <= {_NAME_LENGTH}",
    "message": f"the name is a label of other objects, so it may have at most {_NAME_LENGTH} characters",
}
"""A rule on a whole object."""
