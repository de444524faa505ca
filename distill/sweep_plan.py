"""The plan of a sweep: its preset read and checked, and the cells that it makes; nothing is written here.

A preset is a JSON object, in `configs/sweeps` or anywhere:
    {"system": "system1", "preset": a training preset, "data": arguments of prepare_system1_dataset, "questions": a held-out file,
     "vary": {axis: [values]}, "repeat_seeds": [0], "design": "grid" | "one_at_a_time", "max_new_tokens": 12, "note": "…"}
An axis is any setting of the training, or one of AXES. `one_at_a_time` changes one axis at a time from the first value of each.
"""

import inspect
import itertools
import json
import re
from dataclasses import dataclass
from pathlib import Path

from . import store
from .config import LAB, OTHER_NAMES, TRAINING, resolve
from .console import visible
from .data import prepare_system1_dataset
from .errors import ConfigError, did_you_mean
from .perturb import PROMPTS
from .prompt import MODES
from .traces import prepare_system2_dataset

SWEEPS = store.ROOT / "configs" / "sweeps"
DESIGNS = ("grid", "one_at_a_time")
KEYS = {"system": str, "preset": str, "data": dict, "questions": str, "vary": dict}
MORE_KEYS = {"repeat_seeds": list, "design": str, "max_new_tokens": int, "note": str}
ASKING = ("cot_sentence", "prompt")  # axes that need no training of their own
WINDOWS = ("rv", "cd")
PREPARE = {"system1": prepare_system1_dataset, "system2": prepare_system2_dataset}
OF_SYSTEM = {"relabelled": "system1", "rv": "system2", "cd": "system2"}
# axis → (whether a value will do, what to give)
AXES = {
    "rows": (lambda value: type(value) is int and value > 0, "a whole number of rows above 0"),
    "relabelled": (lambda value: isinstance(value, bool), "true or false"),
    "rv": (lambda value: _is_window(value), "[lowest, highest], levels 0 to 9"),
    "cd": (lambda value: _is_window(value), "[lowest, highest], levels 0 to 9"),
    "student_model": (lambda value: isinstance(value, str) and bool(value.strip()), "a hub name or the path of a folder"),
    "cot_sentence": (lambda value: isinstance(value, bool), "true or false"),
    "prompt": (lambda value: isinstance(value, str) and value in PROMPTS, " or ".join(map(json.dumps, PROMPTS))),
}
SETTINGS = (*TRAINING, *LAB, *(name for name in OTHER_NAMES if OTHER_NAMES[name] in TRAINING))


def _is_window(value) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(type(level) in (int, float) for level in value)


@dataclass(frozen=True)
class Sweep:
    """A checked preset; the fields are its keys, `axes` what it varies."""

    name: str
    system: str
    preset: str
    data: dict
    questions: str
    axes: dict
    seeds: list
    design: str
    max_new_tokens: int | None
    note: str

    @property
    def key(self) -> str:
        """What tells apart sweeps of the same name, by which their folders go."""
        return store.hash_json([self.system, self.preset, self.data, self.questions])[:8]


@dataclass(frozen=True)
class Cell:
    """One experiment: a value for each axis, and the seed of its training."""

    axes: dict
    seed: int

    @property
    def name(self) -> str:
        return ", ".join([*(f"{axis} {shown(value)}" for axis, value in self.axes.items()), f"seed {self.seed}"])

    @property
    def trained(self) -> "Cell":
        """The cell without the axes that decide only how it is asked."""
        return Cell({axis: value for axis, value in self.axes.items() if axis not in ASKING}, self.seed)


# The preset


def shown(value) -> str:
    """An axis's value as a table shows it: a path by its last name, a window as `0-2`."""
    if isinstance(value, list):
        return "-".join(f"{level:g}" for level in value)
    text = value if isinstance(value, str) else json.dumps(value)
    return visible(Path(text).name or text)


def read_sweep(preset: str) -> Sweep:
    """A preset by its name in `configs/sweeps` or the path of a JSON file. Raises ConfigError that lists every problem."""
    shipped = sorted(path.stem for path in SWEEPS.glob("*.json"))
    path = store.resolve(preset) if str(preset).endswith(".json") else SWEEPS / f"{preset}.json"
    if not store.is_file(path):
        raise ConfigError(f"sweep = {preset!r}: there is no such sweep.{did_you_mean(preset, shipped)} Shipped: {', '.join(shipped)}.")
    found = store.read_json(path)
    if not isinstance(found, dict):
        raise ConfigError(f"{store.shown(path)} holds no JSON object.")
    problems = _shape_problems(found) or _axis_problems(found) + _data_problems(found)
    if problems:
        raise ConfigError.from_problems(store.shown(path), problems)
    sweep = Sweep(
        path.stem, *(found[key] for key in ("system", "preset", "data", "questions", "vary")), found.get("repeat_seeds", [0]),
        found.get("design", "grid"), found.get("max_new_tokens"), found.get("note", ""),
    )  # fmt: skip
    if problems := _settings_problems(sweep):
        raise ConfigError.from_problems(store.shown(path), problems)
    return sweep


def _shape_problems(found: dict) -> list[str]:
    known = KEYS | MORE_KEYS
    problems = [f"{key}: no such key.{did_you_mean(key, known)}" for key in found if key not in known]
    problems += [f"{key}: is needed and has no value." for key in KEYS if key not in found]
    problems += [
        f"{key} = {found[key]!r}: is no {kind.__name__}." for key, kind in known.items() if key in found and type(found[key]) is not kind
    ]
    if problems:
        return problems
    for key, choices in (("system", MODES), ("design", DESIGNS)):
        if key in found and found[key] not in choices:
            problems.append(f"{key} = {found[key]!r}: is not one of {', '.join(choices)}.{did_you_mean(found[key], choices)}")
    seeds = found.get("repeat_seeds", [0])
    if not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds) or len(set(seeds)) < len(seeds):
        problems.append(f"repeat_seeds = {seeds!r}: give whole numbers of 0 or more, each once, e.g. [0, 1, 2].")
    if found.get("max_new_tokens", 1) < 1:
        problems.append(f"max_new_tokens = {found['max_new_tokens']!r}: give a whole number above 0.")
    return problems


def _axis_problems(found: dict) -> list[str]:
    problems = [] if found["vary"] else ["vary: names no axis, so there is nothing to compare."]
    for axis, values in found["vary"].items():
        if axis == "seed":
            problems.append("vary.seed: repeat_seeds says that.")
        elif axis not in AXES and axis not in SETTINGS:
            problems.append(f"vary.{axis}: no such axis.{did_you_mean(axis, (*AXES, *SETTINGS))}")
        elif OF_SYSTEM.get(axis, found["system"]) != found["system"]:
            problems.append(f"vary.{axis}: is an axis of {OF_SYSTEM[axis]} alone.")
        elif not isinstance(values, list) or not values or len({store.hash_json(value) for value in values}) < len(values):
            problems.append(f"vary.{axis} = {values!r}: give a list of values, each once.")
        elif axis in AXES:
            will_do, wanted = AXES[axis]
            problems += [f"vary.{axis} = {value!r}: give {wanted}." for value in values if not will_do(value)]
    return problems


def _data_problems(found: dict) -> list[str]:
    """Arguments of the preparation that it does not know, or that the sweep decides."""
    known = list(inspect.signature(PREPARE[found["system"]]).parameters)
    varied = {"rows": ["rows"], **{axis: [f"{axis}_min", f"{axis}_max"] for axis in WINDOWS}}
    own = {name for name in known if name.startswith("out_")} | {"fresh", "student_model", "max_length"}
    own |= {name for axis in found["vary"] for name in varied.get(axis, [])}
    problems = [f"data.{name}: the sweep decides it; leave it out." for name in found["data"] if name in own]
    return problems + [f"data.{name}: no such argument.{did_you_mean(name, known)}" for name in found["data"] if name not in known]


def _settings_problems(sweep: Sweep) -> list[str]:
    """What the trainings' settings refuse, each said once."""
    problems: dict = {}
    for cell in trainings_of(sweep):
        try:
            resolve(settings_of(sweep, cell, Path("runs")), preset=sweep.preset)
        except ConfigError as error:
            problems.setdefault(str(error), cell.name)
    return [f"{name}: {message}" for message, name in problems.items()]


# Cells


def cells_of(sweep: Sweep) -> list[Cell]:
    """Every cell, those that share a training beside one another."""
    axes = sweep.axes
    if sweep.design == "grid":
        points = [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]
    else:
        first = {axis: values[0] for axis, values in axes.items()}
        points = [first, *({**first, axis: value} for axis, values in axes.items() for value in values[1:])]
    cells = [Cell(point, seed) for seed in sweep.seeds for point in points]
    order = [store.hash_json([cell.trained.axes, cell.seed]) for cell in cells]
    first_at = {key: order.index(key) for key in order}
    return [cells[number] for number in sorted(range(len(cells)), key=lambda number: (first_at[order[number]], number))]


def trainings_of(sweep: Sweep) -> list[Cell]:
    """The cells that are trained, each once."""
    return list({store.hash_json([cell.trained.axes, cell.seed]): cell.trained for cell in cells_of(sweep)}.values())


def settings_of(sweep: Sweep, cell: Cell, folder: Path, labeled: Path = Path("data/labeled.json")) -> dict:
    """What `distill_system1/2` is given for a cell: its training's axes over the preset, and places in `folder`."""
    chosen = {axis: value for axis, value in cell.axes.items() if axis in SETTINGS or axis == "student_model"}
    places = {"labeled_path": str(labeled), "out_dir": str(folder / "checkpoint"), "config_path": str(folder / "job.json")}
    return {"preset": sweep.preset, **chosen, "seed": cell.seed, **places}


def data_arguments(sweep: Sweep, cell: Cell) -> dict:
    """What a cell's preparation is given, without its places."""
    arguments, values = dict(sweep.data), resolve(settings_of(sweep, cell, Path("runs")), preset=sweep.preset).values
    for axis, value in cell.axes.items():
        if axis == "rows":
            arguments["rows"] = value
        if axis in WINDOWS:
            arguments |= {f"{axis}_min": value[0], f"{axis}_max": value[1]}
    if sweep.system == "system2":
        arguments |= {"student_model": values["student_model"], "max_length": values["max_length"]}
    if cell.axes.get("relabelled") is False:
        return {name: value for name, value in arguments.items() if name not in ("teacher_model", "relabel_with_teacher")}
    if cell.axes.get("relabelled"):
        return {"teacher_model": values.get("teacher_model"), "relabel_with_teacher": True} | arguments
    return arguments


def slug(cell: Cell) -> str:
    """A folder's name: what the cell is, as far as a name can say it, and a hash of all of it."""
    words = re.sub(r"[^\w.]+", "-", cell.name).strip("-.").lower()[:60]
    return f"{words}-{store.hash_json([cell.axes, cell.seed])[:6]}"
