"""Where training starts, if not from random weights, and how it goes on from there."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from sonoforge_trainer.contract.base import Part
from sonoforge_trainer.contract.shards import Sha256

WeightsUri = Annotated[str, Field(pattern=r"^(s3|file)://.+\.(safetensors|pth|pt|bin)$")]
Samples = Annotated[int, Field(ge=0)]

FROZEN_SHARE, RAMP_SHARE = 10, 50
"""Default lengths, as the budget divided by these: a tenth and a fiftieth, after FINO's 10,000 frozen iterations and
ramp of 1,000 in a run of 67,500."""


class InitConfig(Part):
    """Continued pretraining: the backbone of student and teacher starts from a file of weights, the heads at random.

    Published weights come without their heads, and random ones would spoil the backbone (dinov2 issue 204: k-NN fell
    from 80 to 10 %). So the heads learn first, with the backbone frozen; then its learning rate grows linearly from 0
    to that of the schedule. Channels, normalisation and positions are changed to those of the job in a way that leaves
    the features as they were.
    """

    uri: WeightsUri
    """The file: safetensors, or .pth, which is read as tensors only. Layouts: DINOv2, timm, Hugging Face, a plain ViT,
    or a teacher.safetensors beside its model card. `sonoforge weights inspect FILE --against JOB` says if it fits."""
    sha256: Sha256 | None = None
    """Digest that the file must have. Not given: the file at the uri is trusted."""
    mean: Annotated[tuple[float, ...], Field(max_length=3)] = ()
    """Mean of each channel that the weights were trained with. Empty: the model card's, or ImageNet's."""
    std: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(max_length=3)] = ()
    """Standard deviation of each channel that the weights were trained with. Empty: likewise."""
    freeze_backbone_samples: Samples | None = None
    """The backbone does not learn before this; only the heads do. Not given: a tenth of the budget."""
    ramp_backbone_samples: Samples | None = None
    """The backbone's learning rate then grows from 0 to the schedule's over this. Not given: a fiftieth of it."""

    def frozen_samples(self, budget: int) -> int:
        """Samples before which the backbone does not learn, in a run of `budget` samples."""
        return budget // FROZEN_SHARE if self.freeze_backbone_samples is None else self.freeze_backbone_samples

    def ramp_samples(self, budget: int) -> int:
        """Samples over which the backbone's learning rate then grows."""
        return budget // RAMP_SHARE if self.ramp_backbone_samples is None else self.ramp_backbone_samples
