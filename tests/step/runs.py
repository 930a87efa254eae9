"""Tiny training runs for the tests; as a script, the same runs at several world sizes over real gloo.

`python runs.py FOLDER` imports torch once and forks the processes of each world; process r of world w writes
`FOLDER/w-r.safetensors`. World "1b" is a second run of one process.
"""

import os
import socket
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from sonoforge_trainer.contract.config import ExecutionConfig, TrainConfig
from sonoforge_trainer.micro_batch import MicroBatch
from sonoforge_trainer.photometric import Photometrics
from sonoforge_trainer.ranks import Ranks
from sonoforge_trainer.state import TrainState
from sonoforge_trainer.step import Step

WORLDS = {"1": 1, "1b": 1, "2": 2, "3": 3}
STEPS = 6
POISONED_STEP = 3
STOP_STEP = 2

MASKED = 5
"""Masked patches of each second global crop; a crop of 32 pixels has 16."""

NEUTRAL = torch.tensor([1.0, 1, 1, 0, 0, 0, 0])
"""Photometric parameters that leave a crop as it is."""

VARIANTS = {
    "sinkhorn": {"loss": {"centering": "sinkhorn"}, "head": {"shared": False}},
    "ema": {"loss": {"centering": "ema"}, "head": {"shared": True}},
}


def config(variant="sinkhorn", *, virtual_ranks=4, global_batch=12, drop_path=0.3, **recipe):
    """A ViT of 2 blocks on 32-pixel crops, with every loss and schedule moving within a few steps."""
    sizes = {"prototypes": 48, "hiddenDim": 32, "bottleneckDim": 16}
    return TrainConfig.resolve(
        {
            "model": {"arch": "vit_tiny", "depth": 2, "dropPath": drop_path, "layerScale": 0.5},
            "data": {"shards": "file:///data/shards.json"},
            "recipe": {
                "preset": "tiny",
                "budgetSamples": 20 * global_batch,
                "globalBatch": global_batch,
                "virtualRanks": virtual_ranks,
                "crops": {"globalSize": 32, "localSize": 16, "localCount": 2},
                "schedule": {
                    "warmupSamples": 3 * global_batch,
                    "freezeLastLayerSamples": global_batch,
                    "teacherTemperature": [0.04, 0.07],
                    "teacherTemperatureSamples": 10 * global_batch,
                },
                "loss": VARIANTS[variant]["loss"],
                "head": sizes | VARIANTS[variant]["head"],
                "optim": {"baseLr": 0.02},
                **recipe,
            },
        }
    )


def micro_batch(training, step, virtual_rank, masked=MASKED):
    """Random pixels and masks, a function of the step and the virtual rank; each second global crop is masked."""
    b, crops = training.recipe.micro_batch, training.recipe.crops
    patches = (crops.global_size // training.model.patch_size) ** 2
    generator = torch.Generator().manual_seed(1000 * step + virtual_rank)

    def pixels(n, size):
        return torch.randint(0, 256, (n, 1, size, size), dtype=torch.uint8, generator=generator)

    masks = torch.zeros(2 * b, patches, dtype=torch.bool)
    for crop in range(0, 2 * b, 2):
        masks[crop, torch.randperm(patches, generator=generator)[:masked]] = True
    indices = masks.flatten().nonzero().flatten()
    return MicroBatch(
        step=step,
        virtual_rank=virtual_rank,
        globals_u8=pixels(2 * b, crops.global_size),
        locals_u8=pixels(crops.local_count * b, crops.local_size),
        globals_photo=Photometrics(NEUTRAL.expand(2 * b, -1)),
        locals_photo=Photometrics(NEUTRAL.expand(crops.local_count * b, -1)),
        masks=masks,
        mask_indices=indices,
        mask_weights=torch.full((len(indices),), 1 / max(masked, 1)),
        sample_ids=torch.arange(b),
        visits=torch.zeros(b, dtype=torch.int64),
    )


def batches(training, step, virtual_ranks, masked=MASKED):
    return [micro_batch(training, step, virtual_rank, masked) for virtual_rank in virtual_ranks]


def train(variant, ranks):
    """A run with one step that no process survives unpoisoned, and a stop and a checkpoint asked for by one process."""
    training = config(variant)
    state = TrainState(training)
    step = Step(training, state, ranks, ExecutionConfig(device="cpu"))
    record = {"losses": [], "norms": [], "flags": [], "collectives": []}
    for index in range(STEPS):
        work = batches(training, index, step.virtual_ranks)
        if index == POISONED_STEP and 3 in step.virtual_ranks:
            work[-1].mask_weights[0] = torch.nan
        if index == POISONED_STEP:
            before = {name: tensor.clone() for name, tensor in state.tensors().items()}
        issued = ranks.collectives
        last = ranks.rank == ranks.world_size - 1
        report = step(work, index, stop=last and index == STOP_STEP, checkpoint=last and index >= STOP_STEP).read()
        record["collectives"].append(torch.tensor(ranks.collectives - issued))
        record["losses"].append(torch.tensor(list(report.losses.values()), dtype=torch.float64))
        record["norms"].append(torch.tensor(list(report.gradient_norms.values()), dtype=torch.float64))
        record["flags"].append(torch.tensor([report.finite, report.skipped, report.stop, report.checkpoint]).int())
        if index == POISONED_STEP:
            after = state.tensors()
            record["unchanged"] = [torch.tensor(all(torch.equal(before[name], after[name]) for name in before))]
    tensors = {f"{variant}.{name}": torch.stack(values) for name, values in record.items()}
    return tensors | {f"{variant}.state.{name}": tensor.clone() for name, tensor in state.tensors().items()}


def process(folder, world, rank, port):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(WORLDS[world]), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), GLOO_SOCKET_IFNAME="lo")
    torch.set_num_threads(1)
    ranks = Ranks.from_env(ExecutionConfig(device="cpu", collective_timeout_seconds=60))
    assert (ranks.control is None) == (ranks.world_size == 1)
    results = {}
    for variant in VARIANTS:
        results |= train(variant, ranks)
    save_file(results, folder / f"{world}-{rank}.safetensors")
    ranks.close()


def main(folder):
    for world, size in WORLDS.items():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        children = []
        for rank in range(size):
            child = os.fork()
            if not child:
                process(folder, world, rank, port)
                sys.stderr.flush()
                os._exit(0)
            children.append(child)
        if any(os.waitpid(child, 0)[1] for child in children):
            sys.exit(f"a process of world {world} failed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
