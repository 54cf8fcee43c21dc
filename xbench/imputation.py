"""Linear imputation: each unknown pixel becomes the weighted mean of its eight neighbours.

The equations are those of ROAD (Rong et al. 2022, arXiv:2202.00449): weights of 1/6 for direct and
1/12 for diagonal neighbours, divided by the sum of those that exist at the border. With A the
weighted sum over neighbours and D that sum of weights, D x = A x on the unknown pixels. The system
is symmetric and positive definite, so that conjugate gradients solve it for whole batches at once;
one multigrid cycle as preconditioner makes do with some 15 iterations at any size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def linear_imputation(images: Tensor, known: Tensor) -> Tensor:
    """Images (N, C, H, W), all but the known pixels filled in, in any linear colour space.

    Every plane stops by itself, once no equation is off by more than 4 rounding units of its
    largest known value; so no image depends on its neighbours. An image of which nothing is known
    becomes zero.

    Args:
        images: what is known of them is read, the rest is not.
        known: (N, H, W) bool.
    """
    given = images.where(known[:, None], 0)
    grids = _grids((~known[:, None]).to(images.dtype))
    unknown, degree, _ = grids[0]
    tolerance = 4 * torch.finfo(images.dtype).eps * given.abs().amax((2, 3), keepdim=True)
    mean = given.sum((2, 3), keepdim=True) / (1 - unknown).sum((2, 3), keepdim=True).clamp_min(1)
    found = mean * unknown
    residual = unknown * (_neighbours(given + found) - degree * found)
    step = corrected = _cycle(residual, grids)
    square = _dot(residual, corrected)
    for _ in range(images[0, 0].numel()):  # exact arithmetic would need no more
        going = residual.abs().amax((2, 3), keepdim=True) > tolerance
        if not going.any():
            break
        change = unknown * (degree * step - _neighbours(step))
        length = _ratio(square, _dot(step, change)) * going  # zero for a plane that is done
        found = found + length * step
        residual = residual - length * change
        corrected = _cycle(residual, grids)
        before, square = square, _dot(residual, corrected)
        step = corrected + _ratio(square, before) * step
    return given + found


Grid = tuple[Tensor, Tensor, Tensor]
"""Unknown pixels as ones (N, 1, h, w), D (1, 1, h, w), and the first over the second."""


def _grids(unknown: Tensor) -> list[Grid]:
    """From the image to at most 8 x 8; a coarse pixel is unknown if all that it covers are."""
    grids = []
    while True:
        degree = _neighbours(torch.ones_like(unknown[:1]))
        grids.append((unknown, degree, unknown / degree.clamp_min(1 / 12)))
        if max(unknown.shape[-2:]) <= 8:
            return grids
        unknown = -functional.max_pool2d(-unknown, 2, ceil_mode=True)


def _cycle(residual: Tensor, grids: list[Grid]) -> Tensor:
    """About the solution of D x - A x = residual: a Jacobi step, a coarser grid, a Jacobi step.

    Jacobi steps need no damping, as the eigenvalues of A lie between -1/3 and 1.
    """
    (unknown, _, inverse), *coarser = grids
    found = inverse * residual
    if coarser:
        # the coarse equations have the same stencil on twice the spacing: residuals add up
        left = unknown * _neighbours(found)
        small = functional.avg_pool2d(left, 2, ceil_mode=True, divisor_override=1)
        large = _cycle(small * coarser[0][0], coarser)
        large = large.repeat_interleave(2, -1).repeat_interleave(2, -2)
        found = found + unknown * large[..., : unknown.shape[-2], : unknown.shape[-1]]
    return inverse * (residual + _neighbours(found))


def _neighbours(planes: Tensor) -> Tensor:
    """A: the weighted sum of each pixel's neighbours; nothing lies beyond the border.

    The weights are the products of (1, 2, 1) along both axes over 12, but for the pixel's own.
    """
    wide = functional.pad(planes, (1, 1, 0, 0))
    across = wide[..., :-2] + wide[..., 2:] + 2 * planes
    high = functional.pad(across, (0, 0, 1, 1))
    return (high[..., :-2, :] + high[..., 2:, :] + 2 * across) / 12 - planes / 3


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one * other).sum((2, 3), keepdim=True)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    return torch.where(whole > 0, part / whole.where(whole > 0, 1), 0)
