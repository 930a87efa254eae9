"""k-NN on frozen features, with the weights of DINO: softmax of cosine similarity / temperature over the neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.problem import Finding, Problem, best, report

_QUERY_ROWS = 1024


def normalised(features_nd: Floats, device: torch.device) -> Tensor:
    """Features of unit length, float32, on the device."""
    tensor = torch.from_numpy(np.ascontiguousarray(features_nd)).to(device, torch.float32)
    return torch.nn.functional.normalize(tensor, dim=1)


def neighbour_votes(
    bank_md: Tensor, votes_mc: Tensor, queries_nd: Tensor, ks: Sequence[int], temperature: float
) -> Iterator[list[Tensor]]:
    """Weighted votes of the k nearest rows of the bank, for every k: batches of [rows, C], in the order of `ks`.

    `votes_mc` is what each row of the bank votes for; rows of it sum to one, so votes are probabilities.
    """
    for start in range(0, len(queries_nd), _QUERY_ROWS):
        similarity, index = (queries_nd[start : start + _QUERY_ROWS] @ bank_md.T).topk(max(ks), dim=1)
        weights = torch.softmax(similarity / temperature, dim=1)
        batch = []
        for k in ks:
            w = weights[:, :k]
            batch.append(torch.einsum("nk,nkc->nc", w / w.sum(1, keepdim=True), votes_mc[index[:, :k]]))
        yield batch


def knn_probabilities(
    train_nd: Floats,
    targets_n: np.ndarray[tuple[int], np.dtype[np.int64]],
    classes: int,
    queries_nd: Floats,
    ks: Sequence[int],
    *,
    temperature: float,
    device: torch.device,
) -> dict[int, Floats]:
    """Class probabilities of the queries [n, K] for every k."""
    votes = torch.nn.functional.one_hot(torch.from_numpy(targets_n), classes).to(device, torch.float32)
    batches = neighbour_votes(normalised(train_nd, device), votes, normalised(queries_nd, device), ks, temperature)
    columns = list(zip(*batches, strict=True))
    return {k: torch.cat(list(column)).cpu().numpy() for k, column in zip(ks, columns, strict=True)}


def fitting(ks: Sequence[int], samples: int) -> tuple[int, ...]:
    """The numbers of neighbours that the training set has; all of it where none fits."""
    return tuple(dict.fromkeys(k for k in ks if k <= samples)) or (samples,)


def knn(
    problem: Problem, ks: Sequence[int], *, temperature: float, resamples: int, seed: int, device: torch.device
) -> Finding:
    """Select input and k by balanced accuracy on validation, report on both. Every k's test accuracy is in details."""
    classes = len(problem.classes)
    candidates, val, test, accuracies = {}, {}, {}, {}
    for name, features in problem.inputs.items():
        usable = fitting(ks, len(features["train"]))
        by_split = {
            split: knn_probabilities(
                features["train"],
                problem.targets["train"],
                classes,
                features[split],
                usable,
                temperature=temperature,
                device=device,
            )
            for split in ("val", "test")
        }
        for k in usable:
            candidate = f"{name} k={k}"
            val[candidate], test[candidate] = by_split["val"][k], by_split["test"][k]
            candidates[candidate] = problem.predictions("val", val[candidate]).balanced_accuracy()
            accuracies[candidate] = problem.predictions("test", test[candidate]).values()
    chosen = best(candidates)
    finding = report(
        problem, val[chosen], test[chosen], chosen=chosen, candidates=candidates, resamples=resamples, seed=seed
    )
    finding.details["test_of_every_k"] = accuracies
    return finding
