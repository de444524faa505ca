"""Which plots an evaluation has the numbers for, and which numbers go into which."""

from . import plots
from .report_words import METRICS, SYSTEM_TITLES, quality_of


def drawn(facts: dict) -> list[plots.Plot]:
    """Every plot whose numbers are there."""
    systems = facts["systems"].values()
    trained = [system for system in systems if system["training"]]
    curves = [_series(system, system["training"]["loss"]) for system in trained if any(system["training"]["loss"].values())]
    found = [plots.loss(curves)] if curves else []
    if pairs := [_series(system, points) for system in systems if (points := _speed_points(facts, system))]:
        names = " or ".join(sorted({METRICS[system["headline"]].name for system in systems})).capitalize()
        found.append(plots.quality_speed(pairs, f"{names} (teacher in {facts['models']['teacher']['bits']} bits)"))
    for system in systems:
        found += _length_plot(system) if system["mode"] == "system2" else []
    for system in trained:
        joint = (system["training"]["levels"] or {}).get("joint")
        found += [plots.levels(joint)] if joint else []
    for system in systems:
        found += _calibration_plot(facts, system)
    return found


def _series(system: dict, points) -> plots.Series:
    return plots.Series(system["mode"], SYSTEM_TITLES[system["mode"]], points)


def _speed_points(facts: dict, system: dict) -> list[tuple]:
    """(name, speed, quality) of the teacher in each of its forms, then of the student; empty where one is missing."""
    if not facts["speed"] or system["student"] not in facts["speed"]["models"]:
        return []
    qualities = {name: quality_of(facts, system, name)[system["headline"]] for name in ("teacher", "student")}
    if any(quality is None or quality["value"] is None for quality in qualities.values()):
        return []
    timed = facts["speed"]["models"]
    teachers = [(name, model["tokens_per_second"], qualities["teacher"]) for name, model in timed.items() if model["model"] == "teacher"]
    return [*teachers, ("student", timed[system["student"]]["tokens_per_second"], qualities["student"])]


def _length_plot(system: dict) -> list[plots.Plot]:
    """Right answers by length, of teacher and student; nothing where all of the student's are of one length, or none is right or wrong."""
    points = {
        who: [(case["answers"][system[who]]["tokens"], case["answers"][system[who]]["right"]) for case in system["cases"]]
        for who in ("teacher", "student")
    }
    if any(right is None for who in points.values() for _, right in who) or len(plots.length_bins(points["student"])) < 2:
        return []
    return [plots.length_correctness([plots.Series("teacher", "Teacher", points["teacher"]), _named(system, points["student"])])]


def _named(system: dict, points) -> plots.Series:
    return plots.Series(system["mode"], f"{SYSTEM_TITLES[system['mode']]} student", points)


def _calibration_plot(facts: dict, system: dict) -> list[plots.Plot]:
    found = {who: quality_of(facts, system, who)["calibration"] for who in ("teacher", "student")}
    series = [plots.Series("teacher", "Teacher", found["teacher"]["bins"])] if found["teacher"] else []
    series += [_named(system, found["student"]["bins"])] if found["student"] else []
    if not series:
        return []
    return [plots.reliability(f"calibration-{system['mode']}", f"Calibration, {SYSTEM_TITLES[system['mode']]}", series)]
