"""Real writer processes for the tests: answers requests, one JSON line each, from processes that it forks.

They are forked so that torch is imported once: `python processes.py` reads requests from stdin until it is closed.
"""

import dataclasses
import json
import os
import signal
import sys
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist
from conftest import IDENTITY, make_snapshot

from sonoforge_trainer.checkpoint import CheckpointStore, CheckpointWriter, Peers, restore
from sonoforge_trainer.storage import Storage, StorageSettings


class KilledStorage(Storage):
    """Storage whose process is killed before or after its n-th write of a checkpoint."""

    def __init__(self, settings, at, after):
        super().__init__(settings)
        self.at, self.after, self.writes = at, after, 0

    def write(self, uri, data, *, if_absent=False):
        self.writes += "/step-" in uri
        if self.writes == self.at and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        info = super().write(uri, data, if_absent=if_absent)
        if self.writes == self.at and self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        return info


def forked(function, *args):
    """Run in a child; returns its pid."""
    pid = os.fork()
    if pid:
        return pid
    signal.alarm(120)  # a process that hangs fails its test and not the session
    try:
        function(*args)
    except BaseException:  # noqa: BLE001 - a forked child must not return into its parent's code
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def crash_save(settings, uri, step, attempt, at, after):
    """Save one checkpoint, and be killed on the way."""
    newest = CheckpointStore(Storage(settings), uri, IDENTITY).committed()[-1]
    writer = CheckpointWriter(KilledStorage(settings, at, after), uri, IDENTITY, attempt, restored=newest)
    writer.save(make_snapshot(step))
    result = writer.wait(60)
    raise SystemExit(f"not killed: {result}")


def crash(answer, settings, uri, deaths):
    """For each (step, attempt, at, after) a process that dies; answers how each ended."""
    ends = []
    for death in deaths:
        _, status = os.waitpid(forked(crash_save, settings, uri, *death), 0)
        ends.append(os.waitstatus_to_exitcode(status))
    answer(ends)


def rank_main(settings, uri, told_port, rank, world_size, attempt, saves, damage, timeout):
    """One rank: join, restore, save what is asked, and report."""
    port = int(os.read(told_port, 16))
    store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    peers = Peers(rank, world_size, store)
    storage = Storage(settings)
    try:
        loaded = restore(CheckpointStore(storage, uri, IDENTITY), peers, attempt)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        store.set(f"report-{rank}", json.dumps({"raised": f"{type(error).__name__}: {error}"}))
        return
    report = {
        "restored": loaded and loaded.ref.id,
        "sums": loaded and {name: tensor.double().sum().item() for name, tensor in sorted(loaded.tensors.items())},
    }
    if damage and damage["kind"] == "kill" and damage["rank"] == rank:
        storage = KilledStorage(settings, damage["write"], damage["after"])
    restored = loaded and loaded.ref
    writer = CheckpointWriter(storage, uri, IDENTITY, attempt, peers, restored=restored, peers_timeout_seconds=timeout)
    if damage and damage["kind"] == "ahead" and damage["rank"] == rank:
        writer.save(make_snapshot(damage["step"]))  # which nobody else saves
    if damage and damage["kind"] == "superseded" and rank == 0:
        other = CheckpointWriter(storage, uri, IDENTITY, damage["attempt"], restored=loaded and loaded.ref)
        other.save(make_snapshot(damage["step"]))
        other.wait(60)
    results = []
    for step in saves:
        writer.save(make_snapshot(step))
        result = writer.wait(120)
        error = result.error and f"{type(result.error).__name__}: {result.error}"
        results.append({"id": result.ref and result.ref.id, "error": error})
    store.set(f"report-{rank}", json.dumps({**report, "results": results}))


def ranks(answer, settings, uri, world_size, attempt, saves, damage=None, timeouts=None):
    """A process group of real processes; answers each rank's report (null for one that died)."""
    timeouts = timeouts or [60] * world_size
    pipes = [os.pipe() for _ in range(world_size)]
    children = [  # before the store starts its thread: a fork copies locks that a thread holds, and not the thread
        forked(rank_main, settings, uri, pipes[rank][0], rank, world_size, attempt, saves, damage, timeouts[rank])
        for rank in range(world_size)
    ]
    master = dist.TCPStore("127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False)
    for _, tell in pipes:
        os.write(tell, str(master.port).encode())
    for child in children:
        os.waitpid(child, 0)
    reports = [f"report-{rank}" for rank in range(world_size)]
    answer([json.loads(master.get(key)) if master.check([key]) else None for key in reports])


def serve():
    """Answer requests in forked processes, so that each starts from the same clean one."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # logs of the children go where errors go

    def answer(document):
        print(json.dumps(document), file=answers, flush=True)

    for line in sys.stdin:
        request = json.loads(line)
        function = {"crash": crash, "ranks": ranks}[request.pop("kind")]
        os.environ.update(request.pop("environment"))
        settings = dataclasses.replace(StorageSettings.from_env(), **request.pop("settings", {}))
        _, status = os.waitpid(forked(lambda f=function, s=settings, r=request: f(answer, s, **r)), 0)
        if status:
            answer(f"the process that answers ended with {os.waitstatus_to_exitcode(status)}")


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
