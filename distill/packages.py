"""What is installed in an environment, by the installer's own records, and what of it was lost since. Standard library alone.

An installer writes down every file with its size, in `<package>.dist-info/RECORD` (PyPA's "Recording installed projects").
"""

import csv
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

RECORD = "RECORD"


def python_of(environment: Path) -> Path:
    """An environment's interpreter."""
    return environment / "bin" / "python"


def folder_of(environment: Path) -> Path:
    """The folder of an environment's own packages."""
    (packages,) = (environment / "lib").glob("python*/site-packages")
    return packages


def listed(environment: Path) -> list[str]:
    """What is installed, as "<package>-<version>.dist-info", in order."""
    return sorted(found.name for found in folder_of(environment).glob("*.dist-info"))


def damage(environment: Path, installed: Iterable[str]) -> str | None:
    """What an environment has lost, in words; None where its interpreter runs and every file has the size that was written down.

    installed  what `listed` gave when the environment was made
    """
    try:
        subprocess.run([python_of(environment), "-I", "-c", ""], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.CalledProcessError):
        return "its Python does not run"
    try:
        return _lost(folder_of(environment), installed)
    except (OSError, ValueError, csv.Error):
        return "its records cannot be read"


def _lost(packages: Path, installed: Iterable[str]) -> str | None:
    if gone := [name for name in installed if not (packages / name / RECORD).is_file()]:
        return f"{gone[0].removesuffix('.dist-info')} is gone"
    return next((f"{name} is not as it was installed" for name, size in _recorded(packages) if _size(packages / name) != size), None)


def _recorded(packages: Path) -> Iterator[tuple[str, int]]:
    """(file, bytes) of all that was installed; files without a size, which may change, left out."""
    for record in sorted(packages.glob(f"*.dist-info/{RECORD}")):
        with open(record, encoding="utf-8", newline="") as file:
            yield from ((name, int(size)) for name, _, size in csv.reader(file) if size)


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
