"""Numbers that need no label: has the teacher collapsed, and do its features find what belongs together?

Features that collapsed are all alike: rank 1, no deviation. Targets that collapsed show in the teacher's entropy: near
0 where one prototype takes everything, near ln(prototypes) where all are equal (arXiv 2104.14294, section 5.3).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sonoforge_trainer.contract import Score
from sonoforge_trainer.evaluate.bootstrap import Floats
from sonoforge_trainer.evaluate.knn import normalised
from sonoforge_trainer.evaluate.problem import Finding

_EPSILON = 1e-7
_ROWS = 1024


def rankme(features_nd: Floats) -> float:
    """RankMe (arXiv 2210.02885): exp of the entropy of the normalised singular values, not centred.

    p_k = s_k / sum(s) + 1e-7, exp(-sum p_k log p_k). Between 1 and min(n, d).
    """
    singular = np.linalg.svd(features_nd.astype(np.float64), compute_uv=False)
    p = singular / max(singular.sum(), np.finfo(np.float64).tiny) + _EPSILON
    return float(np.exp(-(p * np.log(p)).sum()))


def effective_rank(features_nd: Floats) -> float:
    """Exponential of the entropy of the normalised eigenvalues of the covariance: directions that carry the variance.

    Stricter than RankMe: centred, and squares instead of singular values. 1 where nothing varies.
    """
    centred = features_nd.astype(np.float64) - features_nd.mean(0, dtype=np.float64)
    variance = np.linalg.svd(centred, compute_uv=False) ** 2
    if variance.sum() <= 0:
        return 1.0
    p = variance / variance.sum()
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def feature_deviation(features_nd: Floats) -> float:
    """Mean over dimensions of the standard deviation of unit-length features, times sqrt(d).

    About 1 for features spread over the sphere, 0 for collapsed ones.
    """
    unit = features_nd / np.maximum(np.linalg.norm(features_nd, axis=1, keepdims=True), 1e-12)
    return float(unit.std(0, dtype=np.float64).mean() * np.sqrt(unit.shape[1]))


def same_group_retrieval(features_nd: Floats, groups: Sequence[object], device: torch.device) -> float | None:
    """Part of the images with a companion in their group (clip or patient) whose nearest other image is one.

    None where no group has two images.
    """
    _, numbers = np.unique(np.array([str(group) for group in groups]), return_inverse=True)
    queries = np.flatnonzero(np.bincount(numbers)[numbers] > 1)
    if not len(queries):
        return None
    bank = normalised(features_nd, device)
    hits = 0
    for rows in np.array_split(queries, -(-len(queries) // _ROWS)):
        similarity = bank[torch.from_numpy(rows).to(device)] @ bank.T
        similarity[torch.arange(len(rows)), torch.from_numpy(rows).to(device)] = -torch.inf
        hits += int((numbers[similarity.argmax(1).cpu().numpy()] == numbers[rows]).sum())
    return hits / len(queries)


def health(
    features_nd: Floats,
    clips: Sequence[int],
    patients: Sequence[str],
    device: torch.device,
    *,
    teacher_entropy: float | None = None,
) -> Finding:
    """Health of one input over all images of the evaluation.

    `teacher_entropy` is the one of training, in nats: it is made of the heads and the centring of a whole training
    batch, and an exported teacher has neither.
    """
    scores = {
        "rankme": Score(value=rankme(features_nd)),
        "effective_rank": Score(value=effective_rank(features_nd)),
        "feature_deviation": Score(value=feature_deviation(features_nd)),
    }
    if teacher_entropy is not None:
        scores["teacher_entropy"] = Score(value=teacher_entropy)
    known = [i for i, patient in enumerate(patients) if patient]
    for name, rows, groups in (
        ("same_clip_retrieval", list(range(len(clips))), [str(clip) for clip in clips]),
        ("same_patient_retrieval", known, [patients[i] for i in known]),
    ):
        value = same_group_retrieval(features_nd[rows], groups, device)
        if value is not None:
            scores[name] = Score(value=value)
    return Finding(scores, details={"images": len(features_nd), "dimensions": int(features_nd.shape[1])})
