"""What a mean over images is worth: bootstrap intervals, paired tests, ranks, agreement.

Values are float64 arrays with images along the first axis, NaN where an image has no score.
Everything is drawn over images, the same draws for all columns, so that methods are compared on the
same images. Draws are seeded from the images' keys alone: no interval depends on what else stands
in a table.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

DRAWS = 2000
"""Bootstrap samples and sign flips: the ends of a 95 % interval have 50 draws beyond them."""

LEVEL = 0.95
CHUNK = 250
"""Draws that are held at a time; 250 x 10,000 images take 20 MB."""


def _stream(keys: Sequence[str], use: str) -> np.random.Generator:
    digest = hashlib.sha256("\n".join([use, *keys]).encode()).digest()
    return np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16])))


def bootstrap_means(values: Floats, keys: Sequence[str], draws: int = DRAWS) -> Floats:
    """Means of images drawn with replacement.

    A column's missing images are left out of its own draws; a draw without any image of a column is
    NaN there.

    Args:
        values: (N, C).
        keys: of the N images; they seed the draws.
        draws: B.

    Returns:
        (B, C), the same images in each row.
    """
    count, columns = values.shape
    known = ~np.isnan(values)
    filled = np.where(known, values, 0.0)
    stream = _stream(keys, "bootstrap")
    means = np.full((draws, columns), np.nan)
    if not count:
        return means
    for start in range(0, draws, CHUNK):
        size = min(CHUNK, draws - start)
        picked = stream.integers(count, size=(size, count))
        picked += count * np.arange(size)[:, None]
        times = np.bincount(picked.ravel(), minlength=size * count).reshape(size, count)
        weights = times.astype(np.float64)
        number = np.full((size, columns), float(count)) if known.all() else weights @ known
        np.divide(weights @ filled, number, out=means[start : start + size], where=number > 0)
    return means


def bca_intervals(
    values: Floats, keys: Sequence[str], draws: int = DRAWS, level: float = LEVEL
) -> tuple[Floats, Floats]:
    """Bias-corrected and accelerated bootstrap intervals of the mean of each column.

    The acceleration needs no jackknife loop: leaving one image out moves a mean by a multiple of
    its deviation. A column whose images all agree has an interval of no width; one with a single
    image has none (NaN).

    Args:
        values: (N, C).
        keys: of the N images.
        draws: bootstrap samples.
        level: share of intervals that hold the true mean.

    Returns:
        Lower and upper ends, (C,) each.

    Source: Efron, "Better Bootstrap Confidence Intervals", JASA 1987.
    """
    from scipy.special import ndtr, ndtri

    boot = bootstrap_means(values, keys, draws)
    known = ~np.isnan(values)
    count = known.sum(0)
    mean = np.divide(
        np.where(known, values, 0.0).sum(0),
        count,
        out=np.full(len(count), np.nan),
        where=count > 0,
    )
    deviation = np.where(known, values - mean, 0.0)
    squares = (deviation**2).sum(0)
    moved = squares > 0
    acceleration = np.divide(
        (deviation**3).sum(0), 6 * squares**1.5, out=np.zeros_like(mean), where=moved
    )
    ordered = np.sort(boot, 0)  # NaN draws last
    drawn = (~np.isnan(boot)).sum(0)
    # equal sums in another order of adding differ by rounding
    near = 1e-12 * np.abs(np.where(known, values, 0.0)).max(0, initial=0.0)
    below, above = ((sign * (boot - mean) > near).sum(0) for sign in (-1, 1))
    share = (below + (drawn - below - above) / 2) / np.maximum(drawn, 1)
    bias = ndtri(np.clip(share, 1 / (draws + 1), draws / (draws + 1)))
    ends = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        shifted = bias + ndtri(tail)
        at = ndtr(bias + shifted / (1 - acceleration * shifted)) * np.maximum(drawn - 1, 0)
        low = np.floor(at).astype(int)
        columns = np.arange(len(mean))
        below = ordered[low, columns]
        above = ordered[np.minimum(low + 1, np.maximum(drawn - 1, 0)), columns]
        end = below + (above - below) * (at - low)
        ends.append(np.where(count < 2, np.nan, np.where(moved, end, mean)))
    return ends[0], ends[1]


def student_intervals(values: Floats, level: float = LEVEL) -> tuple[Floats, Floats, Floats]:
    """Student's t intervals of the mean of each column, and p-values of its being zero.

    For a handful of values, such as one per pair of trained networks, which a bootstrap has too few
    of; they are taken as drawn from a normal distribution.

    Args:
        values: (N, C); NaN is left out.
        level: share of intervals that hold the true mean.

    Returns:
        Lower ends, upper ends, two-sided p-values, (C,) each; NaN with fewer than two values.
    """
    from scipy.stats import t

    known = ~np.isnan(values)
    count = known.sum(0)
    mean = column_means(values)
    squares = (np.where(known, values - mean, 0.0) ** 2).sum(0)
    freedom = np.maximum(count - 1, 1)
    error = np.sqrt(squares / freedom / np.maximum(count, 1))
    reach = t.ppf((1 + level) / 2, freedom) * error
    sigmas = np.divide(
        np.abs(mean), error, out=np.where(mean == 0, 0.0, np.inf), where=(count > 1) & (error > 0)
    )
    low, high, p = (
        np.where(count > 1, found, np.nan)
        for found in (mean - reach, mean + reach, 2 * t.sf(sigmas, freedom))
    )
    return low, high, p


def sign_flip_test(differences: Floats, keys: Sequence[str], draws: int = DRAWS) -> Floats:
    """Two-sided paired permutation test that the mean difference is zero.

    Under that hypothesis each image's difference may as well have the other sign. All 2^N sign
    patterns are gone through where there are no more than ``draws`` of them, else as many drawn
    ones. A p-value that no drawn pattern reaches comes from the normal limit of the same
    statistic, which is conservative in the tail: sums of signed terms have lighter tails than a
    normal variable.

    Args:
        differences: (N, C); NaN where either side has no score.
        keys: of the N images; they seed the draws.
        draws: sign patterns.

    Returns:
        p-values, (C,); 1 where all differences are zero, NaN with fewer than two images.
    """
    from scipy.special import ndtr

    known = ~np.isnan(differences)
    filled = np.where(known, differences, 0.0)
    observed = np.abs(filled.sum(0))
    count = len(filled)
    # equal sums in another order of adding differ by rounding
    reached = observed - 1e-12 * np.abs(filled).sum(0)
    hits = np.zeros(filled.shape[1])
    is_exact = count < 31 and 2**count <= draws
    total = 2**count if is_exact else draws
    stream = _stream(keys, "sign flips")
    for start in range(0, total, CHUNK):
        size = min(CHUNK, total - start)
        if is_exact:
            bits = (np.arange(start, start + size)[:, None] >> np.arange(count)) & 1
        else:
            bits = stream.integers(2, size=(size, count), dtype=np.int8)
        hits += (np.abs((1.0 - 2.0 * bits) @ filled) >= reached).sum(0)
    p = hits / total if is_exact else (hits + 1) / (total + 1)
    if not is_exact:
        root = np.sqrt((filled**2).sum(0))
        z = np.divide(observed, root, out=np.zeros_like(root), where=root > 0)
        p = np.where(hits == 0, np.minimum(2 * ndtr(-z), p), p)
    return np.where(known.sum(0) < 2, np.nan, np.where(observed == 0, 1.0, p))


def holm(p: Floats) -> Floats:
    """p-values adjusted by Holm's step-down rule for as many tests as there are numbers.

    NaN (no test) stays NaN and does not count as a test.

    Source: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", 1979.
    """
    adjusted = np.full(p.shape, np.nan)
    order = np.flatnonzero(~np.isnan(p))
    order = order[np.argsort(p[order], kind="stable")]
    factors = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * factors), 1.0)
    return adjusted


@dataclass(frozen=True)
class Friedman:
    """Whether methods differ at all, by their ranks on each image.

    Args:
        statistic: Friedman's chi squared, ties averaged.
        p: its p-value.
        mean_ranks: of each method over images, 1 is best.
        critical_difference: mean ranks closer than this do not differ at 5 % (Nemenyi).
    """

    statistic: float
    p: float
    mean_ranks: Floats
    critical_difference: float


def friedman(values: Floats, better: str) -> Friedman:
    """Friedman's test with Nemenyi's critical difference, over images that all methods scored.

    Args:
        values: (N, M), an image a row, a method a column.
        better: "higher" or "lower".

    Source: Demsar, "Statistical Comparisons of Classifiers over Multiple Data Sets", JMLR 2006.
    """
    from scipy.stats import chi2, rankdata, studentized_range

    complete = values[~np.isnan(values).any(1)]
    images, methods = complete.shape
    if images < 2 or methods < 2:
        return Friedman(np.nan, np.nan, np.full(methods, np.nan), np.nan)
    ranks = rankdata(-complete if better == "higher" else complete, axis=1)
    mean_ranks = ranks.mean(0)
    spread = ((ranks - (methods + 1) / 2) ** 2).sum() / (images * (methods - 1))
    statistic = (
        float(images * ((mean_ranks - (methods + 1) / 2) ** 2).sum() / spread) if spread else 0.0
    )
    quantile = float(studentized_range.ppf(LEVEL, methods, np.inf))
    return Friedman(
        statistic,
        float(chi2.sf(statistic, methods - 1)),
        mean_ranks,
        quantile * float(np.sqrt(methods * (methods + 1) / (12 * images))),
    )


def inseparable_groups(order: Sequence[int], separable: Bools) -> list[tuple[int, ...]]:
    """The longest runs of neighbours in a ranking within which no pair is separable.

    Args:
        order: columns, best first.
        separable: (M, M), symmetric: whether two columns differ.

    Returns:
        Runs of two columns or more, best first; a column may stand in several.
    """
    runs: list[tuple[int, ...]] = []
    end = 0
    for start in range(len(order)):
        stop = start + 1
        while (
            stop < len(order)
            and not separable[np.ix_(order[start : stop + 1], order[start : stop + 1])].any()
        ):
            stop += 1
        if stop - start > 1 and stop > end:
            runs.append(tuple(order[start:stop]))
        end = max(end, stop)
    return runs


def mean_ranks(means: Floats, better: Sequence[str]) -> Floats:
    """Mean over metrics of the methods' ranks, 1 is best.

    Equal means share the average of their places. No mean (NaN) is behind all others: a missing
    score never improves a rank.

    Args:
        means: (..., M, K), methods by metrics.
        better: "higher" or "lower" of the K metrics.

    Returns:
        (..., M).
    """
    from scipy.stats import rankdata

    sign = np.array([-1.0 if word == "higher" else 1.0 for word in better])
    cost = np.where(np.isnan(means), np.inf, means * sign)
    averaged: Floats = rankdata(cost, axis=-2).mean(-1)
    return averaged


@dataclass(frozen=True)
class Ranking:
    """Methods by their mean rank over metrics, and how sure that is.

    Args:
        ranks: mean ranks, (M,), 1 is best.
        low, high: their 95 % percentile intervals over bootstrap samples of images.
        separable: (M, M), symmetric: whether the order of two methods is sure. 95 % of bootstrap
            samples must keep it, and their ranks on each image, averaged over metrics, must differ
            in the same direction (sign-flip test, Holm over all pairs, 5 %).
    """

    ranks: Floats
    low: Floats
    high: Floats
    separable: Bools


def ranking(
    values: Floats, better: Sequence[str], keys: Sequence[str], draws: int = DRAWS
) -> Ranking:
    """Ranks methods by their means, of which the images are a sample.

    Means that agree to four digits share the average of their places: beyond that, maps that are
    equal but for float32 rounding would be ranked by it. A mean over fewer images than another
    method's is behind all others, as is no mean: a failed image never improves a rank.

    Args:
        values: (N, M, K), images by methods by metrics.
        better: "higher" or "lower" of the K metrics.
        keys: of the N images.
        draws: bootstrap samples.
    """
    images, methods, metrics = values.shape
    if not (images and metrics):
        middle = np.full(methods, (methods + 1) / 2)
        return Ranking(middle, middle, middle, np.zeros((methods, methods), dtype=np.bool_))
    count = (~np.isnan(values)).sum(0)
    fair = np.where(count < count.max(0), np.nan, values)
    ranks = mean_ranks(four_digits(column_means(fair)), better)
    means = bootstrap_means(fair.reshape(images, -1), keys, draws)
    boot = mean_ranks(four_digits(means.reshape(draws, methods, metrics)), better)
    low, high = np.quantile(boot, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    each = mean_ranks(four_digits(fair), better)  # (N, M)
    pair = np.triu_indices(methods, 1)
    moved = each[:, pair[0]] - each[:, pair[1]]
    gap = ranks[pair[0]] - ranks[pair[1]]
    kept = np.sign(gap) * (boot[:, pair[0]] - boot[:, pair[1]]) > 0
    is_sure = (kept.mean(0) >= LEVEL) & (np.sign(moved.mean(0)) == np.sign(gap))
    separable = np.zeros((methods, methods), dtype=np.bool_)
    separable[pair] = is_sure & (holm(sign_flip_test(moved, keys, draws)) < 1 - LEVEL)
    return Ranking(ranks, low, high, separable | separable.T)


def four_digits(values: Floats) -> Floats:
    """Rounded to four significant digits, which is what two means must differ in to differ."""
    size = np.abs(values)
    known = np.isfinite(values) & (size > 0)
    exponent = np.floor(np.log10(size, out=np.zeros_like(size), where=known))
    scale = 10.0 ** (3 - exponent)
    rounded: Floats = np.where(known, np.round(values * scale) / scale, values)
    return rounded


def pair_tests(values: Floats, keys: Sequence[str], draws: int = DRAWS) -> Floats:
    """p-values of :func:`sign_flip_test` between all pairs of methods, metric by metric.

    Means that agree to four digits are equal: p is 1.

    Args:
        values: (N, M, K), images by methods by metrics.
        keys: of the N images.
        draws: sign patterns.

    Returns:
        (K, P), pairs in the order of ``numpy.triu_indices(M, 1)``; not yet adjusted.
    """
    methods, metrics = values.shape[1:]
    first, second = np.triu_indices(methods, 1)
    found = np.full((metrics, len(first)), np.nan)
    for at in range(metrics if len(first) else 0):
        column = values[:, :, at]
        known = ~np.isnan(column)
        mean = column_means(column)
        is_equal = four_digits(mean[first]) == four_digits(mean[second])
        is_equal &= (known[:, first] == known[:, second]).all(0)
        p = sign_flip_test(column[:, first] - column[:, second], keys, draws)
        found[at] = np.where(is_equal & ~np.isnan(p), 1.0, p)
    return found


def kendall_tau(means: Floats, better: Sequence[str]) -> Floats:
    """Kendall's tau-b between the orders that each pair of metrics gives the methods.

    Args:
        means: (..., M, K), methods by metrics; a method without a mean in either metric is left
            out of that pair.
        better: "higher" or "lower" of the K metrics: tau is 1 where both call the same methods
            better.

    Returns:
        (..., K, K); NaN where a metric ties all methods.
    """
    sign = np.array([1.0 if word == "higher" else -1.0 for word in better])
    quality = means * sign
    first, second = np.triu_indices(means.shape[-2], 1)
    order = np.sign(quality[..., first, :] - quality[..., second, :])  # (..., pairs, K)
    known = (~np.isnan(order)).astype(np.float64)
    order = np.nan_to_num(order)
    agreement = np.swapaxes(order, -1, -2) @ order
    untied = np.swapaxes(np.abs(order), -1, -2) @ known  # pairs untied in one, known in both
    scale = np.sqrt(untied * np.swapaxes(untied, -1, -2))
    tau: Floats = np.divide(agreement, scale, out=np.full(scale.shape, np.nan), where=scale > 0)
    return tau


def agreement_of_metrics(
    values: Floats, better: Sequence[str], keys: Sequence[str], draws: int = DRAWS
) -> tuple[Floats, Floats, Floats]:
    """Kendall's tau between metrics' rankings of methods, with percentile intervals over images.

    Args:
        values: (N, M, K), images by methods by metrics.
        better: of the K metrics.
        keys: of the N images.
        draws: bootstrap samples.

    Returns:
        tau, lower and upper ends, (K, K) each.
    """
    images, methods, metrics = values.shape
    boot = bootstrap_means(values.reshape(images, -1), keys, draws)
    taus = np.concatenate(
        [
            kendall_tau(part.reshape(-1, methods, metrics), better)
            for part in np.array_split(boot, max(1, draws // CHUNK))
        ]
    )
    tau = kendall_tau(column_means(values), better)
    low, high = np.full((2, *tau.shape), np.nan)
    for pair in zip(*np.nonzero(~np.isnan(tau)), strict=True):
        drawn = taus[(slice(None), *pair)]
        low[pair], high[pair] = np.nanquantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return tau, low, high


def column_means(values: Floats) -> Floats:
    """Means over images, the first axis, of those that have a score; NaN where none has."""
    known = ~np.isnan(values)
    count = known.sum(0)
    total = np.where(known, values, 0.0).sum(0)
    means: Floats = np.divide(total, count, out=np.full(total.shape, np.nan), where=count > 0)
    return means


def krippendorff_alpha(values: Floats) -> float:
    """Whether images agree on the order of methods: Krippendorff's alpha of ranks.

    Images are the coders, methods the units, ranks within an image (ties averaged) the codes,
    compared by squared difference. 1: all images order the methods alike; 0: no more alike than
    chance.

    Args:
        values: (N, M); images with a missing score are left out.

    Source: Krippendorff, "Content Analysis", 2004; Tomsett et al., AAAI 2020, arXiv:1912.01451, on
    saliency metrics.
    """
    from scipy.stats import rankdata

    complete = values[~np.isnan(values).any(1)]
    images, methods = complete.shape
    if images < 2 or methods < 2:
        return float("nan")
    ranks = rankdata(complete, axis=1)
    observed = ranks.var(0, ddof=1).mean()  # half the mean squared difference within a unit
    expected = ranks.var(ddof=1)
    return float(1 - observed / expected) if expected > 0 else float("nan")
