"""A worker as small as a worker can be: each step adds up a number over all ranks and writes one line to a log.

Run by the agents of the tests. ELASTIC_LOG is the folder of the logs; ELASTIC_MODE says what a step is:
`collective` (gloo), `idle` (nothing in common with other ranks, so that nothing fails when one is lost),
`config`, `foreign` (fails with an error of ours, or with one whose text is secret). A file `finish` in the folder ends
the run.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from sonoforge_trainer.contract import ContractError


def finished() -> bool:
    return (Path(os.environ["ELASTIC_LOG"]) / "finish").exists()


def log(step: int) -> None:
    node, rank, world = os.environ["ELASTIC_NODE"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    line = {"time": time.time(), "node": node, "rank": rank, "world": world, "step": step, "pid": os.getpid()}
    with (Path(os.environ["ELASTIC_LOG"]) / f"{node}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


def collective() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    finish, step = False, 0
    while not finish:
        flag = torch.tensor([float(finished()), 1.0])
        dist.all_reduce(flag)
        assert flag[1] == dist.get_world_size()
        finish = bool(flag[0] == dist.get_world_size())
        log(step := step + 1)
        time.sleep(0.05)
    dist.destroy_process_group()


def idle() -> None:
    step = 0
    while not finished():
        log(step := step + 1)
        time.sleep(0.1)


def config() -> None:
    if os.environ["RANK"] == "0":
        raise ContractError("training.recipe.globalBatch: found 3. Allowed: a multiple of virtualRanks")
    idle()


def foreign() -> None:
    Path("/data/patients/DOE_JANE_1970.dcm").read_bytes()


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    {"collective": collective, "idle": idle, "config": config, "foreign": foreign}[os.environ["ELASTIC_MODE"]]()


if __name__ == "__main__":
    main()
