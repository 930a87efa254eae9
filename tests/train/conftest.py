"""A tiny run of the trainer: its data, its configuration, its processes, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from sonoforge_trainer.contract import (
    CheckpointConfig,
    ExecutionConfig,
    ExitCode,
    RunConfig,
    ShardManifest,
    TrainConfig,
    dataset_digest,
)
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.train import Run, Told

TOKEN = "a-token-of-the-tests-0123456789"
HASH_KEY = "ab" * 32


def _free_port() -> int:
    """A port that nobody listens on. The system gives none of these to others, who might take it until it is used."""
    for port in random.sample(range(20_000, 32_000), 100):
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
            return port
    raise LookupError("no port is free between 20,000 and 32,000")


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The URI of the manifest of 60 small phantoms in 3 shards."""
    folder = tmp_path_factory.mktemp("train")
    synth = ["synth", "--output", str(folder), "--name", "tiny", "--count", "60", "--size", "32", "--frames", "1"]
    command = [sys.executable, "-m", "sonoforge_trainer", *synth, "--shard-samples", "20"]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return f"file://{folder}/shards.json"


@pytest.fixture(scope="session")
def spoil() -> Callable[[Path, int], None]:
    """A function that spoils the image of one sample, as it happened before the manifest was written."""

    def make(folder: Path, ordinal: int) -> None:
        path = folder / "shards.json"
        manifest = ShardManifest.from_json(path.read_text())
        found = list(manifest.shards)
        index = 0
        while ordinal >= found[index].samples:
            ordinal -= found[index].samples
            index += 1
        shard = found[index]
        data = bytearray((folder / shard.name).read_bytes())
        first, length = shard.offsets[ordinal], shard.lengths[ordinal]
        data[first : first + length] = bytes(length)
        (folder / shard.name).write_bytes(data)
        found[index] = shard.model_copy(update={"sha256": f"sha256:{hashlib.sha256(data).hexdigest()}"})
        changes = {"shards": tuple(found), "dataset_digest": dataset_digest(tuple(found))}
        path.write_text(manifest.model_copy(update=changes).to_json())

    return make


class Tiny:
    """One run: its configuration, its checkpoints, and every process that was started for it."""

    def __init__(self, folder: Path, shards: str) -> None:
        self.folder, self.shards = folder, shards
        self.checkpoints = folder / "checkpoints"
        self.store = self.http = ""
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        (folder / "token").write_text(TOKEN)
        (folder / "hash.key").write_text(HASH_KEY)

    # --- configuration ------------------------------------------------------------------------------------------------

    def config(
        self,
        *,
        steps: int = 6,
        every: int | None = 2,
        every_seconds: int | None = None,
        recipe: dict[str, Any] | None = None,
        **execution: Any,
    ) -> RunConfig:
        """The configuration of a run of some steps of 8 images, with a checkpoint after every `every` steps."""
        training = TrainConfig.resolve(
            {
                "model": {"depth": 1},
                "data": {"shards": self.shards},
                "recipe": {
                    "preset": "tiny",
                    "budgetSamples": steps * 8,
                    "globalBatch": 8,
                    "virtualRanks": 2,
                    "head": {"prototypes": 32, "hiddenDim": 32, "bottleneckDim": 16},
                    "crops": {"globalSize": 16, "localSize": 8, "localCount": 1},
                    **(recipe or {}),
                },
            }
        )
        defaults = {"device": "cpu", "loader_workers": 0, "record_samples": True, "log_every_steps": 1}
        # gloo now and then misses that a peer is gone while it sends to it: then nothing but this ends its wait.
        defaults["collective_timeout_seconds"] = 40
        return RunConfig(
            job="tiny",
            uid="tiny-uid",
            training=training,
            checkpoints=CheckpointConfig(
                uri=f"file://{self.checkpoints}", every_samples=every and every * 8, every_seconds=every_seconds
            ),
            execution=ExecutionConfig(**{**defaults, **execution}),
        )

    def write(self, config: RunConfig) -> None:
        """Write the configuration file."""
        (self.folder / "config.json").write_text(config.to_json())

    def copy_shards(self) -> Path:
        """A copy of the data set that may be changed; configurations made from now on use it."""
        copy = self.folder / "shards"
        shutil.copytree(Path(self.shards.removeprefix("file://")).parent, copy)
        self.shards = f"file://{copy}/shards.json"
        return copy

    # --- running ------------------------------------------------------------------------------------------------------

    def run_here(self, config: RunConfig, told: Told | None = None) -> ExitCode:
        """Train in this process."""
        with ExitStack() as exits:
            return Run(config, Ranks.from_env(config.execution, {}), told or Told(), exits).train()

    def start(self, name: str, *arguments: str, **extra: str) -> subprocess.Popen[bytes]:
        """Start `python ARGUMENTS`; what it prints goes to a file."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SONOFORGE_", "PYTHONDONT"))}
        ours = {
            "OMP_NUM_THREADS": "1",
            "SONOFORGE_CONFIG": str(self.folder / "config.json"),
            "SONOFORGE_HASH_KEY_FILE": str(self.folder / "hash.key"),
        }
        with (self.folder / f"{name}.out").open("ab") as out:
            self.processes[name] = subprocess.Popen(
                [sys.executable, *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=kept | ours | extra,
                start_new_session=True,
            )
        return self.processes[name]

    def start_train(self, config: RunConfig, **extra: str) -> subprocess.Popen[bytes]:
        """Train in one plain process, as on a laptop."""
        self.write(config)
        return self.start("train", "-m", "sonoforge_trainer.train", **extra)

    def start_ranks(self, config: RunConfig, world_size: int) -> list[subprocess.Popen[bytes]]:
        """Train in several processes without agents: rank 0 hosts the store."""
        self.write(config)
        port = _free_port()
        group = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        group["GLOO_SOCKET_IFNAME"] = "lo"
        command = ("-m", "sonoforge_trainer.train")
        return [self.start(f"rank-{rank}", *command, **group, RANK=str(rank)) for rank in range(world_size)]

    def start_coordinator(self) -> None:
        """Start a coordinator and learn its addresses."""
        file = self.folder / "addresses.json"
        self.start(
            "coordinator",
            *("-m", "sonoforge_trainer", "coordinator", "--host", "127.0.0.1", "--store-port", "0", "--http-port", "0"),
            *("--token-file", str(self.folder / "token"), "--address-file", str(file)),
        )
        self.wait_for(file.exists, "addresses of the coordinator")
        addresses = json.loads(file.read_text())
        self.store, self.http = addresses["store"], addresses["http"]

    def start_agent(self, index: int, *, nodes: int | str, attempt: str = "a") -> subprocess.Popen[bytes]:
        """Start the agent of a node, with one worker."""
        return self.start(
            f"agent-{index}",
            *("-m", "sonoforge_trainer.launch", f"--nodes={nodes}", f"--endpoint={self.store}", f"--attempt={attempt}"),
            *(f"--local-addr=127.0.3.{index + 1}", "--keep-alive=1", "--first-call=1", "--last-call=1"),
            "--exit-barrier=20",
            SONOFORGE_TERMINATION_LOG=str(self.folder / f"agent-{index}.termination"),
        )

    def termination(self, index: int) -> dict[str, Any]:
        """The termination message of an agent."""
        document: dict[str, Any] = json.loads((self.folder / f"agent-{index}.termination").read_text())
        return document

    def ask(self, path: str, body: object = None) -> dict[str, Any]:
        """A request to the coordinator."""
        request = urllib.request.Request(self.http + path, data=None if body is None else json.dumps(body).encode())
        request.add_header("Authorization", f"Bearer {TOKEN}")
        with urllib.request.urlopen(request, timeout=10) as answer:
            document: dict[str, Any] = json.load(answer)
        return document

    def wait_for(self, condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Wait until a condition holds, or fail with what was awaited and what the processes printed."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                pytest.fail(f"no {what} within {seconds} s\n{self.output()}")
            time.sleep(0.02)

    def wait_for_step(self, step: int) -> None:
        """Wait until the coordinator hears of a step."""
        self.wait_for(lambda: self.ask("/progress")["step"] >= step, f"step {step}")

    def output(self) -> str:
        """Everything that the processes printed."""
        return "\n".join(f"--- {f.name}\n{f.read_text()[-6000:]}" for f in sorted(self.folder.glob("*.out")))

    def said(self, name: str, event: str) -> list[dict[str, Any]]:
        """The lines of a process's log about an event. Every line of it is JSON, or this fails."""
        lines = [json.loads(line) for line in (self.folder / f"{name}.out").read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def close(self) -> None:
        """End what still runs."""
        for process in self.processes.values():
            if process.poll() is None:
                process.kill()
            process.wait()

    # --- what it leaves -----------------------------------------------------------------------------------------------

    def committed(self) -> list[int]:
        """The steps of the committed checkpoints, one entry for each checkpoint."""
        return sorted(int(path.parts[-3].removeprefix("step-")) for path in self.checkpoints.glob("*/*/COMMIT"))

    def log(self, name: str) -> list[dict[str, Any]]:
        """The lines of a committed log, in the order of the checkpoints that hold them."""
        folders = [path.parent for path in sorted(self.checkpoints.glob("*/*/COMMIT"))]
        files = [file for folder in folders for file in sorted(folder.glob(name))]
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]

    def logged_steps(self) -> list[int]:
        """The steps of the committed metric log."""
        return [record["step"] for record in self.log("metrics.jsonl")]

    def logged_samples(self) -> list[tuple[int, int]]:
        """Step and virtual rank of each line of the committed sample log."""
        return [(record["step"], record["vrank"]) for record in self.log("samples-*.jsonl")]


@pytest.fixture
def tiny(tmp_path: Path, shards: str) -> Iterator[Tiny]:
    """A run of its own; whatever is left of its processes is ended."""
    run = Tiny(tmp_path, shards)
    yield run
    run.close()


@pytest.fixture
def here(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> Iterator[Tiny]:
    """The same for runs inside the test's own process, on one thread of torch; they leave no thread behind."""
    for name in [name for name in os.environ if name.startswith("SONOFORGE_")]:
        monkeypatch.delenv(name)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tiny
    torch.set_num_threads(threads)
    ours = ("progress", "stream", "prefetch", "fetch", "checkpoint")
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(ours)] == []
