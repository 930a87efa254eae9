"""A job narrows what its runtime gives and never widens it."""

from __future__ import annotations

import pytest
from builders import JOB

from sonoforge_operator.api import parse_job, parse_job_file, parse_runtime, parse_suite
from sonoforge_operator.limits import narrow, queue_of
from sonoforge_trainer.contract import ContractError, load_yaml

RUNTIME = """
apiVersion: sonoforge.dev/v1alpha1
kind: PretrainRuntime
metadata: {name: a100}
spec:
  images: {trainer: "registry.example/sonoforge@sha256:0", pullSecrets: [registry]}
  limits: {maxNodes: 8, maxGpusPerNode: 4, queues: [research, night]}
  workers:
    nodeSelector: {gpu.example/model: a100}
    tolerations: [{key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}]
    requests: {cpu: 8, memory: 64Gi}
  evaluation: {gpus: 1}
  queueName: standard
  storage: {endpointUrl: "https://s3.example:9000", pathStyle: true, credentialsSecret: s3, caBundle: hospital-ca}
  network: {storageCidrs: [10.20.0.0/16], storagePorts: [9000]}
"""


def runtime():
    return parse_runtime(load_yaml(RUNTIME, where="runtime.yaml")).spec


def job(**spec):
    document = load_yaml(JOB.split("---")[0], where="job.yaml")
    document["spec"]["training"]["recipe"] |= {"globalBatch": 128, "virtualRanks": 64}
    return parse_job({**document, "spec": {**document["spec"], **spec}})


def test_a_job_inside_its_runtime_is_accepted():
    workers = {"maxNodes": 8, "gpusPerNode": 4, "nodeSelector": {"zone": "b", "gpu.example/model": "a100"}}
    inside = job(workers=workers, queueName="night")
    narrow(inside, runtime())
    assert queue_of(inside, runtime()) == "night"


def test_a_job_that_names_no_queue_goes_through_the_one_of_its_runtime():
    narrow(job(), runtime())
    assert queue_of(job(), runtime()) == "standard"
    narrow(job(queueName="standard"), runtime())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"workers": {"maxNodes": 9}},
            "PretrainJob.spec.workers.maxNodes: found 9. Allowed: at most 8, the runtime's limits.maxNodes",
        ),
        (
            {"workers": {"gpusPerNode": 5}},
            "PretrainJob.spec.workers.gpusPerNode: found 5. Allowed: at most 4, the runtime's limits.maxGpusPerNode",
        ),
        ({"queueName": "vip"}, "PretrainJob.spec.queueName: found 'vip'. Allowed: one of night, research, standard"),
        (
            {"workers": {"nodeSelector": {"gpu.example/model": "h100"}}},
            "PretrainJob.spec.workers.nodeSelector.gpu.example/model: found 'h100'. "
            "Allowed: 'a100', which the runtime sets",
        ),
    ],
)
def test_a_job_that_widens_its_runtime_is_refused(spec, message):
    with pytest.raises(ContractError) as error:
        narrow(job(**spec), runtime())
    assert str(error.value) == message


def test_every_field_that_widens_the_runtime_is_named():
    with pytest.raises(ContractError) as error:
        narrow(job(workers={"maxNodes": 9, "gpusPerNode": 5}, queueName="vip"), runtime(), where="job fetal")
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "job fetal.spec.workers.maxNodes",
        "job fetal.spec.workers.gpusPerNode",
        "job fetal.spec.queueName",
    ]


def test_a_runtime_without_queues_lets_a_job_name_none():
    with pytest.raises(ContractError, match=r"queueName: found 'vip'. Allowed: no queue, the runtime names none"):
        narrow(job(queueName="vip"), parse_runtime({**load_yaml(RUNTIME, where=""), "spec": {}}).spec)


def test_a_runtime_has_defaults_for_all_that_is_not_given():
    given = runtime()
    assert given.accelerator.resource_name == "nvidia.com/gpu"
    assert given.workers.shared_memory == "8Gi"
    assert given.workers.requests == {"cpu": "8", "memory": "64Gi"}
    assert (given.user_id, given.group_id) == (65_532, 65_532)
    assert given.network.policies


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"network": {"storageCidrs": ["10.20.0.0/33"]}}, "network.storageCidrs.0: not a network in CIDR notation"),
        ({"userId": 0}, "spec.userId: found 0. Allowed: a whole number >= 1"),
        ({"workers": {"requests": {"memory": "64 GB"}}}, "workers.requests.memory: found '64 GB'. Allowed: a text"),
        ({"workers": {"tolerations": [{"operator": "Equal"}]}}, "the operator Equal needs one"),
        ({"workers": {"tolerations": [{"key": "a", "operator": "Exists", "value": "b"}]}}, "Exists compares no value"),
        ({"storage": {"endpointUrl": "https://user:word@s3.example"}}, "storage.endpointUrl: found"),
        ({"accelerator": {"resourceName": "two words"}}, "accelerator.resourceName: found 'two words'"),
    ],
)
def test_a_mistake_in_a_runtime_is_named_with_its_place(spec, message):
    with pytest.raises(ContractError) as error:
        parse_runtime({**load_yaml(RUNTIME, where=""), "spec": spec})
    assert message in str(error.value)


@pytest.mark.parametrize("parse", [parse_job, parse_runtime, parse_suite])
@pytest.mark.parametrize("document", [None, [], "text", 7, {}, {"metadata": None, "spec": []}, {"spec": {}}])
def test_an_object_of_any_shape_is_refused_with_a_contract_error(parse, document):
    with pytest.raises(ContractError):
        parse(document)


def test_an_object_as_a_cluster_returns_it_is_read():
    document = load_yaml(RUNTIME, where="runtime.yaml")
    document["metadata"] |= {"uid": "u", "generation": 3, "namespace": "lab", "managedFields": [], "labels": {"a": "b"}}
    read = parse_runtime({**document, "status": {"anything": 1}})
    assert (read.metadata.uid, read.metadata.generation) == ("u", 3)


def test_a_job_file_may_hold_a_runtime_with_cluster_parts():
    text = JOB.replace("spec:\n  training", "spec:\n  runtimeRef: {name: a100}\n  training", 1) + "---" + RUNTIME
    assert parse_job_file(text, where="job.yaml").runtime.limits.max_nodes == 8
