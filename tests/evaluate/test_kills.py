"""A suite that is killed at any moment and run again, before a real S3 server: the same numbers, no leftovers."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import yaml
from evaluation_material import write_checkpoint

from sonoforge_trainer.contract import read_suite
from sonoforge_trainer.evaluate.suite import run_suite
from sonoforge_trainer.shards.phantoms import PhantomRule
from sonoforge_trainer.shards.plan import PlanRule
from sonoforge_trainer.shards.synth import build_phantoms

PROTOCOLS = ("segment", "finetune", "knn", "linear", "logreg", "fewshot", "segment-probe", "health")
RESULT = r"/eval/(planes|after)-[0-9a-f]+\.json$"
OF_ONE_RUN = ("seconds", "featurePasses")
"""What a result says of the process that made it: its times, and whether it found the features of an earlier one."""


@dataclass(frozen=True)
class Death:
    """A moment to be killed at: a request to the server, or the second line of the log that says something."""

    method: str = ""
    target: str = ""
    """Pattern of the path."""
    again: bool = False
    """Not at the first request of this kind, but at the next one with another target."""
    done: bool = False
    """After the server did what was asked, before the process knows; otherwise before the server is asked."""
    line: str = ""
    """Part of a line on standard error."""


DEATHS = {
    "in the feature pass": Death("GET", r"\.tar$", again=True),
    "between features and their index": Death("PUT", r"/features-[0-9a-f]+\.json$"),
    "in the second of two trainings": Death(line="protocol=finetune"),
    "just before the result": Death("PUT", RESULT),
    "just after the result": Death("PUT", RESULT, done=True),
}
BEFORE_THE_RESULT = list(DEATHS)[:-1]


@dataclass
class Lives:
    """Runs the command as processes whose requests pass the proxy, and ends them with SIGKILL."""

    proxy: object
    fault: Callable
    arguments: list[str]
    environment: dict[str, str]
    process: subprocess.Popen | None = None

    def live(self, death: Death | None = None) -> int:
        """One life; its exit status."""
        self.proxy.rule = self._rule(death) if death and death.method else lambda request: None
        self.process = subprocess.Popen(
            [sys.executable, "-m", "sonoforge_trainer", "eval", *self.arguments],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        said = []
        for line in self.process.stderr:
            said.append(line)
            if death and death.line and sum(death.line in one and "validated" in one for one in said) == 2:
                self.process.kill()
        status = self.process.wait()
        self.process.stderr.close()
        assert status in (0, -9), "".join(said)
        return status

    def _rule(self, death: Death):
        seen = []

        def rule(request):
            path = request.target.partition("?")[0]
            fits = request.method == death.method and re.search(death.target, path)
            if seen and (death.done or (death.again and fits and path != seen[0])):
                return self._killed()
            if fits and not seen:
                seen.append(path)
                if death.done:
                    return self.fault(lose_answer=True)
                if not death.again:
                    return self._killed()
            return None

        return rule

    def _killed(self):
        self.process.kill()
        return self.fault(status=(503, "SlowDown"))  # so that the server is not asked for the dead


def test_a_suite_that_is_killed_at_any_moment_gives_the_same_numbers_and_one_result(s3, proxy, proxy_fault, tmp_path):
    """Five lives end by SIGKILL, the sixth reaches the end. Then the same weights are evaluated undisturbed."""
    phantoms, shards = PhantomRule(72, size=48, frames=1, clips=6), PlanRule(24, 0, (0.5, 0.25, 0.25))
    build_phantoms(f"{s3.uri}/set", phantoms, shards, s3.storage)
    suite = tmp_path / "suite.yaml"
    suite.write_text(yaml.safe_dump(document(f"{s3.uri}/set/shards.json")))
    run = f"{s3.uri}/run"
    uri, digest = write_checkpoint(s3.storage, run)
    environment = {**os.environ, **s3.env, "AWS_ENDPOINT_URL_S3": proxy.endpoint, "OMP_NUM_THREADS": "1"}
    lives = Lives(proxy, proxy_fault, [uri, "--suite", str(suite), "--threads", "1"], environment)
    for moment, death in DEATHS.items():
        assert lives.live(death) == -9, moment
        found = [name for name in objects(s3.storage, run) if re.search(RESULT, name)]
        assert len(found) == (moment not in BEFORE_THE_RESULT), moment
    first = s3.storage.read(found[0])
    assert lives.live() == 0
    left = objects(s3.storage, run)
    assert left[found[0]] == first, "a result that is there is not made again"
    for name in left:
        s3.storage.delete(name)
    assert write_checkpoint(s3.storage, run) == (uri, digest)
    run_suite(read_suite(suite.read_text(), where="suite"), uri, digest, s3.storage, torch.device("cpu"))
    undisturbed = objects(s3.storage, run)
    assert left.keys() == undisturbed.keys()
    assert len([name for name in left if re.search(RESULT, name)]) == 2, "one for each evaluation"
    assert [name for name in left if comparable(name, left[name]) != comparable(name, undisturbed[name])] == []


def document(shards: str) -> dict:
    """A suite of every protocol, as small as they get, and of one more evaluation of the same set."""
    evaluation = {
        "name": "planes",
        "shards": shards,
        "protocols": list(PROTOCOLS),
        "bootstrap": 20,
        "k": [5],
        "shots": [1],
        "seeds": 1,
        "linearEpochs": 1,
        "segment": {"steps": 6, "batch": 4, "validateEvery": 2, "backbone": "tuned", "shots": [2]},
        "finetune": {"epochs": 3, "batch": 16, "learningRate": 1e-3},
    }
    spec = {"evaluations": [evaluation, {**evaluation, "name": "after", "protocols": ["knn"]}]}
    return {"apiVersion": "sonoforge.dev/v1alpha1", "kind": "EvalSuite", "metadata": {"name": "all"}, "spec": spec}


def objects(storage, prefix: str) -> dict[str, bytes]:
    """Every object that a reader of the prefix sees."""
    return {info.uri: storage.read(info.uri) for info in storage.list(prefix)}


def comparable(name: str, data: bytes) -> bytes:
    """The bytes; of a result without what depends on the process that made it."""
    if not re.search(RESULT, name):
        return data
    made = json.loads(data)
    assert made.keys() >= set(OF_ONE_RUN)
    return json.dumps({key: value for key, value in made.items() if key not in OF_ONE_RUN}).encode()
