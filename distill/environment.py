"""Which interpreter trains; and how one is made that can, beside a kernel whose own packages stay as they are.

Where the running Python has what requirements.txt asks, it trains itself. Elsewhere (on Colab) the engine lives in `.train-env`: it sees
the kernel's packages behind its own, so that the kernel's torch serves both, and adds the pinned rest.
`python -m distill.environment` tells as JSON what an interpreter brings.
"""

import json
import platform
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from . import store
from .console import progress, say
from .errors import BackendError, shortened

PROJECT = Path(__file__).resolve().parent.parent  # not store.ROOT, which a test may set elsewhere
REQUIREMENTS = PROJECT / "requirements.txt"
CONSTRAINTS = PROJECT / "constraints.txt"
ENGINE = PROJECT / ".train-env"
SEALED = "engine.json"  # written last: an environment without it, or made for something else, is made anew
LOG = PROJECT / "runs" / "train-env.log"
LOG_TAIL_LINES = 20
SETUP = "import distill_app; distill_app.setup_engine()"


def engine_python() -> tuple[str, str]:
    """The interpreter that trains, and why that one. Loads no package.

    Raises BackendError, naming `distill_app.setup_engine()`, where neither this Python nor `.train-env` can.
    """
    lacking = lacking_packages()
    if not lacking:
        return sys.executable, "this Python has all that the engine needs"
    if _is_complete():
        return str(_python()), f"this Python lacks {_listed(lacking)}"
    raise BackendError(
        f"This Python cannot train: it lacks {_listed(lacking)}. Run `{SETUP}`, which makes the engine an environment of its own "
        f"({store.shown(ENGINE)}) and leaves this one as it is; or install requirements.txt here."
    )


def setup_engine() -> str:
    """Make sure that an interpreter is there which can train; returns its path. Nothing is done where there is one.

    Otherwise makes `.train-env`, which takes a few minutes and a network; the running Python's packages stay as they are.
    Raises BackendError with the end of the log; an environment that was not finished is made anew the next time.
    """
    with store.lock(ENGINE):
        if lacking_packages() and not _is_complete():
            _make()
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


def _python(folder: Path | None = None) -> Path:
    return (folder or ENGINE) / "bin" / "python"


def _is_complete() -> bool:
    return store.is_file(ENGINE / SEALED) and _python().exists() and store.read_json(ENGINE / SEALED) == _facts()


def _facts() -> dict:
    """What an environment is made for: when any of it changes, it is made anew."""
    return {
        "requirements_sha256": store.hash_file(REQUIREMENTS),
        "constraints_sha256": store.hash_file(CONSTRAINTS),
        "python": platform.python_version(),
        "kernel": kernel_folders(),
        "kernel_torch": installed("torch"),
    }


def kernel_folders() -> list[str]:
    """The folders of this Python's packages, in the order in which it looks into them."""
    return [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages") and Path(path).is_dir()]


# Making it


def _make() -> None:
    """Environment → the kernel's packages behind its own → the pinned rest → proof → seal."""
    _refuse_old_torch()
    installer = _installer()
    say(f"Making {store.shown(ENGINE)} for the engine: once, a few minutes; this Python's packages stay as they are")
    if ENGINE.exists():  # not made to its end, or for another Python
        shutil.rmtree(ENGINE)
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_text("", encoding="utf-8")
    with progress("Engine's environment") as update, TemporaryDirectory() as folder:
        _run([sys.executable, "-m", "venv", "--without-pip", str(ENGINE)], update)
        _show_kernel_packages()
        _run([*installer, "-r", str(REQUIREMENTS), *_pins(Path(folder), with_uv="uv" in Path(installer[0]).name)], update)
        update(1, total=1, note="trying it")
        _prove(probe(_python()))
    store.write_json(ENGINE / SEALED, _facts())


def _refuse_old_torch() -> None:
    old = [problem for problem in lacking_packages() if problem.startswith("torch>")]
    if old and installed("torch"):
        raise BackendError(
            f"This Python has torch {installed('torch')}, and the engine needs {old[0]}. Update torch here; the lab never does."
        )


def _installer() -> list[str]:
    """The command that installs into `.train-env`, up to what is to be installed."""
    if uv := shutil.which("uv"):
        return [uv, "pip", "install", "--python", str(_python())]
    if find_spec("pip"):
        return [sys.executable, "-m", "pip", "--python", str(_python()), "install", "--disable-pip-version-check", "--progress-bar", "off"]
    raise BackendError("Neither uv nor pip is there to make the engine's environment with. Install one of them: python -m ensurepip")


def _show_kernel_packages() -> None:
    # a .pth file, since --system-site-packages would show the Python under a virtual environment and not the environment itself
    (packages,) = (ENGINE / "lib").glob("python*/site-packages")
    (packages / "kernel.pth").write_text("".join(f"{folder}\n" for folder in kernel_folders()), encoding="utf-8")


def _pins(folder: Path, with_uv: bool) -> list[str]:
    """Options that ask for the pinned versions, and keep the kernel's torch where it has one.

    pip sees the kernel's packages and is told to want exactly that torch; uv looks at an environment's own alone, and leaves it out.
    """
    torch, lines = installed("torch"), CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    if torch is None:
        return ["-c", str(CONSTRAINTS)]
    pins, without = folder / "constraints.txt", folder / "overrides.txt"
    others = [line for line in lines if not line.startswith("torch==")]
    pins.write_text("\n".join(others + ([] if with_uv else [f"torch=={torch}"])) + "\n", encoding="utf-8")
    without.write_text("torch; python_version < '3'\n", encoding="utf-8")
    return ["-c", str(pins), *(["--override", str(without)] if with_uv else [])]


def _run(command: list[str], update) -> None:
    """Run one step to its end, its output to the log and its latest line to the progress line. Raises BackendError with the log's end."""
    with open(LOG, "a", encoding="utf-8") as log:
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        child = subprocess.Popen(command, encoding="utf-8", errors="replace", **pipes)
        try:
            for number, line in enumerate(child.stdout, start=1):
                log.write(line)
                log.flush()
                update(number, note=shortened(line, 60))
            status = child.wait()
        finally:
            child.kill()
            child.stdout.close()
    if status:
        raise _failure(f"exit status {status}")


def _failure(what: str) -> BackendError:
    tail = [line for line in LOG.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()][-LOG_TAIL_LINES:]
    message = (
        f"The engine's environment could not be made: {what}. It needs a network that reaches the package index, and free disk; "
        f"then run `{SETUP}` again. The end of {store.shown(LOG)}:"
    )
    return BackendError("\n".join([message, *[f"  | {shortened(line, 300)}" for line in tail]]))


def _prove(found: dict) -> None:
    """Raise BackendError unless the new environment has all that it should, and the kernel's own torch."""
    ours = installed("torch")
    if found["lacking"]:
        raise _failure(f"it still lacks {_listed(found['lacking'])}")
    if ours is not None and (found["torch"] != ours or Path(found["torch_folder"]).is_relative_to(ENGINE)):
        raise _failure(f"it holds torch {found['torch']} of its own, in place of this Python's {ours}")


# What an interpreter brings


def probe(python: str | Path) -> dict:
    """What an interpreter brings, asked in a process of its own, so that this one loads no torch and holds no GPU memory.

    Returns {"python", "torch", "torch_folder", "versions": {package: version}, "lacking", "gpu": {"name", "gib", "capability"} or None}.
    Raises BackendError where its packages do not load.
    """
    done = subprocess.run([str(python), "-m", "distill.environment"], cwd=PROJECT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        tail = "\n".join(f"  | {line}" for line in done.stderr.splitlines()[-LOG_TAIL_LINES:])
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
        gpu = {"name": facts.name, "gib": round(facts.total_memory / 2**30, 1), "capability": f"{facts.major}.{facts.minor}"}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, trl)} | {"datasets": version("datasets")}
    found = {"python": platform.python_version(), "torch": version("torch"), "torch_folder": str(Path(torch.__file__).parent)}
    print(json.dumps({**found, "versions": versions, "lacking": lacking_packages(), "gpu": gpu}))


if __name__ == "__main__":
    main()
