"""docs/quickstart-cluster.md, followed step by step on real nodes: the commands are taken from the page."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from build import tag_of
from rack import HOST
from real_site import DATA, RealSite, job
from scenarios import SECONDS

from sonoforge_trainer.storage.server import BUCKET

pytestmark = pytest.mark.timeout(1800)
ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "quickstart-cluster.md"
SAMPLE = ROOT / "manifests" / "samples" / "cluster.yaml"
OPERATOR, JOBS, JOB = "sonoforge-system", "quickstart", "fetal-vitb16"
STEPS, EVERY = 300, 75


def own_names(text: str) -> str:
    """A text of the page or the sample, with the namespace of this test: `research` is another one's here."""
    return re.sub(r"\bresearch\b", JOBS, text)


def commands(section: int) -> list[str]:
    """The commands of a section of the page, in order. Nobody watches."""
    text = re.split(r"^## ", own_names(PAGE.read_text()), flags=re.MULTILINE)[section]
    lines = "\n".join(re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)).splitlines()
    return [line.partition("   #")[0].strip().removesuffix(" -w") for line in lines if not line.startswith("export ")]


def mine(site: RealSite) -> str:
    """The sample with what the page tells to change, and with a model that is trained in a minute on a CPU."""
    runtime, suite, pretrain = yaml.safe_load_all(own_names(SAMPLE.read_text()))
    ours, small = site.runtime()["spec"], job(JOB, steps=STEPS, every=EVERY)["spec"]
    spec: dict[str, Any] = runtime["spec"]
    spec["execution"] = ours["execution"]
    spec["images"] = {"trainer": tag_of("trainer")}
    spec["storage"] |= {"endpointUrl": site.s3.endpoint}
    spec["network"] = ours["network"] | {"storageCidrs": [f"{HOST}/32"]}
    for part in ("workers", "coordinator", "evaluation"):
        spec[part] |= {"requests": ours["coordinator"]["requests"], "limits": {}}
    spec["workers"] |= ours["workers"]
    for field, owner in (
        ("nodeSelector", spec["workers"]),
        ("priorityClassName", spec["workers"]),
        ("caBundle", spec["storage"]),
        ("queues", spec["limits"]),
        ("queueName", spec),
        ("hashKeySecret", spec),
        ("gpus", spec["evaluation"]),
        ("queueName", pretrain["spec"]),
    ):
        del owner[field]
    planes, _ = suite["spec"]["evaluations"]
    suite["spec"]["evaluations"] = [planes | {"shards": f"{DATA}/eval/shards.json", "protocols": ["knn", "health"]}]
    pretrain["spec"] |= {
        "training": small["training"],
        "workers": small["workers"],
        "checkpoints": small["checkpoints"] | {"uri": f"s3://{BUCKET}/runs/{JOBS}"},
    }
    return yaml.safe_dump_all([runtime, suite, pretrain])


class Person:
    """Somebody who follows the page, with kubectl, the checkout and the keys of the storage."""

    def __init__(self, site: RealSite, home: Path) -> None:
        self.site, self._home = site, home
        plane = site.cluster.control_plane
        self._environment = {
            "HOME": str(home),
            "PATH": f"{ROOT / '.venv' / 'bin'}:{plane.programs}:{os.environ['PATH']}",
            "KUBECONFIG": str(plane.kubeconfig),
        }
        (home / ".aws").mkdir()
        (home / ".aws" / "credentials").write_bytes(site.s3.credentials_file.read_bytes())
        (home / "my.yaml").write_text(mine(site))
        # The page is followed in the checkout, where this test writes nothing.
        (home / "manifests").symlink_to(ROOT / "manifests")

    def do(self, command: str) -> str:
        """Type a command, and return what it prints."""
        done = subprocess.run(
            ["bash", "-euc", command],
            cwd=self._home,
            env=self._environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}\n{self.site.describe()}"
        return done.stdout

    def status(self) -> Any:
        """Status of the job."""
        return self.site.cluster.control_plane.get("pj", JOB, f"--namespace={JOBS}").get("status", {})

    def wait_for(self, phase: str) -> None:
        """Wait for a phase of the job."""
        self.site.wait_for(lambda: self.status().get("phase") == phase, f"{JOB} is {phase}", SECONDS)


@pytest.fixture
def person(bare_site: RealSite, tmp_path: Path) -> Iterator[Person]:
    yield Person(bare_site, tmp_path)
    plane = bare_site.cluster.control_plane
    plane.kubectl("delete", f"--filename={ROOT / 'manifests' / 'install-cluster.yaml'}", "--ignore-not-found")
    plane.kubectl("delete", "namespace", OPERATOR, JOBS, "--ignore-not-found", "--wait=false")


def test_the_page_leads_from_an_empty_cluster_to_a_job_that_is_resized_suspended_finished_and_deleted(
    person: Person,
) -> None:
    for section in (1, 2, 3):
        for command in commands(section):
            person.do(command)
    person.wait_for("Running")

    listed, told, _, logs, checkpoints = [person.do(command) for command in commands(4)]
    assert JOB in listed
    assert "Running" in told
    assert '"step"' in logs
    assert ["0", "0"] in [row.split()[:2] for row in checkpoints.splitlines()], "step and samples of the first"

    resize, suspend, resume = commands(5)
    before = person.status()["attempt"]
    person.do(resize)
    person.site.wait_for(lambda: person.status()["attempt"] > before, "a new attempt", SECONDS)
    person.site.wait_for(lambda: person.status()["nodesText"] == "3/4", "three of four nodes run", SECONDS)
    person.do(suspend)
    person.wait_for("Suspended")
    assert 0 < person.status()["step"] < STEPS
    person.do(resume)
    person.wait_for("Succeeded")
    status = person.status()
    assert status["step"] == STEPS
    assert status["checkpoints"]["evaluated"] == status["checkpoints"]["total"] > STEPS // EVERY

    (delete,) = commands(6)
    person.do(delete)
    everything = f"kubectl -n {JOBS} get pj,ckpt,pods --output=name"
    person.site.wait_for(lambda: person.do(everything) == "", "nothing of the job is left", SECONDS)
