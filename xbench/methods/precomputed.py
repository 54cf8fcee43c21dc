"""Maps that were made before, by xbench or by anything else: ``maps/<DIR>``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from .. import registry
from ..errors import UsageError
from ..mapfiles import open_maps
from ..maps import upsample
from ..probe import Need, Probe


@dataclass(frozen=True)
class Precomputed:
    """Maps from safetensors files, whatever made them; (N, H, W), NaN where there is none.

    A file holds one tensor (H, W) for each image, under the image's key, as in a run's
    ``per_image.parquet``. ``xbench run --save-maps DIR`` writes such files. Metrics that run a
    method again cannot score them.

    Args:
        path: a file, or a folder with all below it, relative to the working directory; what
            follows ``maps/`` in the name.
        sha256: of the files' contents, and so part of every score's identity; None takes what is
            there.
        upsampling: how maps smaller or larger than the image come to its size; "none" refuses
            them.

    Raises:
        UsageError: on maps of another shape than the image's.
        ValueError: if there are no maps, or other ones than ``sha256`` says.
    """

    path: str
    sha256: str | None = None
    upsampling: Literal["none", "bilinear", "corners", "nearest"] = "none"
    precomputed: ClassVar[bool] = True
    places: ClassVar[tuple[str, ...]] = ("path",)
    unnamed: ClassVar[tuple[str, ...]] = ("path", "sha256")
    nonfinite: ClassVar[str] = "failed: the files have no finite map of this image"

    def __post_init__(self) -> None:
        try:
            found = open_maps(Path(self.path)).sha256
        except UsageError as error:
            raise ValueError(str(error)) from None
        if self.sha256 not in (None, found):
            raise ValueError(f"the maps in {self.path!r} have another SHA-256, {found}")
        object.__setattr__(self, "sha256", found)  # frozen, but not yet anybody's

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return ()

    def __call__(self, probe: Probe) -> Tensor:
        files = open_maps(Path(self.path))
        return torch.stack([self._fitting(files.load(key), key, probe) for key in probe.batch.keys])

    def _fitting(self, found: Tensor | None, key: str, probe: Probe) -> Tensor:
        like = probe.inputs[:1]
        if found is None:
            return torch.full_like(like[0, 0], torch.nan)
        found = found.to(like.device, torch.promote_types(found.dtype, like.dtype))
        if found.shape == like.shape[-2:]:
            return found
        if found.ndim == 2 and self.upsampling != "none":
            return upsample(found[None], like, self.upsampling)[0]
        sides, wanted = (" x ".join(map(str, shape)) for shape in (found.shape, like.shape[-2:]))
        raise UsageError(
            f"the map of image {key!r} in {self.path!r} is {sides}, but the image is {wanted}: "
            "save maps of the image's size, or name an upsampling"
        )


registry.provide_under("methods", "maps/", Precomputed, "path")
