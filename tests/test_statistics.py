"""Intervals, tests and agreement, against scipy, brute force and printed values."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from xbench import statistics

KEYS = tuple(f"image-{at}" for at in range(40))


def skewed(columns: int, images: int = 40, seed: int = 0) -> statistics.Floats:
    return np.random.default_rng(seed).lognormal(size=(images, columns))


def test_bootstrap_means_are_means_of_images_drawn_with_replacement() -> None:
    values = np.eye(3)  # each row of means then says how often each image was drawn
    times = 3 * statistics.bootstrap_means(values, "abc", 600)
    assert np.allclose(times.sum(1), 3)
    assert np.allclose(times, times.round())
    assert np.allclose(times.mean(0), 1, atol=0.15)


def test_columns_share_the_drawn_images() -> None:
    values = skewed(1)
    both = statistics.bootstrap_means(np.hstack([values, values + 1]), KEYS, 300)
    assert np.allclose(both[:, 1] - both[:, 0], 1)


def test_an_interval_does_not_depend_on_other_columns_or_the_call() -> None:
    values = skewed(3)
    together = statistics.bca_intervals(values, KEYS)
    alone = statistics.bca_intervals(values[:, 1:2], KEYS)
    assert np.allclose([together[0][1], together[1][1]], [alone[0][0], alone[1][0]], rtol=1e-12)


def test_a_missing_image_is_as_if_it_had_not_been_asked_for() -> None:
    values = skewed(2)
    values[7, 0] = np.nan
    means = statistics.bootstrap_means(values, KEYS)
    without = statistics.bootstrap_means(np.delete(values[:, :1], 7, axis=0), KEYS[:-1])
    assert means[:, 0].mean() == pytest.approx(without.mean(), rel=0.02)
    assert means[:, 0].std() == pytest.approx(without.std(), rel=0.1)


def test_bca_equals_the_definition_with_an_explicit_jackknife() -> None:
    values = skewed(1)[:, 0]
    boot = statistics.bootstrap_means(values[:, None], KEYS)[:, 0]
    left_out = np.array([np.delete(values, at).mean() for at in range(len(values))])
    pull = left_out.mean() - left_out
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    normal = scipy.stats.norm
    bias = normal.ppf((boot < values.mean()).mean())
    ends = []
    for tail in (0.025, 0.975):
        z = bias + normal.ppf(tail)
        ends.append(np.quantile(boot, normal.cdf(bias + z / (1 - acceleration * z))))
    low, high = statistics.bca_intervals(values[:, None], KEYS)
    assert [low[0], high[0]] == pytest.approx(ends, rel=1e-9)
    theirs = scipy.stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="BCa", rng=0
    ).confidence_interval
    width = ends[1] - ends[0]
    assert abs(low[0] - theirs.low) < 0.1 * width
    assert abs(high[0] - theirs.high) < 0.1 * width


def test_bca_holds_the_true_mean_of_skewed_scores_more_often_than_the_normal_interval() -> None:
    stream = np.random.default_rng(1)
    samples = stream.exponential(size=(25, 1000))
    keys = KEYS[:25]
    low, high = statistics.bca_intervals(samples, keys)
    half = 1.96 * samples.std(0, ddof=1) / 5
    normal = np.abs(samples.mean(0) - 1) <= half
    held = (low <= 1) & (high >= 1)
    assert held.mean() > normal.mean()
    assert 0.89 < held.mean() < 0.97


def test_constant_scores_have_an_interval_of_no_width_and_single_ones_none() -> None:
    low, high = statistics.bca_intervals(np.full((5, 1), 0.3), KEYS[:5])
    assert (low[0], high[0]) == (pytest.approx(0.3), pytest.approx(0.3))
    low, high = statistics.bca_intervals(np.array([[0.3], [np.nan]]), KEYS[:2])
    assert np.isnan(low[0])
    assert np.isnan(high[0])
    low, high = statistics.bca_intervals(np.full((4, 1), np.nan), KEYS[:4])
    assert np.isnan(low[0])


def test_student_equals_scipy_and_leaves_out_what_is_missing() -> None:
    values = np.random.default_rng(3).normal(size=(5, 4)) + 0.5
    values[2, 1] = np.nan
    low, high, p = statistics.student_intervals(values)
    for at in range(4):
        expected = scipy.stats.ttest_1samp(values[~np.isnan(values[:, at]), at], 0)
        interval = expected.confidence_interval(0.95)
        ours = low[at], high[at], p[at]
        assert ours == pytest.approx((interval.low, interval.high, expected.pvalue), rel=1e-12)


def test_one_value_has_no_interval_and_equal_ones_need_none() -> None:
    low, high, p = statistics.student_intervals(np.array([[1.0, 2.0, 0.0], [np.nan, 2.0, 0.0]]))
    np.testing.assert_equal(low, [np.nan, 2, 0])
    np.testing.assert_equal(high, [np.nan, 2, 0])
    np.testing.assert_equal(p, [np.nan, 0, 1])


def test_few_sign_patterns_are_all_gone_through() -> None:
    differences = np.random.default_rng(3).normal(0.4, 1, size=(9, 2))
    theirs = scipy.stats.permutation_test(
        (differences,),
        lambda d, axis: d.mean(axis),
        permutation_type="samples",
        axis=0,
        n_resamples=np.inf,
    )
    ours = statistics.sign_flip_test(differences, KEYS[:9])
    assert ours == pytest.approx(theirs.pvalue, rel=1e-12)


def test_drawn_sign_patterns_agree_with_the_paired_t_test_on_normal_differences() -> None:
    differences = np.random.default_rng(4).normal(0.25, 1, size=(40, 20))
    ours = statistics.sign_flip_test(differences, KEYS, draws=20_000)
    theirs = scipy.stats.ttest_1samp(differences, 0).pvalue
    assert np.abs(np.log(ours / theirs)).max() < 0.5
    assert np.abs(ours - theirs).max() < 0.02


def test_a_difference_beyond_all_draws_has_a_p_value_smaller_than_one_draw() -> None:
    differences = np.random.default_rng(5).normal(1, 0.2, size=(40, 1))
    p = statistics.sign_flip_test(differences, KEYS)[0]
    assert 0 < p < 1e-8


def test_under_no_difference_p_values_are_uniform() -> None:
    differences = np.random.default_rng(6).laplace(size=(40, 2000))
    p = statistics.sign_flip_test(differences, KEYS)
    for level in (0.01, 0.05, 0.2, 0.5):
        assert (p <= level).mean() == pytest.approx(level, abs=3 * np.sqrt(level / 2000))


def test_equal_scores_do_not_differ_and_one_image_cannot_be_tested() -> None:
    assert statistics.sign_flip_test(np.zeros((6, 1)), KEYS[:6])[0] == 1
    assert np.isnan(statistics.sign_flip_test(np.ones((1, 1)), KEYS[:1])[0])


def test_holm_by_hand() -> None:
    adjusted = statistics.holm(np.array([0.04, np.nan, 0.01, 0.03]))
    assert adjusted[[2, 3, 0]] == pytest.approx([0.03, 0.06, 0.06])  # 3 x .01, 2 x .03, and on
    assert np.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_never_lowers_a_p_value(p: list[float]) -> None:
    adjusted = statistics.holm(np.array(p))
    assert (adjusted >= np.array(p)).all()
    assert (adjusted <= 1).all()
    assert (np.diff(adjusted[np.argsort(p, kind="stable")]) >= 0).all()


@pytest.mark.parametrize("better", ["higher", "lower"])
def test_friedman_equals_scipy(better: str) -> None:
    values = skewed(4).round(1)  # with ties
    ours = statistics.friedman(values, better)
    theirs = scipy.stats.friedmanchisquare(*values.T)
    assert ours.statistic == pytest.approx(theirs.statistic, rel=1e-10)
    assert ours.p == pytest.approx(theirs.pvalue, rel=1e-8)
    best = values.mean(0).argmax() if better == "higher" else values.mean(0).argmin()
    assert ours.mean_ranks[best] < 2.5


def test_nemenyi_has_the_printed_critical_difference() -> None:
    # Demsar 2006, section 3.2.3: four classifiers, 14 data sets
    found = statistics.friedman(skewed(4, images=14), "higher").critical_difference
    assert found == pytest.approx(1.25, abs=0.005)


def test_an_image_that_a_method_lacks_is_left_out_of_friedman() -> None:
    values = skewed(3)
    holed = np.vstack([values, [[np.nan, 0, 0]]])
    assert statistics.friedman(holed, "higher").statistic == pytest.approx(
        statistics.friedman(values, "higher").statistic
    )


def test_inseparable_groups_are_the_longest_runs() -> None:
    separable = np.zeros((5, 5), dtype=bool)
    for a, b in [(0, 2), (0, 3), (0, 4), (1, 4), (2, 4), (3, 4)]:
        separable[a, b] = separable[b, a] = True
    groups = statistics.inseparable_groups([0, 1, 2, 3, 4], separable)
    assert groups == [(0, 1), (1, 2, 3)]
    assert statistics.inseparable_groups([0, 1, 2], np.ones((3, 3), dtype=bool)) == []
    assert statistics.inseparable_groups([2, 0, 1], np.zeros((3, 3), dtype=bool)) == [(2, 0, 1)]


def test_ranks_by_hand() -> None:
    means = np.array([[1.0, 9.0], [2.0, 9.0], [3.0, np.nan]])
    assert statistics.mean_ranks(means, ["higher", "lower"]) == pytest.approx(
        [(3 + 1.5) / 2, (2 + 1.5) / 2, (1 + 3) / 2]
    )


def test_clear_ranks_have_intervals_of_no_width_and_close_ones_do_not() -> None:
    noise = np.random.default_rng(7).normal(size=(40, 3, 1))
    noise[:, 1:] -= noise[:, 1:].mean(0)  # equal on average, not image by image
    values = noise + np.array([100.0, 0.0, 0.0])[None, :, None]
    found = statistics.ranking(values, ["higher"], KEYS)
    assert (found.low[0], found.high[0]) == (1, 1)
    assert found.low[1] == found.low[2] == 2
    assert found.high[1] == found.high[2] == 3
    assert found.ranks[0] == 1
    assert found.separable.tolist() == [[False, True, True], [True, False, False],
                                        [True, False, False]]  # fmt: skip


def test_a_missing_score_never_improves_a_rank_nor_its_interval() -> None:
    values = np.random.default_rng(1).normal(size=(40, 4, 2)) + np.arange(4)[None, :, None] * 0.1
    whole = statistics.ranking(values, ["higher", "lower"], KEYS)
    values[3, 2, 0] = np.nan
    less = statistics.ranking(values, ["higher", "lower"], KEYS)
    assert less.ranks[2] >= whole.ranks[2]
    assert less.low[2] >= whole.low[2]
    assert less.high[2] >= whole.high[2]
    assert less.ranks.sum() == pytest.approx(10)


def test_methods_of_one_mean_rank_are_told_apart_in_few_of_many_tables() -> None:
    """Ten equal methods have 45 pairs; at 5 % for all of them, most tables separate none."""
    false_alarms = 0
    for seed in range(40):
        values = np.random.default_rng(seed).normal(size=(60, 10, 3))
        keys = [f"{seed}-{at}" for at in range(60)]
        found = statistics.ranking(values, ["higher"] * 3, keys, draws=400)
        false_alarms += bool(found.separable.any())
    assert false_alarms <= 6  # of a binomial(40, 0.05), more have a probability of 0.3 %


def test_four_digits_are_those_of_printing() -> None:
    values = np.random.default_rng(2).normal(size=500) * 10.0 ** np.arange(-5, 5).repeat(50)
    found = statistics.four_digits(np.append(values, [0.0, np.nan]))
    assert found[:-2] == pytest.approx([float(f"{v:.4g}") for v in values], rel=1e-14)
    assert found[-2] == 0
    assert np.isnan(found[-1])


def test_pairs_are_tested_as_one_by_one() -> None:
    values = np.random.default_rng(3).normal(size=(40, 3, 2))
    values[5, 1, 0] = np.nan
    values[:, 2, 1] = values[:, 0, 1] * (1 + 1e-9)
    found = statistics.pair_tests(values, KEYS)
    assert found.shape == (2, 3)
    alone = statistics.sign_flip_test(values[:, [0], 0] - values[:, [1], 0], KEYS)
    assert found[0, 0] == alone[0]
    assert found[1, 1] == 1, "equal to four digits"


def test_kendall_equals_scipy_with_ties_and_directions() -> None:
    means = np.random.default_rng(8).integers(5, size=(9, 3)).astype(float)
    tau = statistics.kendall_tau(means, ["higher", "lower", "higher"])
    sign = np.array([1, -1, 1])
    for a in range(3):
        for b in range(3):
            expected = scipy.stats.kendalltau(sign[a] * means[:, a], sign[b] * means[:, b])
            assert tau[a, b] == pytest.approx(expected.statistic, rel=1e-12)


def test_kendall_leaves_out_a_method_without_a_mean() -> None:
    means = np.array([[1, 1], [2, 2], [3, 3], [9, np.nan]], dtype=float)
    assert statistics.kendall_tau(means, ["higher", "higher"])[0, 1] == 1


def test_agreement_has_tau_inside_its_interval() -> None:
    values = np.random.default_rng(9).normal(size=(40, 6, 3)) + np.arange(6)[None, :, None] * 0.2
    values[:, :, 2] = 0.0  # a metric that ties all methods
    tau, low, high = statistics.agreement_of_metrics(values, ["higher"] * 3, KEYS)
    assert low[0, 1] <= tau[0, 1] <= high[0, 1]
    assert low[0, 1] < high[0, 1]
    assert np.isnan([tau[0, 2], low[0, 2], high[0, 2]]).all()


def test_alpha_is_one_for_full_agreement_and_near_zero_for_none() -> None:
    order = np.tile(np.arange(6.0), (30, 1))
    assert statistics.krippendorff_alpha(order) == pytest.approx(1)
    chance = np.random.default_rng(10).normal(size=(400, 6))
    assert abs(statistics.krippendorff_alpha(chance)) < 0.02


def test_alpha_equals_its_definition_by_pairs() -> None:
    values = skewed(5, images=7).round(1)
    ranks = scipy.stats.rankdata(values, axis=1)
    units = ranks.T  # a method is a unit, an image a coder
    within = [
        (a - b) ** 2 for unit in units for i, a in enumerate(unit) for b in np.delete(unit, i)
    ]
    pooled = units.ravel()
    overall = [(a - b) ** 2 for i, a in enumerate(pooled) for b in np.delete(pooled, i)]
    alpha = 1 - np.mean(within) / np.mean(overall)
    assert statistics.krippendorff_alpha(values) == pytest.approx(alpha, rel=1e-12)
