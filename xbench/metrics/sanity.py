"""Sanity: whether a map depends on what it claims to explain. These are gates, not ranks.

A map that does not change when the network or the class does is about neither, however well it
scores elsewhere. Beyond that, less similar is not better: the map of a random network may well
share the image's edges. So the table shows the number and whether it passes the ``gate``, which
stands halfway between a map that has nothing in common with the other (0) and one that ignores
what was changed (1).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from torch import Tensor

from ..maps import Sign
from ..probe import Explanation, Need
from ..randomisation import Compared, Order, OtherClass, Randomised, Stages, column
from ..registry import metric
from ..similarity import SimilarityName


class Gate:
    """What both share: a mean similarity, which should be low."""

    similarity: SimilarityName
    better: ClassVar[Literal["higher", "lower"]] = "lower"
    family: ClassVar[str] = "sanity"
    range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    gate: ClassVar[float] = 0.5
    needs_method: ClassVar[bool] = True

    @property
    def compared(self) -> Compared:
        raise NotImplementedError

    @property
    def needs(self) -> tuple[Need[Any], ...]:
        return (self.compared,)

    def __call__(self, explanation: Explanation) -> Tensor:
        return explanation[self.compared][:, :, column(self.similarity)].mean(1)


@metric("model_randomisation")
class ModelRandomisation(Gate):
    """Similarity of the map to those of the network with random weights, (N,); lower is better.

    Layers, that is modules with parameters of their own, form groups of neighbours. Stage by stage
    they are drawn anew, and the method explains the same class with the same noise; the score is
    the mean over stages. 1 is a map that does not depend on the weights, as of any control; 0 has
    nothing in common. To pass, the mean must stay below 0.5, halfway. A constant map has rank
    correlation 0 with another, and 1 with a constant one. It costs ``stages`` times the method.
    Undefined where the map of a random network is not finite.

    Args:
        order: "top_down" and "bottom_up" draw each group in addition to those before, "independent"
            draws each alone. Top-down, as published, is the strictest: maps that are mostly made in
            the layers close to the image stay as they are until the last stage (Binder et al. 2022
            hold that against it). Bottom-up, few methods fail that see the network at all.
        stages: number of groups, as equal as possible. 5 tell the gradient from guided
            backpropagation, of which it is known what they depend on, on small networks and deep
            ones, at a price that does not grow with depth; 1 draws all layers at once, "all" makes
            each layer a stage of its own. More stages weigh the whole less, and raise the mean.
        similarity: "spearman" compares ranks, whatever the scale; "ssim" and "ssim_second_moment"
            compare structure, and find nearly any two sparse maps alike.
        sign: how a signed map is read before; magnitude, as a sign that flips everywhere is still
            the same map.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``; for a
            network without parameters.

    Source: Adebayo et al. 2018, arXiv:1810.03292; Binder et al. 2022, arXiv:2211.12486, on the
    order and the scaling; Hedström et al. 2023 on complete randomisation.
    """

    order: Order = "top_down"
    stages: Stages = 5
    similarity: SimilarityName = "spearman"
    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "MPRT"
    undefined: ClassVar[str] = "undefined: a map of the random network is not finite"

    @property
    def compared(self) -> Randomised:
        return Randomised(self.sign, order=self.order, stages=self.stages)


@metric("random_logit")
class RandomLogit(Gate):
    """Similarity of the map to that of another class, (N,); lower is better.

    The class is drawn for each image among all others, from its own stream; noise stays. 1 is a map
    that does not depend on the class, as of any control. To pass, the mean must stay below 0.5,
    halfway to having nothing in common. A constant map has rank correlation 0 with another, and 1
    with a constant one. It costs the method once more. Undefined where the other map is not finite,
    and for a network of one class. Absolute gradients follow the pattern of open ReLUs, whatever
    the class, and mostly fail, where signed sums (``channels: sum``, ``sign: signed``) pass.

    Args:
        similarity, sign: as for ``model_randomisation``.

    Raises:
        Unsupported: for maps that are given without their method, as to ``xbench.score``.

    Source: Sixt et al. 2020, arXiv:1912.09818.
    """

    similarity: SimilarityName = "spearman"
    sign: Sign = "magnitude"
    symbol: ClassVar[str] = "RL"
    undefined: ClassVar[str] = "undefined: one class alone, or the map of the other is not finite"

    @property
    def compared(self) -> OtherClass:
        return OtherClass(self.sign)
