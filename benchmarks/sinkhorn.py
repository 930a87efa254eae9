"""Sinkhorn-Knopp of a step beside the official exponential form: traffic over the logits, collectives, seconds.

    python benchmarks/sinkhorn.py

Both make targets for CLS tokens and masked patches from the same float32 logits, three iterations, on one thread.
Traffic is what the operators read and write, in units of the logits: on a GPU, where Sinkhorn is bound by memory, it
decides. Collectives are counted as a run of many processes would issue them. Prints one line of JSON.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sonoforge_trainer.centering import TeacherLogits, sinkhorn_bias, targets
from sonoforge_trainer.ranks import Ranks

TEMPERATURE = 0.07
ITERATIONS = 3


class CountingRanks(Ranks):
    """One process that counts the reductions it would share with others."""

    def _reduce(self, values: Tensor, operation: Any) -> Tensor:
        self.collectives += 1
        return values


def official(logits_nk: Tensor, ranks: Ranks) -> Tensor:
    """The exponential form, as DINOv2 describes it: one matrix, normalised by rows and columns in turn."""
    q_kn = torch.exp(logits_nk.float() / TEMPERATURE).t()
    columns = ranks.sum(torch.tensor(float(q_kn.shape[1])))
    prototypes = q_kn.shape[0]
    q_kn /= ranks.sum(q_kn.sum())
    for _ in range(ITERATIONS):
        q_kn /= ranks.sum(q_kn.sum(1, keepdim=True))
        q_kn /= prototypes
        q_kn /= q_kn.sum(0, keepdim=True)
        q_kn /= columns
    q_kn *= columns
    return q_kn.t()


def ours(outputs: list[TeacherLogits], ranks: Ranks) -> list[Tensor]:
    """The scaling-vector form of the trainer."""
    bias_2k = sinkhorn_bias(outputs, TEMPERATURE, ITERATIONS, ranks)
    return [
        targets(logits_nk, bias_2k[kind], TEMPERATURE) for output in outputs for kind, logits_nk in enumerate(output)
    ]


class Traffic(TorchDispatchMode):
    """Counts the elements that operators read and write; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            written = result if isinstance(result, tuple | list) else [result]
            read = [item for arg in args for item in (arg if isinstance(arg, tuple | list) else [arg])]
            self.elements += sum(t.numel() for t in [*read, *written] if isinstance(t, Tensor))
        return result


def seconds(run: Callable[[], object]) -> float:
    """Time of one run."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


@click.command()
@click.option("--prototypes", default=65_536, show_default=True)
@click.option("--images", default=16, show_default=True, help="Images; 2 CLS tokens each.")
@click.option("--masked", default=400, show_default=True, help="Masked patches.")
@click.option("--rounds", default=5, show_default=True)
def main(prototypes: int, images: int, masked: int, rounds: int) -> None:
    """Compare both forms; see the top of this file."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    outputs = [TeacherLogits(*(0.3 * torch.randn(n, prototypes, generator=generator) for n in (2 * images, masked)))]
    size = sum(logits.numel() for logits in outputs[0])
    found: dict[str, Any] = {"benchmark": "sinkhorn", "prototypes": prototypes, "rows": 2 * images + masked}
    forms = {
        "": lambda ranks: ours(outputs, ranks),
        "official_": lambda ranks: [official(t, ranks) for t in outputs[0]],
    }
    with torch.no_grad():
        for name, form in forms.items():
            ranks, traffic = CountingRanks(), Traffic()
            with traffic:
                form(ranks)
            found[f"{name}collectives"] = ranks.collectives
            found[f"{name}traffic"] = round(traffic.elements / size, 1)
        times = {name: [] for name in forms}
        for _ in range(rounds):
            for name, form in forms.items():
                times[name].append(seconds(lambda form=form: form(CountingRanks())))
        difference = max(
            float((a - b).abs().max()) for a, b in zip(ours(outputs, Ranks()), forms["official_"](Ranks()), strict=True)
        )
    found["traffic_ratio"] = round(found["official_traffic"] / found["traffic"], 2)
    found["speed_ratio"] = round(
        statistics.median(o / s for o, s in zip(times["official_"], times[""], strict=True)), 2
    )
    found["milliseconds"], found["official_milliseconds"] = (
        round(1000 * statistics.median(times[name]), 1) for name in ("", "official_")
    )
    if difference > 1e-5:
        raise click.ClickException(f"the targets of the two forms differ by {difference:.1e}")
    click.echo(json.dumps(found))


if __name__ == "__main__":
    main()
