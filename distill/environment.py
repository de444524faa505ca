"""Which interpreter trains; and how one is made that can, beside a kernel whose own packages stay as they are.

Where the running Python has what requirements.txt asks, it trains itself. Elsewhere (on Colab) the engine lives in `.train-env`: it sees
the kernel's packages behind its own, so that the kernel's torch serves both, and adds the pinned rest. EasyDistill's environments are made
by the same steps (`Recipe`, `make`). `python -m distill.environment` tells as JSON what an interpreter brings.
"""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

from . import packages, process, store
from .console import progress, say
from .errors import BackendError, DataError, shortened, without_secrets
from .packages import python_of

PROJECT = Path(__file__).resolve().parent.parent  # not store.ROOT, which a test may set elsewhere
REQUIREMENTS = PROJECT / "requirements.txt"
CONSTRAINTS = PROJECT / "constraints.txt"
ENGINE = PROJECT / ".train-env"
SEALED = "engine.json"  # written last: an environment without it, or made for something else, is made anew
PACKAGES = "packages"  # in the seal: what was installed, so that what is lost later is missed
LOG = PROJECT / "runs" / "train-env.log"
OPTIONAL = ("vllm", "fastapi", "uvicorn", "openai", "pydantic")  # what serves a model over an API
SETUP = "import distill_app; distill_app.setup_engine()"


def engine_python() -> tuple[str, str]:
    """The interpreter that trains, and why that one. Loads no package.

    Raises BackendError, naming `distill_app.setup_engine()`, where neither this Python nor `.train-env` can.
    """
    lacking = lacking_packages()
    if not lacking:
        return sys.executable, "this Python has all that the engine needs"
    if is_complete(_recipe()):
        return str(python_of(ENGINE)), f"this Python lacks {_listed(lacking)}"
    raise BackendError(
        f"This Python cannot train: it lacks {_listed(lacking)}. Run `{SETUP}`, which makes the engine an environment of its own "
        f"({store.shown(ENGINE)}) and leaves this one as it is; or install requirements.txt here."
    )


def setup_engine() -> str:
    """Make sure that an interpreter is there which can train; returns its path. Nothing is done where there is one.

    Otherwise makes `.train-env`, which takes a few minutes and a network; the running Python's packages stay as they are.
    Raises BackendError with the end of the log; an environment that was not finished, or is damaged, is made anew.
    """
    with store.lock(ENGINE):
        if lacking_packages() and (why := _why_made_anew(_recipe())):
            _refuse_old_torch()
            say(f"{store.shown(ENGINE)} {why}")
            make(_recipe(), lambda python, update: _prove(probe(python)))
    path, reason = engine_python()
    say(f"engine: {path} ({reason})")
    return path


def lacking_packages(requirements: str | None = None) -> list[str]:
    """What requirements.txt asks and this Python does not have, in words; empty where it has all.

    requirements  the file's text, where another is meant
    """
    if find_spec("packaging") is None:
        return ["packaging (not installed)"]
    from packaging.requirements import Requirement

    lines = (REQUIREMENTS.read_text(encoding="utf-8") if requirements is None else requirements).splitlines()
    asked = [Requirement(line.split("#")[0]) for line in lines if line.split("#")[0].strip()]
    found = [(one, installed(one.name)) for one in asked if one.marker is None or one.marker.evaluate()]
    return [
        f"{one.name}{one.specifier} ({here or 'not installed'})"
        for one, here in found
        if here is None or not one.specifier.contains(here, prereleases=True)
    ]


def installed(package: str) -> str | None:
    """A package's version in this Python, by its metadata; None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _listed(lacking: list[str]) -> str:
    return ", ".join(lacking[:4]) + (f" and {len(lacking) - 4} more" if len(lacking) > 4 else "")


def _recipe() -> "Recipe":
    """The engine's environment."""
    facts = {"requirements_sha256": store.hash_file(REQUIREMENTS), "constraints_sha256": store.hash_file(CONSTRAINTS)}
    return Recipe(
        name="The engine",
        folder=ENGINE,
        log=LOG,
        setup=SETUP,
        requirements=REQUIREMENTS.read_text(encoding="utf-8").splitlines(),
        constraints=CONSTRAINTS.read_text(encoding="utf-8").splitlines(),
        shown=kernel_folders(),
        facts={**facts, **kernel_facts()},
    )


def _refuse_old_torch() -> None:
    old = [problem for problem in lacking_packages() if problem.startswith("torch>")]
    if old and installed("torch"):
        raise BackendError(
            f"This Python has torch {installed('torch')}, and the engine needs {old[0]}. Update torch here; the lab never does."
        )


def _prove(found: dict) -> None:
    """Raise BackendError unless the new environment has all that it should, and the kernel's own torch."""
    ours = installed("torch")
    if found["lacking"]:
        raise failure(_recipe(), f"it still lacks {_listed(found['lacking'])}")
    if ours is not None and (found["torch"] != ours or Path(found["torch_folder"]).is_relative_to(ENGINE)):
        raise failure(_recipe(), f"it holds torch {found['torch']} of its own, in place of this Python's {ours}")


# Making an environment


@dataclass(frozen=True)
class Recipe:
    """An environment beside the kernel's own.

    name          what messages call it, at the beginning of a sentence
    folder        where it stands
    log           the file that gets what its making prints
    setup         the call that makes it
    requirements  what is installed, a line each, as pip reads them
    constraints   the versions to keep to, a line each, as pip reads them
    shown         folders whose packages it sees behind its own, in this order
    facts         what it is made for: when any of it changes, it is made anew
    python        the interpreter that it is made with
    own_torch     whether it gets a torch of its own, whatever the running Python has
    """

    name: str
    folder: Path
    log: Path
    setup: str
    requirements: list[str]
    constraints: list[str]
    shown: list[str]
    facts: dict
    python: str = sys.executable
    own_torch: bool = False


def kernel_folders() -> list[str]:
    """The folders of this Python's packages, in the order in which it looks into them."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


def kernel_facts(shared: bool = True) -> dict:
    """What an environment depends on in the running Python; its packages only where they are shared."""
    kernel = {"kernel": kernel_folders(), "kernel_torch": installed("torch")} if shared else {}
    return {"python": platform.python_version(), **kernel}


def is_complete(recipe: Recipe) -> bool:
    """Whether an environment stands that was made to its end, for what is asked now."""
    try:
        sealed = store.read_json(recipe.folder / SEALED)
    except DataError:
        return False
    if not isinstance(sealed, dict):
        return False
    return python_of(recipe.folder).exists() and {name: sealed.get(name) for name in recipe.facts} == recipe.facts


def _why_made_anew(recipe: Recipe) -> str | None:
    """Why an environment has to be made, in words; None where a whole one stands."""
    if not recipe.folder.exists():
        return "is not here yet"
    if not is_complete(recipe):
        return "was made for another Python, torch or list of packages, or not to its end, and is made anew"
    lost = packages.damage(recipe.folder, store.read_json(recipe.folder / SEALED).get(PACKAGES, []))
    return lost and f"is damaged ({lost}), and is made anew"


def make(recipe: Recipe, prove: Callable[[Path, Callable], None]) -> None:
    """Environment → the packages behind its own → what it needs → proof → seal.

    prove  called with the new interpreter and the progress line's update; raises what `failure` gives where the environment is no good
    Raises BackendError with the end of the log; then nothing half-made stays.
    """
    installer = _installer(recipe.folder)
    say(f"Making {store.shown(recipe.folder)}: once, a few minutes; this Python's packages stay as they are")
    try:
        _put_aside(recipe)  # one that works still, for something else, comes back where this one fails
        recipe.log.parent.mkdir(parents=True, exist_ok=True)
        recipe.log.write_text("", encoding="utf-8")
        with progress(f"{recipe.name}'s environment") as update, TemporaryDirectory() as folder:
            run([recipe.python, "-m", "venv", "--without-pip", str(recipe.folder)], recipe, update)
            _show_packages(recipe)
            run([*installer, *_options(recipe, Path(folder), with_uv="uv" in Path(installer[0]).name)], recipe, update)
            update(1, total=1, note="trying it")
            prove(python_of(recipe.folder), update)
        store.write_json(recipe.folder / SEALED, {**recipe.facts, PACKAGES: packages.listed(recipe.folder)})
        shutil.rmtree(_aside(recipe), ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(recipe.folder, ignore_errors=True)
        if _aside(recipe).exists():
            _aside(recipe).rename(recipe.folder)
        if isinstance(error, OSError):
            raise failure(recipe, shortened(error)) from error
        raise


def _put_aside(recipe: Recipe) -> None:
    shutil.rmtree(_aside(recipe), ignore_errors=True)
    if (recipe.folder / SEALED).is_file():
        recipe.folder.rename(_aside(recipe))
    elif recipe.folder.exists():  # not made to its end
        shutil.rmtree(recipe.folder)


def _aside(recipe: Recipe) -> Path:
    return recipe.folder.with_name(f"{recipe.folder.name}.previous")


def _installer(folder: Path) -> list[str]:
    """The command that installs into an environment, up to what is to be installed."""
    python = str(python_of(folder))
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", python]
    if pip := _with_pip():
        return [pip, "-m", "pip", "--python", python, "install", "--disable-pip-version-check", "--progress-bar", "off"]
    raise BackendError(f"Neither uv nor pip is there to make an environment with. Install one of them: {sys.executable} -m ensurepip")


def _with_pip() -> str | None:
    """An interpreter that has pip: this one, or the one that its environment was made with, as `make` leaves pip out of `.venv`."""
    if find_spec("pip"):
        return sys.executable
    base = sys._base_executable
    asked = subprocess.run([base, "-m", "pip", "--version"], capture_output=True, stdin=subprocess.DEVNULL)
    return base if asked.returncode == 0 else None


def _show_packages(recipe: Recipe) -> None:
    # a .pth file, since --system-site-packages would show the Python under a virtual environment and not the environment itself
    if broken := [folder for folder in recipe.shown if "\n" in folder or "\r" in folder]:
        raise failure(recipe, f"{shortened(repr(broken[0]))} has a line break in its name; rename it")  # Python would run what follows it
    (packages.folder_of(recipe.folder) / "kernel.pth").write_text("".join(f"{folder}\n" for folder in recipe.shown), encoding="utf-8")


def _options(recipe: Recipe, folder: Path, with_uv: bool) -> list[str]:
    """Options that ask for what a recipe needs in its versions, and keep the kernel's torch where it has one.

    pip sees the kernel's packages and is told to want exactly that torch; uv looks at an environment's own alone, and leaves it out.
    """
    torch, pins = None if recipe.own_torch else installed("torch"), recipe.constraints
    if torch:
        pins = [line for line in pins if not line.startswith("torch==")] + ([] if with_uv else [f"torch=={torch}"])
    files = {"requirements": recipe.requirements, "constraints": pins, "overrides": ["torch; python_version < '3'"]}
    for name, lines in files.items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    without_torch = ["--override", str(folder / "overrides.txt")] if with_uv and torch else []
    return ["-r", str(folder / "requirements.txt"), "-c", str(folder / "constraints.txt"), *without_torch]


def run(command: list[str], recipe: Recipe, update: Callable) -> None:
    """Run one step to its end, its output to the log and its latest line to the progress line. Raises BackendError with the log's end."""
    heard = count(1)
    ended = process.run(command, recipe.log, lambda line: update(next(heard), note=shortened(line, 60)), append=True, clean=without_secrets)
    if ended.status:
        raise failure(recipe, process.how_it_ended(ended.status))


def failure(recipe: Recipe, what: str) -> BackendError:
    """The error for an environment that could not be made, with the end of the log."""
    message = (
        f"{recipe.name}'s environment could not be made: {what}. It needs a network that reaches the package index, and free disk; "
        f"then run `{recipe.setup}` again. The end of {store.shown(recipe.log)}:"
    )
    return BackendError("\n".join([message, *process.tail(recipe.log)]))


def holds(folder: Path, package: str) -> bool:
    """Whether an environment has a package of its own."""
    return any((folder / "lib").glob(f"python*/site-packages/{package}"))


# What an interpreter brings


def probe(python: str | Path) -> dict:
    """What an interpreter brings, asked in a process of its own, so that this one loads no torch and holds no GPU memory.

    Returns {"python", "torch", "torch_folder", "versions": {package: version}, "optional": {package: version or None}, "lacking",
    "gpu": {"name", "gib", "free_gib", "capability"} or None}.
    Raises BackendError where its packages do not load.
    """
    done = subprocess.run([str(python), "-m", "distill.environment"], cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        tail = "\n".join(f"  | {line}" for line in done.stderr.splitlines()[-process.LOG_TAIL_LINES :])
        raise BackendError(f"The engine's packages do not load in {python}. Remove {store.shown(ENGINE)} and run `{SETUP}`.\n{tail}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print what this interpreter brings, as one line of JSON; raises where the engine's packages do not load."""
    import torch
    import transformers
    import trl

    gpu = None
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        memory = {"gib": facts.total_memory, "free_gib": torch.cuda.mem_get_info()[0]}
        sizes = {name: round(size / 2**30, 1) for name, size in memory.items()}
        gpu = {"name": facts.name, **sizes, "capability": f"{facts.major}.{facts.minor}"}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)} | {"datasets": version("datasets")}
    found = {"python": platform.python_version(), "torch": version("torch"), "torch_folder": str(Path(torch.__file__).parent)}
    optional = {name: installed(name) for name in OPTIONAL}
    print(json.dumps({**found, "versions": versions, "optional": optional, "lacking": lacking_packages(), "gpu": gpu}))


if __name__ == "__main__":
    main()
