"""Two result sets, cell by cell and image by image: what became worse, and is that sure?"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from .errors import UsageError
from .files import atomic_write
from .sheets import code, markdown, markdown_row
from .statistics import bca_intervals, holm, sign_flip_test
from .tables import SCORED

Verdict = Literal["worse", "missing", "failing", "not comparable", "better", "new", "same"]
VERDICTS: tuple[Verdict, ...] = get_args(Verdict)
"""As they are printed, what matters most first."""

SIGNIFICANCE = 0.01
"""Of Holm's adjusted p-values: at most one run in a hundred without a change is stopped."""

FILES = ("table.csv", "table.md", "provenance.json", "per_image.parquet")
"""What makes a result set, and what is committed of one."""

WORSE = ("worse", "missing", "failing")
MOST = 50
"""Rows of a comment on a pull request."""


Name = tuple[str, str, str, str]


@dataclass(frozen=True)
class ResultSet:
    """What a run left: one row per cell, one per image, and where they come from."""

    path: Path
    table: pd.DataFrame
    per_image: pd.DataFrame
    provenance: Mapping[str, Any]

    @property
    def cells(self) -> dict[Name, dict[str, str]]:
        """Rows of the table by data set, model, method and metric."""
        rows = self.table.to_dict("records")
        return {
            (r["dataset"], r["model"], r["method"], r["metric"]): {str(k): v for k, v in r.items()}
            for r in rows
        }

    @property
    def tolerances(self) -> dict[str, float]:
        """By metric: smaller changes of a mean are of no interest."""
        return {name: facts["tolerance"] for name, facts in self.provenance["metrics"].items()}

    def scores(self, dataset: str, model: str) -> pd.DataFrame:
        """Images by (method, metric); NaN where an image was asked for and has no score."""
        rows = self.per_image
        rows = rows[(rows["dataset"] == dataset) & (rows["model"] == model)]
        values = rows["value"].where(rows["status"].isin(SCORED))
        return rows.assign(value=values).pivot(
            index="image", columns=["method", "metric"], values="value"
        )


@dataclass(frozen=True)
class Change:
    """What became of one cell.

    Args:
        dataset, model, method, metric: labels.
        verdict: "worse" and "better" are both significant and larger than the metric's tolerance.
        reason: in words, where numbers do not say it.
        images: that both sets have scored.
        base, new: means over these images.
        low, high: 95 % interval of the mean difference, new minus base.
        p: of the paired sign-flip test, adjusted by Holm over all cells.
    """

    dataset: str
    model: str
    method: str
    metric: str
    verdict: Verdict
    reason: str = ""
    images: int = 0
    base: float = np.nan
    new: float = np.nan
    low: float = np.nan
    high: float = np.nan
    p: float = np.nan

    @property
    def name(self) -> Name:
        return self.dataset, self.model, self.method, self.metric


@dataclass(frozen=True)
class Comparison:
    """All changes between two result sets.

    Args:
        changes: one per cell that either set has scored.
        notices: what differs and does not keep numbers from being compared.
    """

    changes: tuple[Change, ...]
    notices: tuple[str, ...]

    @property
    def counts(self) -> dict[str, int]:
        return dict(Counter(change.verdict for change in self.changes))

    def status(self, *, strict: bool = False) -> int:
        """Exit status: 4 on a regression (with ``strict``, on any change), 5 if cells cannot be
        compared or there is nothing to compare, else 0.
        """
        found = self.counts
        if any(found.get(word) for word in (*WORSE, *(("better",) if strict else ()))):
            return 4
        compared = sum(found.get(word, 0) for word in ("same", "better"))
        return 5 if found.get("not comparable") or not compared else 0


def read_results(path: Path) -> ResultSet:
    """A result set from a folder such as ``results/quick`` or one of ``runs/``.

    Raises:
        UsageError: if a file lacks or cannot be read.
    """
    if (path / "runs").is_dir() and not (path / "table.csv").exists():
        runs = sorted(run for run in (path / "runs").iterdir() if (run / "table.csv").exists())
        if runs:
            path = runs[-1]  # folders are named by time
    lacking = [name for name in FILES if name != "table.md" and not (path / name).is_file()]
    if lacking:
        raise UsageError(
            f"{str(path)!r} is no result set: it has no {' and no '.join(lacking)}; name a folder "
            "of runs/ as 'xbench run' leaves it, or a committed one such as results/quick"
        )
    try:
        return ResultSet(
            path,
            pd.read_csv(path / "table.csv", keep_default_na=False, dtype=str),
            pd.read_parquet(path / "per_image.parquet"),
            json.loads((path / "provenance.json").read_bytes()),
        )
    except Exception as error:  # whatever three parsers raise on damaged files
        raise UsageError(
            f"result set {str(path)!r} cannot be read: {type(error).__name__}: "
            f"{str(error).splitlines()[0]}; run again, or take the files from version control"
        ) from error


def compare(base: ResultSet, new: ResultSet, *, allow_different: bool = False) -> Comparison:
    """Judges every cell of two result sets on the images that both were asked for.

    Args:
        base: what was.
        new: what is.
        allow_different: compare cells by name although data, weights, parameters or versions
            differ.
    """
    before, after = base.cells, new.cells
    changes: list[Change] = []
    for group in dict.fromkeys(name[:2] for name in before):
        old, fresh = base.scores(*group), new.scores(*group)
        shared = sorted(set(old.index) & set(fresh.index))
        old, fresh = old.loc[shared], fresh.loc[shared]
        tested = []
        for name in (name for name in before if name[:2] == group and name[2:] in old):
            found = _obstacle(old, fresh, name, after)
            if (
                found is None
                and before[name]["cell"] != after[name]["cell"]
                and not allow_different
            ):
                found = "not comparable", _differences(base, new, name)
            if found is None:
                tested.append(name)
            else:
                changes.append(Change(*name, *found))
        changes += _measured(old, fresh, tested)
    changes = _judged(changes, before, base.tolerances)
    known = {change.name for change in changes}
    changes += [
        Change(*name, "new", "not in the base")
        for name, row in after.items()
        if name not in known and row["status"] not in ("skipped", "missing")
    ]
    order = {name: at for at, name in enumerate([*before, *after])}
    return Comparison(
        tuple(sorted(changes, key=lambda change: order[change.name])), tuple(_notices(base, new))
    )


def _obstacle(
    old: pd.DataFrame, fresh: pd.DataFrame, name: Name, after: Mapping[Name, Mapping[str, str]]
) -> tuple[Verdict, str] | None:
    """Why a cell cannot be measured: it is gone, or images have no score any more."""
    if name not in after:
        return "missing", "not in the new set"
    if name[2:] not in fresh:
        return "missing", after[name]["reason"] or after[name]["status"]
    lost = int((old[name[2:]].notna() & fresh[name[2:]].isna()).sum())
    if lost:
        return "failing", f"{lost} images without a score: {after[name]['reason']}"
    if not old[name[2:]].notna().any():
        return "not comparable", "no image in common"
    return None


def _measured(old: pd.DataFrame, fresh: pd.DataFrame, names: Sequence[Name]) -> list[Change]:
    if not names:
        return []
    columns = [name[2:] for name in names]
    before, after = (frame[columns].to_numpy(dtype=np.float64) for frame in (old, fresh))
    moved = after - before
    keys = list(old.index)
    low, high = bca_intervals(moved, keys)
    p = sign_flip_test(moved, keys)
    return [
        Change(
            *name,
            "same",
            images=int(np.isfinite(moved[:, at]).sum()),
            base=float(np.nanmean(before[np.isfinite(moved[:, at]), at])),
            new=float(np.nanmean(after[np.isfinite(moved[:, at]), at])),
            low=float(low[at]),
            high=float(high[at]),
            p=float(p[at]),
        )
        for at, name in enumerate(names)
    ]


def _judged(
    changes: Sequence[Change],
    before: Mapping[Name, Mapping[str, str]],
    tolerances: Mapping[str, float],
) -> list[Change]:
    """The same with p-values adjusted over all tests and verdicts drawn from them."""
    judged = []
    for change, p in zip(changes, holm(np.array([c.p for c in changes])), strict=True):
        difference = change.new - change.base
        is_sure = p < SIGNIFICANCE and abs(difference) > tolerances.get(change.metric, 0.0)
        better = before[change.name]["better"]
        if not is_sure or change.verdict != "same":
            judged.append(replace(change, p=float(p)))
            continue
        is_good = (difference > 0) == (better == "higher") and better != "neither"
        reason = "" if better != "neither" else "changed; the metric has no direction"
        judged.append(
            replace(change, p=float(p), verdict="better" if is_good else "worse", reason=reason)
        )
    return judged


def _differences(base: ResultSet, new: ResultSet, name: Name) -> str:
    """What makes two cells of one name different things, in words."""
    found = []
    groups: list[Mapping[str, Any]] = [
        next((g for g in s.provenance["groups"] if (g["dataset"], g["model"]) == name[:2]), {})
        for s in (base, new)
    ]
    identities = [group.get("identity", {}) for group in groups]
    for key in sorted({*identities[0], *identities[1]}):
        found += _unequal(key, identities[0].get(key), identities[1].get(key))
    for kind, label in (("methods", name[2]), ("metrics", name[3])):
        sides = [s.provenance[kind].get(label) for s in (base, new)]
        found += _unequal(label, *sides)
    return "; ".join(found[:3]) or "another identity"


def _unequal(place: str, old: Any, new: Any) -> list[str]:
    """The leaves in which two JSON values differ, as "place: old -> new"."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted({*old, *new})
        return [
            line for key in keys for line in _unequal(f"{place}.{key}", old.get(key), new.get(key))
        ]
    return [] if old == new else [f"{place}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _notices(base: ResultSet, new: ResultSet) -> Iterator[str]:
    for kind in ("versions", "platform"):
        yield from _unequal(kind, base.provenance.get(kind, {}), new.provenance.get(kind, {}))
    for group in base.provenance["groups"]:
        here = (group["dataset"], group["model"])
        old, fresh = (set(s.scores(*here).index) for s in (base, new))
        if fresh and old != fresh:
            yield (
                f"{here[0]} x {here[1]}: {len(old & fresh)} images are in both, "
                f"{len(old - fresh)} only in the base, {len(fresh - old)} only in the new set"
            )


# --- what is printed ------------------------------------------------------------------------------


def render(comparison: Comparison, form: Literal["terminal", "md", "json"]) -> str:
    """All cells that changed, worst first, and a line of counts."""
    if form == "json":
        rows = [
            {k: None if isinstance(v, float) and np.isnan(v) else v for k, v in asdict(c).items()}
            for c in comparison.changes
        ]
        value = {"changes": rows, "notices": list(comparison.notices)}
        return json.dumps(value, indent=1, allow_nan=False) + "\n"
    words = [f"{count} {word}" for word, count in sorted(comparison.counts.items())]
    summary = f"{len(comparison.changes)} cells: {', '.join(words) or 'none'}"
    changed = sorted(
        (c for c in comparison.changes if c.verdict != "same"),
        key=lambda c: (VERDICTS.index(c.verdict), c.p, c.name),
    )
    write = _markdown if form == "md" else _plain
    return write(comparison, changed, summary)


def _line(change: Change) -> tuple[str, str, str, str, str, str]:
    numbers = (
        ("", "", "", "")
        if np.isnan(change.base)
        else (
            f"{change.base:.4g}",
            f"{change.new:.4g}",
            f"{change.new - change.base:+.3g} [{change.low:+.3g}, {change.high:+.3g}]",
            f"{change.p:.1e}",
        )
    )
    return (change.verdict, *numbers, change.reason)


def _plain(comparison: Comparison, changed: Sequence[Change], summary: str) -> str:
    lines = []
    for change in changed:
        verdict, old, new, difference, p, reason = _line(change)
        where = f"{change.dataset} x {change.model}: {change.method} / {change.metric}"
        numbers = f"{old} -> {new}  {difference}  p {p}  " if old else ""
        lines.append(f"{verdict:14} {where}  {numbers}{reason}".rstrip())
    lines += [f"differs: {notice}" for notice in comparison.notices]
    return "\n".join([*lines, summary]) + "\n"


def _markdown(comparison: Comparison, changed: Sequence[Change], summary: str) -> str:
    regressed = comparison.status() == 4
    lines = [f"### xbench: {'regression' if regressed else 'no regression'}", "", summary, ""]
    if changed:
        lines += [
            "| verdict | data, model | method | metric | base | new | difference | p | reason |",
            "|:--|:--|:--|:--|--:|--:|--:|--:|:--|",
        ]
    for change in changed[:MOST]:
        verdict, old, new, difference, p, reason = _line(change)
        group = f"{change.dataset} x {change.model}"
        names = (verdict, markdown(group), code(change.method), code(change.metric))
        lines.append(markdown_row([*names, old, new, difference, p, markdown(reason)]))
    if len(changed) > MOST:
        lines.append(f"\nand {len(changed) - MOST} more")
    lines += [f"\n* differs: {markdown(notice)}" for notice in comparison.notices]
    return "\n".join(lines) + "\n"


def update(base: Path, new: ResultSet) -> None:
    """Makes ``base`` what ``new`` is; to be committed on its own."""
    for name in FILES:
        if (new.path / name).is_file():
            atomic_write(base / name, (new.path / name).read_bytes())
