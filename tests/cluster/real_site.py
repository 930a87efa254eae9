"""A namespace on real nodes with everything that a job needs: operator, S3, data, runtime and suite.

The operator is installed as a platform team does it, from `manifests/install.yaml` with the images of this checkout.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import yaml
from components import wait_for
from images import store
from node import GPU, add_gpus
from nodes import RealCluster
from operators import apply_crds
from rack import HOST

from sonoforge_operator.cluster.coordinators import token_of
from sonoforge_operator.cluster.names import LABEL_JOB, LABEL_PART
from sonoforge_operator.install import NAME
from sonoforge_trainer.contract import ContractError, Progress
from sonoforge_trainer.storage.server import BUCKET, REGION, S3Server

ROOT = Path(__file__).parents[2]
_INSTALL = ROOT / "manifests" / "install.yaml"
NAMESPACE = "research"
DATA = f"s3://{BUCKET}/phantoms"
_OPERATOR_KEY = b"a key of the tests that is 32 bytes long"
HASH_KEY = "ab" * 32
"""Hashes the names of samples in logs. The same for every job, so that sample logs can be compared."""


class RealSite:
    """The namespace `research` of a cluster with real nodes."""

    def __init__(self, cluster: RealCluster, s3: S3Server) -> None:
        self.cluster = cluster
        self.s3 = s3

    def kubectl(self, *arguments: str, stdin: str | None = None, check: bool = True) -> str:
        """kubectl as administrator in the namespace."""
        return self.cluster.control_plane.kubectl(f"--namespace={NAMESPACE}", *arguments, stdin=stdin, check=check)

    def get(self, *what: str) -> Any:
        """What `kubectl get ... -o json` prints, read."""
        return json.loads(self.kubectl("get", *what, "--output=json"))

    def apply(self, *manifests: dict[str, Any]) -> None:
        """Apply manifests."""
        self.kubectl("apply", "--filename=-", stdin=yaml.safe_dump_all(manifests))

    def install(self) -> None:
        """The namespace, CRDs, Secrets, the operator, the runtime and the suite. Back once the operator leads."""
        plane = self.cluster.control_plane
        labels = {"pod-security.kubernetes.io/enforce": "restricted"}
        metadata = {"name": NAMESPACE, "labels": labels}
        plane.kubectl(
            "apply",
            "--filename=-",
            stdin=yaml.safe_dump({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}),
        )
        apply_crds(plane)
        self.apply(
            secret(NAME, "key", _OPERATOR_KEY),
            secret("s3", "credentials", self.s3.credentials_file.read_bytes()),
            secret("hash-key", "key", HASH_KEY.encode()),
            self.runtime(),
            _SUITE,
        )
        self.install_operator()

    def install_operator(self) -> None:
        """Apply `manifests/install.yaml`. Back once the operator leads."""
        self.kubectl("apply", "--server-side", f"--filename={_INSTALL}")
        self.wait_for(self._operator_ready, "the operator is ready", 120)

    def uninstall_operator(self) -> None:
        """Delete what `manifests/install.yaml` brought, and wait until it is gone."""
        self.kubectl("delete", f"--filename={_INSTALL}", "--wait")
        self.wait_for(lambda: not self.operator_pods(), "the operator is gone", 120)

    def make_data(self, train: int = 240, evaluation: int = 120) -> None:
        """Phantoms to train on and to evaluate with, in S3."""
        for name, splits, count in (("train", "1,0,0", train), ("eval", "0.5,0.2,0.3", evaluation)):
            command = [sys.executable, "-m", "sonoforge_trainer", "synth", f"--output={DATA}/{name}", f"--name={name}"]
            options = [f"--count={count}", "--size=48", f"--splits={splits}", "--shard-samples=40", "--frames=2"]
            environment = {**os.environ, **self.s3.environment(), "OMP_NUM_THREADS": "1"}
            subprocess.run([*command, *options], env=environment, check=True, capture_output=True)

    def status(self, job: str) -> dict[str, Any]:
        """Status of a job; empty where it has none yet."""
        found: dict[str, Any] = self.get("pj", job).get("status", {})
        return found

    def phase(self, job: str) -> str:
        """Phase of a job; empty where it has none yet."""
        return str(self.status(job).get("phase", ""))

    def pods(self, job: str, part: str) -> list[Any]:
        """Pods of a part of a job: worker, coordinator, evaluation, storage."""
        return self.cluster.pods(NAMESPACE, f"{LABEL_JOB}={job},{LABEL_PART}={part}")

    def progress(self, job: str) -> Progress | None:
        """What the coordinator of a job says, or None where none answers."""
        running = [pod for pod in self.pods(job, "coordinator") if pod["status"].get("podIP")]
        uid = self.get("pj", job)["metadata"]["uid"]
        for pod in running:
            found = progress_at(pod["status"]["podIP"], uid)
            if found is not None:
                return found
        return None

    def wait_for(self, condition: Any, what: str, seconds: float) -> None:
        """Wait for a condition. Raises TimeoutError with what the namespace looks like."""
        try:
            wait_for(condition, what, seconds)
        except TimeoutError as error:
            raise TimeoutError(f"{error}\n{self.describe()}") from None

    def describe(self) -> str:
        """The namespace, for a message: objects, the newest events and the end of the operator's log."""
        lines = [
            self.kubectl("get", "pj,ckpt,jobs,pods", "--output=wide", check=False),
            "\n".join(self.kubectl("get", "events", "--sort-by=.lastTimestamp", check=False).splitlines()[-25:]),
            self.kubectl("logs", f"deployment/{NAME}", "--tail=30", check=False),
        ]
        for pod in self.cluster.pods(NAMESPACE):
            if pod["metadata"]["labels"].get(LABEL_PART):
                name = pod["metadata"]["name"]
                lines.append(f"--- {name}\n{self.kubectl('logs', name, '--tail=8', check=False)}")
        return "\n".join(lines)

    def operator_pods(self) -> list[Any]:
        """Pods of the operator."""
        return self.cluster.pods(NAMESPACE, f"app.kubernetes.io/name={NAME}")

    def objects(self, uri: str) -> list[str]:
        """URIs of the objects below an S3 URI."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        pages = self.client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", ())]

    def put(self, uri: str, body: bytes) -> None:
        """Write an object."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        self.client().put_object(Bucket=bucket, Key=key, Body=body)

    def flip_bit(self, uri: str) -> bytes:
        """Flip a bit in the middle of an object. What it was before."""
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        good: bytes = self.client().get_object(Bucket=bucket, Key=key)["Body"].read()
        middle = len(good) // 2
        self.put(uri, good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :])
        return good

    def spoil_copy_of_data(self) -> None:
        """A copy of the data to train on, `spoilt` instead of `train`, with a flipped bit in every shard."""
        if self.objects(f"{DATA}/spoilt/"):
            return
        bucket = DATA.removeprefix("s3://").partition("/")[0]
        for uri in self.objects(f"{DATA}/train/"):
            copy = uri.replace("/train/", "/spoilt/")
            key = uri.removeprefix(f"s3://{bucket}/")
            self.client().copy_object(
                Bucket=bucket, Key=copy.removeprefix(f"s3://{bucket}/"), CopySource=f"{bucket}/{key}"
            )
            if uri.endswith(".tar"):
                self.flip_bit(copy)

    def download(self, uri: str, folder: Path) -> None:
        """Copy everything below an S3 URI into a folder."""
        bucket, _, prefix = uri.removeprefix("s3://").partition("/")
        client = self.client()
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{prefix}/"):
            for item in page.get("Contents", ()):
                path = folder / item["Key"].removeprefix(f"{prefix}/")
                path.parent.mkdir(parents=True, exist_ok=True)
                client.download_file(bucket, item["Key"], str(path))

    def client(self) -> Any:
        """An S3 client with the server's key."""
        text = self.s3.credentials_file.read_text().splitlines()
        key = dict(line.replace(" ", "").split("=", 1) for line in text if "=" in line)
        return boto3.client(
            "s3",
            endpoint_url=self.s3.endpoint,
            region_name=REGION,
            aws_access_key_id=key["aws_access_key_id"],
            aws_secret_access_key=key["aws_secret_access_key"],
        )

    def _operator_ready(self) -> bool:
        return bool(self.get("deployment", NAME).get("status", {}).get("readyReplicas"))

    def runtime(self) -> dict[str, Any]:
        """The runtime of the jobs, as a manifest."""
        small = {"requests": {"cpu": "50m", "memory": "256Mi"}}
        return {
            "apiVersion": "sonoforge.dev/v1alpha1",
            "kind": "PretrainRuntime",
            "metadata": {"name": "cpu"},
            "spec": {
                "execution": {"device": "cpu", "loaderWorkers": 0, "recordSamples": True, "logEverySteps": 1},
                # The pretended GPU of a node keeps workers apart: one a node, as in earnest.
                "accelerator": {"resourceName": GPU},
                "workers": {**small, "sharedMemory": "64Mi"},
                "coordinator": small,
                "evaluation": small,
                "storage": {"endpointUrl": self.s3.endpoint, "credentialsSecret": "s3"},
                "network": {"storagePorts": [int(self.s3.endpoint.rsplit(":", 1)[1])]},
                "hashKeySecret": "hash-key",
            },
        }


_SUITE = {
    "apiVersion": "sonoforge.dev/v1alpha1",
    "kind": "EvalSuite",
    "metadata": {"name": "phantoms"},
    "spec": {
        "evaluations": [
            {
                "name": "phantoms",
                "shards": f"{DATA}/eval/shards.json",
                "protocols": ["knn", "health"],
                "bootstrap": 0,
            }
        ]
    },
}


def job(name: str, *, steps: int, every: int, nodes: int = 3) -> dict[str, Any]:
    """A small job: 4 virtual ranks of 4 images, a checkpoint every `every` steps, each evaluated."""
    recipe = {
        "preset": "tiny",
        "budgetSamples": steps * 16,
        "globalBatch": 16,
        "virtualRanks": 4,
        "head": {"prototypes": 256},
        "crops": {"globalSize": 32, "localSize": 16, "localCount": 2},
    }
    return {
        "apiVersion": "sonoforge.dev/v1alpha1",
        "kind": "PretrainJob",
        "metadata": {"name": name},
        "spec": {
            "runtimeRef": {"name": "cpu"},
            "training": {"model": {"depth": 2}, "data": {"shards": f"{DATA}/train/shards.json"}, "recipe": recipe},
            "workers": {"minNodes": 1, "maxNodes": nodes, "gpusPerNode": 1},
            "checkpoints": {"uri": f"s3://{BUCKET}/runs/{name}", "everySamples": every * 16, "keepLast": 1000},
            "evaluation": {
                "suiteRef": {"name": "phantoms"},
                "bestBy": "phantoms-knn/f1_macro",
                "floors": False,
                "parallel": 2,
            },
        },
    }


def progress_at(address: str, uid: str) -> Progress | None:
    """What the coordinator at an address says, or None where it does not answer."""
    headers = {"Authorization": f"Bearer {token_of(_OPERATOR_KEY, uid)}"}
    request = urllib.request.Request(f"http://{address}:8080/progress", headers=headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=2) as answer:
            return Progress.from_json(answer.read())
    except (OSError, ContractError):
        return None


@contextmanager
def open_site(programs: Path, coredns: Path, folder: Path, *, nodes: int = 3) -> Iterator[RealSite]:
    """Nodes, S3 beside them on the bridge, the operator in its image, and data."""
    with RealCluster(programs, coredns, store(), count=nodes) as cluster, S3Server(folder / "s3", address=HOST) as s3:
        site = RealSite(cluster, s3)
        for node in cluster.nodes:
            add_gpus(cluster.control_plane, node.name, 1)
        site.install()
        site.make_data()
        yield site


def secret(name: str, key: str, value: bytes) -> dict[str, Any]:
    """A Secret with one key."""
    return {
        "apiVersion": "v1",
        "kind": "Secret",
        "metadata": {"name": name},
        "data": {key: base64.b64encode(value).decode()},
    }
