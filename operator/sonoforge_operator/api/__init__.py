"""The custom resources as Python types: what a person writes. The CRDs are generated from them.

One file may hold several documents: the PretrainJob, and the PretrainRuntime and EvalSuite that it names.
"""

from sonoforge_operator.api.fields import API_VERSION, GROUP, VERSION, NameRef, seconds
from sonoforge_operator.api.job import EvaluationPolicy, PretrainJob, PretrainJobSpec, RestartPolicy, Workers
from sonoforge_operator.api.reading import JobFile, check_best_by, parse_job, parse_job_file, parse_runtime, parse_suite
from sonoforge_operator.api.runtime import Images, Limits, Network, PodSettings, PretrainRuntimeSpec, Toleration
from sonoforge_trainer.contract import EvalSuiteSpec

__all__ = [
    "API_VERSION",
    "GROUP",
    "VERSION",
    "EvalSuiteSpec",
    "EvaluationPolicy",
    "Images",
    "JobFile",
    "Limits",
    "NameRef",
    "Network",
    "PodSettings",
    "PretrainJob",
    "PretrainJobSpec",
    "PretrainRuntimeSpec",
    "RestartPolicy",
    "Toleration",
    "Workers",
    "check_best_by",
    "parse_job",
    "parse_job_file",
    "parse_runtime",
    "parse_suite",
    "seconds",
]
