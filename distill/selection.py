"""Which trace of a question is taken: windows, the share of long ones, the level nearest its target. Values in, values out.

RV is how long-winded a trace is, CD how hard it is to follow, both levels from 0 to 9.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

LOWEST, HIGHEST = 0, 9
LONG_FROM_RV = 6
# RV rises with CD: the bins [0, 3, 6, 10] of CD ask for RV 2, 5 and 8 (EasyDistill 2's mixer)
RV_TARGETS = ((3, 2), (6, 5), (10, 8))
KINDS = ("long", "short")
WITHOUT_SHARE = "long_share = None"

# Why a trace is refused, in the order of the tests
NOT_CORRECT, TOO_LONG, RV_OUTSIDE, CD_OUTSIDE = "not correct", "longer than max_length", "RV outside its window", "CD outside its window"
TESTS = (NOT_CORRECT, TOO_LONG, RV_OUTSIDE, CD_OUTSIDE)


@dataclass(frozen=True)
class Trace:
    """One way to answer a question.

    output   thought and solution, as they are trained on
    rv, cd   levels, None where the source has none
    teacher  who wrote it, None where the source does not say
    tokens   of the whole row, question included; 0 where it was not measured
    """

    output: str
    correct: bool
    rv: float | None = None
    cd: float | None = None
    teacher: str | None = None
    tokens: int = 0

    @property
    def kind(self) -> str:
        return "long" if self.rv >= LONG_FROM_RV else "short"


@dataclass(frozen=True)
class Limits:
    """What is asked of the traces.

    max_length  tokens of a row, question included
    rv, cd      (lowest, highest) level, both included
    long_share  share of rows with an RV of 6 and more, 0 to 1; None where it does not matter
    rows        how many to keep; None for all
    """

    max_length: int
    rv: tuple[float, float] = (LOWEST, HIGHEST)
    cd: tuple[float, float] = (LOWEST, HIGHEST)
    long_share: float | None = None
    rows: int | None = None

    def places(self) -> dict[str, float]:
        """Kind → how many rows of it are wanted."""
        if self.rows is None:
            return dict.fromkeys(KINDS, math.inf)
        long = round(self.rows * self.long_share)
        return {"long": long, "short": self.rows - long}


# Bounds as a user gives them


def read_window(name: str, low, high) -> tuple[tuple[float, float], list[str], list[str]]:
    """A window from its two bounds, "RV" or "CD": (window, what to say of it, problems).

    A bound between 0 and 1 is a share of the 0–9 scale; beside one, a 1 is a share too.

    >>> read_window("RV", 0.6, 1)[0]
    (5.4, 9)
    """
    given = {f"{name.lower()}_min": low, f"{name.lower()}_max": high}
    problems = [
        f"{key} = {value!r}: give a level from 0 to 9, or a share of that scale." for key, value in given.items() if not is_level(value)
    ]
    if problems:
        return (LOWEST, HIGHEST), [], problems
    shares = {key: value for key, value in given.items() if 0 < value <= 1 and (0 < low < 1 or 0 < high < 1)}
    first, last = (_level_of(value) if key in shares else value for key, value in given.items())
    read = [f"{key} = {value:g} is read as a share of the 0–9 scale, {_level_of(value):g}" for key, value in shares.items()]
    said = "; ".join(read) + ": " if read else ""
    levels = range(math.ceil(first), math.floor(last) + 1)
    if first > last:
        problems.append(f"{said}{name.lower()}_min = {first:g} is above {name.lower()}_max = {last:g}.")
    elif not levels:
        problems.append(f"{said}no whole level lies from {name.lower()}_min = {first:g} to {name.lower()}_max = {last:g}.")
    elif read:
        return (first, last), [f"{said}{name} levels {levels[0]} to {levels[-1]} are kept."], []
    return (first, last), [], problems


def share_problems(long_share: float | None, rv: tuple[float, float]) -> list[str]:
    """What is wrong with a share of long traces beside a window that leaves only one kind."""
    kept = f"rv_min = {rv[0]:g}, rv_max = {rv[1]:g} keep none"
    if long_share and rv[1] < LONG_FROM_RV:
        return [f"long_share = {long_share:g} asks for traces of RV {LONG_FROM_RV} and more, of which {kept}."]
    if long_share is not None and long_share < 1 and rv[0] > LONG_FROM_RV - 1:
        return [f"long_share = {long_share:g} asks for traces of RV below {LONG_FROM_RV} too, of which {kept}."]
    return []


def is_level(value) -> bool:
    """Whether a value is a number from 0 to 9."""
    return isinstance(value, int | float) and not isinstance(value, bool) and LOWEST <= value <= HIGHEST


def _level_of(share: float) -> float:
    level = round(share * HIGHEST, 6)
    return int(level) if level == int(level) else level


# One question


def refusal(trace: Trace, limits: Limits) -> str | None:
    """The first test that a trace fails, or None: correct → fits → windows."""
    if not trace.correct:
        return NOT_CORRECT
    if trace.tokens > limits.max_length:
        return TOO_LONG
    for level, (low, high), reason in ((trace.rv, limits.rv, RV_OUTSIDE), (trace.cd, limits.cd, CD_OUTSIDE)):
        if level is not None and not low <= level <= high:
            return reason
    return None


def question_refusal(refusals: Iterable[str], limits: Limits) -> str:
    """Why a question is dropped whose traces were all refused: what the one that got furthest failed."""
    return {
        NOT_CORRECT: "no correct trace",
        TOO_LONG: f"no correct trace that fits max_length = {limits.max_length} tokens",
        RV_OUTSIDE: "no fitting trace of RV {:g} to {:g}".format(*limits.rv),
        CD_OUTSIDE: "no fitting trace of CD {:g} to {:g}".format(*limits.cd),
    }[max(refusals, key=TESTS.index)]


def choose(fitting: list[Trace], taken: Mapping[str, int], limits: Limits) -> Trace | None:
    """The trace to take of those that passed every test; None where `long_share` has no place left for one.

    taken  kind → rows kept so far
    """
    if limits.long_share is not None:
        kind = next_kind({trace.kind for trace in fitting}, taken, limits)
        fitting = [trace for trace in fitting if trace.kind == kind]
    return min(fitting, key=_distance, default=None)


def next_kind(kinds: Iterable[str], taken: Mapping[str, int], limits: Limits) -> str | None:
    """Of the kinds that a question could serve, the one whose quota is the less filled; None where all are full.

    Filled in proportion, so that the share holds as well where the source ends early.
    """
    wanted, places = {"long": limits.long_share, "short": 1 - limits.long_share}, limits.places()
    free = [kind for kind in sorted(kinds) if wanted[kind] and taken.get(kind, 0) < places[kind]]
    return min(free, key=lambda kind: (taken.get(kind, 0) / wanted[kind], -wanted[kind]), default=None)


def _distance(trace: Trace) -> tuple[float, int]:
    """How far a trace's RV is from the target that its CD asks for; of two as far, the shorter is nearer."""
    return (0 if trace.rv is None or trace.cd is None else abs(trace.rv - rv_target(trace.cd))), trace.tokens


def rv_target(cd: float) -> int:
    """The RV that a trace of this CD should have.

    >>> [rv_target(cd) for cd in (0, 2, 3, 5, 6, 9)]
    [2, 2, 5, 5, 8, 8]
    """
    return next(target for below, target in RV_TARGETS if cd < below)


# All questions


def balanced(taken: Mapping[str, int], share: float) -> dict[str, int]:
    """How many rows of each kind may stay so that `share` of them are long, to the nearest row; as many as possible."""
    for total in range(sum(taken.values()), 0, -1):
        long = round(total * share)
        if long <= taken.get("long", 0) and total - long <= taken.get("short", 0):
            return {"long": long, "short": total - long}
    return {"long": 0, "short": 0}


def widenings(limits: Limits) -> dict[str, Limits]:
    """Each bound opened alone, as the setting that opens it: {"rv_min = 0": limits, …, "max_length = 8192": limits, …}."""
    wider = {}
    for name in ("rv", "cd"):
        low, high = getattr(limits, name)
        if low > LOWEST:
            wider[f"{name}_min = {LOWEST}"] = replace(limits, **{name: (LOWEST, high)})
        if high < HIGHEST:
            wider[f"{name}_max = {HIGHEST}"] = replace(limits, **{name: (low, HIGHEST)})
    for factor in (2, 4, 8):
        wider[f"max_length = {limits.max_length * factor}"] = replace(limits, max_length=limits.max_length * factor)
    return wider


def gained(traces: list[Trace], wider: Mapping[str, Limits]) -> list[str]:
    """The widenings under which a question that has no fitting trace has one."""
    return [change for change, limits in wider.items() if any(refusal(trace, limits) is None for trace in traces)]


def advise(limits: Limits, read: int, kept: int, missed: Counter, shortest: int | None) -> list[str]:
    """What would bring more rows, each alone, where fewer than wanted were kept.

    missed    change → questions that it would bring
    shortest  tokens of the shortest correct trace; None where there is none
    """
    lines, most = [], 0
    for change in [*widenings(limits), WITHOUT_SHARE]:
        # a longer max_length is worth naming only where it brings more than a shorter one
        if missed[change] > (most if change.startswith("max_length") else 0):
            lines.append(f"{change} alone would bring {missed[change]:,} more")
        most = missed[change] if change.startswith("max_length") else most
    if not kept and shortest and shortest > limits.max_length:
        lines.append(f"the shortest correct trace needs max_length = {shortest}")
    if kept and limits.rows:
        lines.append(
            f"at this yield rows = {limits.rows:,} needs about {math.ceil(read * limits.rows / kept):,} source rows: widen slice_str"
        )
    return lines
