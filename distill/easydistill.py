"""EasyDistill: where one is, which one it is, and how one is fetched. It is a program of its own: the lab starts it and never imports it.

Three things carry the name: 1.x trains students; 2.x makes data with a teacher behind an API and cannot train; the package
index's `easydistill` is an empty placeholder. Their files tell them apart; their metadata do not: 1.0 and the placeholder both say 0.0.1.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from . import environment, packages, process, store
from .console import say
from .environment import Recipe
from .errors import BackendError, ConfigError, DataError, DistillError, shortened, without_secrets

SOURCE = "https://github.com/modelscope/easydistill"
HOME = "EASYDISTILL_HOME"
FOLDER = ".easydistill"
TAGS = {1: "v1.0.0", 2: "v2.0.0"}
MARKS = {1: "kd/train.py", 2: "cli/main.py"}  # the file of the package that only this one has
ABILITIES = {1: "EasyDistill 1.x trains students", 2: "EasyDistill 2.x makes data with a teacher behind an API and cannot train"}
INSTEAD = {1: "the built-in engine trains in its place", 2: "a teacher that is loaded here labels in its place"}
# EasyDistill 1.0's own pins, without vLLM and DeepSpeed, and with what it imports and forgot to require
REQUIREMENTS = ("transformers==4.51.1", "trl==0.17.0", "tokenizers==0.21.1", "jsonlines", "datasets<6", "accelerate<2", "jinja2")
# What 1.0 can use beside that, and no job of the lab asks for. This vLLM pins a torch of its own and has no build for Python 3.13.
EXTRAS = {"vllm": "vllm==0.8.5", "deepspeed": "deepspeed"}
VLLM_PYTHONS = ((3, 12), (3, 11), (3, 10))
RUNS_ON = {
    1: ("torch", "transformers", "trl", "tokenizers", "datasets", "accelerate", "jsonlines"),
    2: ("openai", "pydantic", "httpx", "pyyaml", "langgraph"),
}
FETCH_SECONDS = 300
QUESTION_SECONDS = 20
QUESTION = """
import importlib.metadata, importlib.util, json, platform, sys
def version(package):
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
found = importlib.util.find_spec("easydistill")
folders = list(found.submodule_search_locations or []) if found else []
print(json.dumps([folders, {"python": platform.python_version(), **{package: version(package) for package in sys.argv[1:]}}]))
"""
IMPORTED = (
    "import accelerate, datasets, jinja2, jsonlines, torch; from transformers import AutoModelForCausalLM; from trl import SFTTrainer"
)
PROOFS = {1: ["-c", IMPORTED], 2: ["-m", "easydistill.cli", "--list-jobs"]}


@dataclass(frozen=True)
class Installation:
    """An EasyDistill that can be started.

    major     1 trains; 2 makes data
    version   as known: a 1.x that the lab did not fetch does not say more than "1.0"
    python    the interpreter of its environment
    home      the folder that holds `easydistill/` and, for a checkout, `configs/`
    origin    "EASYDISTILL_HOME" or ".easydistill"
    versions  package → version of what it runs on, and of its Python
    """

    major: int
    version: str
    python: Path
    home: Path
    origin: str
    versions: dict


def command(installation: Installation) -> list[str]:
    """What starts EasyDistill's command line; its arguments follow."""
    return [str(installation.python), "-m", "easydistill.cli"]


# Finding


def find(major: int) -> tuple[Installation | None, str]:
    """The installation of EasyDistill `major`.x, or None; and where it is, or why there is none, as a sentence. Loads none of its packages.

    Looks into EASYDISTILL_HOME's places, each an environment or a checkout, then into the project's `.easydistill`.
    """
    reasons = []
    for place, origin in _places(major):
        try:
            found = _look(store.resolve(place), major, origin)
        except DistillError as error:
            reasons.append(str(error))
        else:
            passed_over = reasons if origin == FOLDER else []  # of several that are named, each is another version's
            return found, "; ".join([f"EasyDistill {found.version} in {store.shown(place)}, by {origin}", *passed_over])
    return None, " ".join(reasons)


def require(major: int) -> Installation:
    """The installation of EasyDistill `major`.x. Raises BackendError that says what is there instead and what to do."""
    installation, reason = find(major)
    if installation:
        return installation
    raise BackendError(
        f"EasyDistill {major}.x is needed and cannot be used. {reason} {_abilities()} "
        f"To get it, run `{setup_call(major)}`, or let {HOME} name an environment or a checkout of {TAGS[major]}."
    )


def setup_call(major: int) -> str:
    """The command that installs EasyDistill `major`.x; in Python it is `distill_app.setup_easydistill(major)`."""
    return f"python distill_app.py setup-easydistill {major}"


def _abilities() -> str:
    return f"{ABILITIES[1]}; {ABILITIES[2]}; the package index's `easydistill` is an empty placeholder."


def _places(major: int) -> list[tuple[str, str]]:
    named = [part for part in os.environ.get(HOME, "").split(os.pathsep) if part.strip()]
    own = [_own_checkout(major), *([] if named else _sealed_checkout(major))]
    return [*((part, HOME) for part in named), *((str(place), FOLDER) for place in own)]


def _sealed_checkout(major: int) -> list[Path]:
    """The checkout that the lab's own environment was made for, where EASYDISTILL_HOME named it then; none where there is no such."""
    checkout = Path(_sealed(major).get("checkout", _own_checkout(major)))
    return [checkout] if checkout != _own_checkout(major) and checkout.is_dir() else []


def _own_checkout(major: int) -> Path:
    return store.ROOT / FOLDER / TAGS[major]


def _look(place: Path, major: int, origin: str) -> Installation:
    """What stands at one place. Raises BackendError where it is no EasyDistill `major`.x that can be started."""
    if not store.is_dir(place):
        if origin == FOLDER:
            raise BackendError(f"EasyDistill {major}.x is not installed here.")
        raise BackendError(f"{store.shown(place)}, named by {HOME}, is not there.")
    python = place / "bin" / "python"
    if _is_there(python):
        return _ask(python, major, origin)
    if not store.is_dir(place / "easydistill"):
        raise BackendError(f"{store.shown(place)} is neither an environment (it has no bin/python) nor a checkout of EasyDistill.")
    _check_major(place / "easydistill", major)
    if python := _own_python(place):
        return _ask(python, major, origin, place)
    return _look_into_own(place, major, origin)


def _look_into_own(checkout: Path, major: int, origin: str) -> Installation:
    """What stands in the environment that the lab made for a checkout. Raises BackendError where there is none, or it has lost files."""
    recipe = _recipe(checkout, major)
    if not environment.is_complete(recipe):
        state = "was made for another Python, torch or checkout, or not to its end" if recipe.folder.exists() else "is not made yet"
        raise BackendError(f"The environment of {store.shown(checkout)} {state}; run `{setup_call(major)}`.")
    found = _ask(environment.python_of(recipe.folder), major, origin, checkout)
    if lost := packages.damage(recipe.folder, _sealed(major).get(environment.PACKAGES, [])):
        raise BackendError(f"The environment of {store.shown(checkout)} is damaged ({lost}); run `{setup_call(major)}`.")
    return found


def _is_there(python: Path) -> bool:
    """Whether the name stands, be it as a link that leads nowhere any more."""
    return store.is_file(python) or python.is_symlink()


def _own_python(checkout: Path) -> Path | None:
    """The interpreter of the environment that a checkout brings, or None."""
    candidates = [checkout / name / "bin" / "python" for name in (".venv", "venv")]
    return next((python for python in candidates if _is_there(python)), None)


def _check_major(package: Path, major: int) -> None:
    found = major_of(package)
    if found == major:
        return
    where = store.shown(package.parent)
    if found:
        raise BackendError(f"{where} holds another: {ABILITIES[found]}.")
    raise BackendError(
        f"`easydistill` in {where} has neither 1.x's {MARKS[1]} nor 2.x's {MARKS[2]}: it is the package index's empty placeholder, "
        f"or a 1.x that was installed without `pip install -e` and so without its trainer."
    )


def major_of(package: Path) -> int | None:
    """Which EasyDistill a folder `easydistill` is: 1, 2, or None for the placeholder and all else."""
    if store.is_file(package / MARKS[1]):
        return 1
    return 2 if store.is_file(package / MARKS[2]) and _version(package, 2).startswith("2.") else None


def _version(package: Path, major: int) -> str:
    if major == 1:
        return TAGS[1].lstrip("v") if package.parent == _own_checkout(1) else "1.0"
    text = (package / "__init__.py").read_text(encoding="utf-8", errors="replace") if store.is_file(package / "__init__.py") else ""
    found = re.search(r"""^__version__ *= *["'](\d[\w.+-]*)["']""", text, re.M)
    return found[1] if found else ""


def _ask(python: Path, major: int, origin: str, checkout: Path | None = None) -> Installation:
    """The installation of an environment, by what its interpreter says. Raises BackendError where that is of no use."""
    where = store.shown(python)
    try:
        asked = [str(python), "-I", "-c", QUESTION, "easydistill", *RUNS_ON[major]]
        done = subprocess.run(asked, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=QUESTION_SECONDS)
        folders, versions = json.loads(done.stdout.splitlines()[-1])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired) as error:
        why = error.strerror if isinstance(error, OSError) else "it does not answer"
        raise BackendError(f"The environment of {where} is broken: {why}.") from error
    metadata = versions.pop("easydistill")
    if not folders and not metadata:
        raise BackendError(f"{where} knows no `easydistill`: install it there, by `pip install -e` of its checkout.")
    package = Path(folders[0] if folders else python.parent.parent / "easydistill")
    _check_major(package, major)
    if lacking := [name for name in RUNS_ON[major] if not versions[name]]:
        raise BackendError(f"The environment of {where} is broken: it lacks {', '.join(lacking)}.")
    return Installation(major, _version(package, major), python, checkout or package.parent, origin, versions)


# Installing


def setup_easydistill(*majors: int, extras: Iterable[str] = ()) -> dict[int, Installation | None]:
    """Make sure that EasyDistill is there, in an environment of its own; the running Python's packages stay as they are.

    majors  1 (trains; the default), 2 (makes data with a teacher behind an API), or both
    extras  "vllm" and "deepspeed", for 1.x jobs of your own; no job of the lab needs them, and vLLM brings a torch of its own
    Fetches what EASYDISTILL_HOME does not name, which takes a few minutes and a network. Where that cannot be, says why and what works
    without.
    Returns {major: its installation, or None}. Raises ConfigError for a number that no EasyDistill has, and for other extras.
    """
    if unknown := sorted(set(extras) - EXTRAS.keys()):
        raise ConfigError(f"There is no extra {unknown[0]!r}; there are {', '.join(EXTRAS)}.")
    if wrong := [major for major in majors if major not in TAGS]:
        raise ConfigError(f"There is no EasyDistill {wrong[0]!r}.x. {_abilities()} Ask for 1, 2 or both.")
    return {major: _set_up(major, sorted(extras) if major == 1 else []) for major in majors or (1,)}


def _set_up(major: int, extras: list[str]) -> Installation | None:
    installation, reason = find(major)
    if installation is None or set(extras) - set(_extras(major)):
        try:
            with store.lock(_own_environment(major)):
                _install(major, extras)
            installation, reason = find(major)
        except (DistillError, OSError) as error:
            installation, reason = None, f"{reason} {error}" if os.environ.get(HOME, "").strip() else str(error)
    if installation is None:
        reason += ("\n" if "\n" in reason else " ") + f"Going on without EasyDistill {major}.x: {INSTEAD[major]}."
    say(reason)
    return installation


def _install(major: int, extras: list[str]) -> None:
    """A checkout, fetched if there is none → its environment."""
    checkout = _named_checkout(major) or _own_checkout(major)
    if major_of(checkout / "easydistill") != major:
        _fetch(major, checkout)
    recipe = _recipe(checkout, major, extras)
    environment.make(recipe, lambda python, update: _prove(python, recipe, major, update))


def _named_checkout(major: int) -> Path | None:
    """The checkout that EASYDISTILL_HOME names and that lacks nothing but an environment; None where there is none."""
    for place in [store.resolve(place) for place, origin in _places(major) if origin == HOME]:
        if not _is_there(place / "bin" / "python") and not _own_python(place) and major_of(place / "easydistill") == major:
            return place
    return None


def _fetch(major: int, checkout: Path) -> None:
    """Clone the tag; a checkout is whole or absent."""
    if not shutil.which("git"):
        raise BackendError(f"EasyDistill {major}.x cannot be fetched, since git is not here. Install git.")
    log = _log(major)
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"Fetching EasyDistill {TAGS[major]} from {SOURCE}")
    with store.atomic_folder(checkout) as folder:
        clone = ["git", "-c", "advice.detachedHead=false", "clone", "--depth", "1", "--branch", TAGS[major], SOURCE, str(folder)]
        quiet = {**os.environ, "GIT_TERMINAL_PROMPT": "0"}
        ended = process.run(clone, log, env=quiet, limit_seconds=FETCH_SECONDS, clean=without_secrets)
        if ended.status or ended.overdue:
            said = f"no answer within {FETCH_SECONDS} s" if ended.overdue else _last_line(log)
            raise BackendError(
                f"EasyDistill {major}.x cannot be fetched (no network?): {said}. Clone {TAGS[major]} elsewhere and let {HOME} name it."
            )
        if major_of(folder / "easydistill") != major:
            raise BackendError(f"What {SOURCE} has at {TAGS[major]} is no EasyDistill {major}.x.")


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return shortened(lines[-1]) if lines else f"git said nothing; see {store.shown(log)}"


def _log(major: int) -> Path:
    return store.ROOT / "runs" / f"easydistill-{major}.log"


def _own_environment(major: int) -> Path:
    return store.ROOT / FOLDER / f"env-{major}"


def _recipe(checkout: Path, major: int, extras: list[str] | None = None) -> Recipe:
    """The environment for a checkout, which is put on its path as it is. 1.x shares the kernel's torch; 2.x needs nothing of the kernel.

    extras  names of EXTRAS; None: those that it was made with
    """
    extras = _extras(major) if extras is None else extras
    requirements = [*REQUIREMENTS, *(EXTRAS[name] for name in extras)] if major == 1 else _required_by(checkout)
    alone = "vllm" in extras
    kernel = environment.kernel_folders() if major == 1 and not alone else []
    return Recipe(
        name=f"EasyDistill {major}.x",
        folder=_own_environment(major),
        log=_log(major),
        setup=setup_call(major),
        requirements=requirements,
        constraints=[],
        shown=[str(checkout), *kernel],
        facts={"checkout": str(checkout), "requirements": requirements, "extras": extras, **environment.kernel_facts(shared=bool(kernel))},
        python=_python_with_vllm() if alone else sys.executable,
        own_torch=alone,
    )


def _extras(major: int) -> list[str]:
    """The extras that the lab's own environment was made with."""
    return _sealed(major).get("extras", [])


def _sealed(major: int) -> dict:
    """What the lab's own environment says of how it was made; empty where none can be read, for `is_complete` to say so."""
    try:
        sealed = store.read_json(_own_environment(major) / environment.SEALED)
    except DataError:
        return {}
    return sealed if isinstance(sealed, dict) else {}


def _python_with_vllm() -> str:
    """An interpreter that 1.0's vLLM has a build for: the running one, or another on PATH."""
    if sys.version_info[:2] in VLLM_PYTHONS:
        return sys.executable
    found = next((path for major, minor in VLLM_PYTHONS if (path := shutil.which(f"python{major}.{minor}"))), None)
    if found is None:
        raise BackendError("vLLM 0.8.5 has no build for this Python, and none of 3.12, 3.11 and 3.10 is on PATH. Install one of them.")
    return found


def _required_by(checkout: Path) -> list[str]:
    """The packages that a checkout's pyproject.toml asks for."""
    try:
        return list(tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"])
    except (OSError, KeyError, ValueError) as error:
        raise BackendError(f"{store.shown(checkout)} has no pyproject.toml that says what it needs: {shortened(error)}.") from error


def _prove(python: Path, recipe: Recipe, major: int, update) -> None:
    """Raise BackendError unless a new environment loads what EasyDistill loads, and holds no torch of its own where the kernel has one."""
    environment.run([str(python), "-I", *PROOFS[major]], recipe, lambda *step, **said: update(*step))
    if major == 1 and not recipe.own_torch and environment.installed("torch") and environment.holds(recipe.folder, "torch"):
        raise environment.failure(recipe, "it holds a torch of its own, in place of this Python's")
    _ask(python, major, FOLDER)
