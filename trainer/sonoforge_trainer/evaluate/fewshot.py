"""Few-shot classification: N patients of each class, several draws, nothing selected.

A draw has no validation split (one of ordinary size would hold far more labels than the draw), so the settings are
fixed: k-NN with as many neighbours as shots, logistic regression with C = 1 on features standardised by the draw.
The set's validation split is scored beside its test split, for those who compare checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from sonoforge_trainer.contract import VALIDATION_PREFIX, Score
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.knn import knn_probabilities
from sonoforge_trainer.evaluate.logreg import Standardiser, fit_path
from sonoforge_trainer.evaluate.metrics import Ints, scores_over_draws
from sonoforge_trainer.evaluate.problem import Finding, Problem

_C = 1.0


def draw_rows(targets_n: Ints, groups_n: Ints, shots: int, seed: int) -> Ints | None:
    """Rows of `shots` groups (patients) of each class that occurs, sorted; None where a class has fewer.

    A patient with images of two classes can be drawn for each; only the images of that class are taken.
    """
    rows = []
    for target in np.unique(targets_n):
        of_class = targets_n == target
        groups = np.unique(groups_n[of_class])
        if len(groups) < shots:
            return None
        random = np.random.default_rng([seed, shots, int(target)])
        drawn = random.choice(groups, shots, replace=False)
        rows.append(np.flatnonzero(of_class & np.isin(groups_n, drawn)))
    return np.sort(np.concatenate(rows)).astype(np.int64)


def fewshot(
    problem: Problem,
    shots: Sequence[int],
    *,
    seeds: int,
    temperature: float,
    resamples: int,
    seed: int,
    device: torch.device,
) -> Finding:
    """Mean and deviation over draws of each metric, as `[val_]{knn|logreg}_{N}shot_{metric}`. One input only.

    Test metrics have the interval of the mean over draws.
    """
    (features,) = problem.inputs.values()
    queries = {split: features[split] for split in ("val", "test")}
    scores: dict[str, Score] = {}
    skipped, images = [], {}
    for n in shots:
        draws = [
            draw_rows(problem.targets["train"], problem.groups["train"], n, seed * 1_000_003 + i) for i in range(seeds)
        ]
        known = [draw for draw in draws if draw is not None]
        if not known:
            skipped.append(n)
            continue
        images[str(n)] = [len(draw) for draw in known]
        of_method: dict[str, list[Mapping[str, Floats]]] = {"knn": [], "logreg": []}
        for draw in known:
            drawn = features["train"][draw]
            targets = problem.targets["train"][draw]
            of_method["knn"].append(_knn(drawn, targets, queries, problem, n, temperature, device))
            of_method["logreg"].append(_logreg(drawn, targets, queries, problem))
        for method, of_draws in of_method.items():
            for split, prefix, drawn_patients in (("val", VALIDATION_PREFIX, 0), ("test", "", resamples)):
                predictions = [problem.predictions(split, by_split[split]) for by_split in of_draws]
                found = scores_over_draws(predictions, resamples=drawn_patients, seed=seed)
                scores |= {f"{prefix}{method}_{n}shot_{metric}": score for metric, score in found.items()}
    return Finding(scores, details={"train_images_of_each_draw": images, "too_few_groups_for_shots": skipped})


def _knn(
    drawn: Floats,
    targets: Ints,
    queries: Mapping[str, Floats],
    problem: Problem,
    shots: int,
    temperature: float,
    device: torch.device,
) -> dict[str, Floats]:
    k, classes = min(shots, len(drawn)), len(problem.classes)
    return {
        split: knn_probabilities(drawn, targets, classes, rows, (k,), temperature=temperature, device=device)[k]
        for split, rows in queries.items()
    }


def _logreg(drawn: Floats, targets: Ints, queries: Mapping[str, Floats], problem: Problem) -> dict[str, Floats]:
    scale = Standardiser(drawn)
    ((_, model),) = fit_path(scale(drawn), targets, len(problem.classes), (_C,))
    return {split: model.probabilities(scale(rows)) for split, rows in queries.items()}
