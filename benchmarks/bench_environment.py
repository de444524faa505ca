"""How long the engine's environment takes, whether the kernel stays as it was, and whether the pins resolve for every Python of the lab.

    python benchmarks/bench_environment.py [--work FOLDER] [--resolve]

Makes a kernel that has torch and what `import distill_app` needs, by links into this Python's packages, and nothing else: the worst case,
in which all that training needs is installed. In a copy of the working tree it runs `distill_app.setup_engine()`, once from nothing, once
where all is there, once after a file was lost. `--resolve` asks pip instead, for each of PYTHONS, what it would install.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from importlib.metadata import distribution
from pathlib import Path
from tempfile import TemporaryDirectory

from colab_like import ROOT, make_repository

KERNEL_HAS = ("torch", "rich", "filelock", "packaging", "pip")
SETUP = "import distill_app; distill_app.setup_engine()"
PYTHONS = ("3.11.0", "3.12", "3.13")


def main() -> None:
    """Run the command line; exit status 0 only where all was made and the kernel's packages are as they were."""
    parser = argparse.ArgumentParser(description="Time the engine's environment.")
    parser.add_argument("--work", type=Path, help="an empty folder to work in (default: a temporary one)")
    parser.add_argument("--resolve", action="store_true", help="ask pip what it would install under each Python; needs the package index")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        sys.exit(resolve(work) if options.resolve else time_setup(work))


def time_setup(work: Path) -> int:
    """Time three set-ups; 1 where one fails or the kernel is not as it was."""
    kernel, project = make_kernel(work / "kernel"), make_repository(work / "lab")
    before = package_files(kernel)
    for what, damage in (("from nothing", None), ("all there", None), ("a file lost", lose_a_file)):
        if damage:
            damage(project / ".train-env")
        started = time.monotonic()
        done = subprocess.run([kernel, "-c", SETUP], cwd=project, stdin=subprocess.DEVNULL)
        print(f"{what}: {time.monotonic() - started:.0f} s, exit status {done.returncode}", flush=True)
        if done.returncode:
            return 1
    made = [file for file in (project / ".train-env").rglob("*") if file.is_file() and not file.is_symlink()]
    packages = json.loads((project / ".train-env" / "engine.json").read_text())["packages"]
    print(f"{len(packages)} packages, {sum(file.stat().st_size for file in made) / 2**20:,.0f} MiB")
    changed = package_files(kernel) != before
    print(f"kernel's packages: {len(before):,} files, {'CHANGED' if changed else 'the same'}")
    return int(changed)


def package_files(python: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file of an environment's packages, behind links too, bytecode aside."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    walked = os.walk(packages, followlinks=True)
    files = [Path(folder) / name for folder, _, names in walked for name in names if not name.endswith(".pyc")]
    return {str(file): (file.stat().st_size, file.stat().st_mtime_ns) for file in files}


def lose_a_file(environment: Path) -> None:
    next(environment.glob("lib/python*/site-packages/trl/__init__.py")).unlink()


def make_kernel(folder: Path) -> Path:
    """An environment of KERNEL_HAS and what these require, as links; returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for name in required(KERNEL_HAS):
        own = distribution(name)
        for top in {file.parts[0] for file in own.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (packages / top).exists():
                (packages / top).symlink_to(own.locate_file(top))
    return folder / "bin" / "python"


def required(names: tuple[str, ...]) -> set[str]:
    """Packages and all that they require here, whatever extras say."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        lines = [line for line in distribution(name).requires or [] if "extra ==" not in line]
        asked = [re.match(r"[\w.-]+", line)[0] for line in lines]
        waiting += [one for one in asked if is_here(one)]
    return found


def is_here(name: str) -> bool:
    from importlib.metadata import PackageNotFoundError

    try:
        return bool(distribution(name))
    except PackageNotFoundError:
        return False


def resolve(work: Path) -> int:
    """What pip would install under each Python, wheels alone; 1 where one does not resolve."""
    failed = 0
    for python in PYTHONS:
        report = work / f"{python}.json"
        options = ["--dry-run", "--ignore-installed", "--quiet", "--report", report, "--only-binary=:all:", "--target", work / "target"]
        files = ["-r", "requirements.txt", "-r", "requirements-dev.txt", "-c", "constraints.txt"]
        command = [sys.executable, "-m", "pip", "install", *options, "--python-version", python, *files]
        done = subprocess.run(command, cwd=ROOT)
        failed += done.returncode != 0
        count = len(json.loads(report.read_text())["install"]) if not done.returncode else 0
        print(f"Python {python}: {f'{count} packages, all wheels' if count else 'does not resolve'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    main()
