"""The hub's cache of models, for a disk that has no links: what links say as JSON, and the links made anew of it.

The cache holds a model as `models--owner--name/{blobs/<hash>, refs/main, snapshots/<commit>/<file> → ../../blobs/<hash>}`; the commit
that a name stands for is the text of `refs/main` (huggingface_hub, "Understand caching").
"""

import os
import re
from pathlib import Path

from . import store
from .errors import DataError, shortened

PART = r"[^/.][^/]*"
_COMMIT = re.compile(r"[0-9a-f]{40}")


def is_plain(name) -> bool:
    """Whether a name stays below the folder that it counts from: no `..`, nothing hidden, absolute or unprintable in it."""
    return isinstance(name, str) and name.isprintable() and "\\" not in name and re.fullmatch(rf"{PART}(/{PART})*", name) is not None


def models_of_jobs(project: Path) -> set[str]:
    """The folders of the hub's cache that the project's jobs name: Qwen/Qwen2.5-0.5B → models--Qwen--Qwen2.5-0.5B."""
    named = [name for path in project.glob("runs/*/job.json") for name in _models_of(path)]
    return {f"models--{name.replace('/', '--')}" for name in named if isinstance(name, str) and not name.startswith("/")}


def _models_of(path: Path) -> list:
    try:
        job = store.read_json(path)
    except DataError:  # whoever runs that job says so; it names no model
        return []
    models = job.get("models") if isinstance(job, dict) else None
    return list(models.values()) if isinstance(models, dict) else []


def models_in(hub: Path) -> set[str]:
    """The folders of models in the hub's cache."""
    return {folder.name for folder in hub.glob("models--*") if folder.is_dir()}


def leaves(folder: Path) -> list[Path]:
    """The files and links below a folder, to any depth."""
    return [path for path in folder.rglob("*") if path.is_symlink() or path.is_file()]


def read_links(model: Path) -> dict:
    """The links of a model in the hub's cache as JSON, for a disk that has none: {"refs": {name: commit}, "links": {file: blob}}.

    Hidden names (.gitattributes) are left out: no model needs them, and `write_links` makes none.
    """
    refs = {path.relative_to(model / "refs").as_posix(): path.read_text().strip() for path in leaves(model / "refs") if path.is_file()}
    links = {path.relative_to(model / "snapshots").as_posix(): path for path in leaves(model / "snapshots") if path.is_symlink()}
    inside = {name: path.resolve() for name, path in links.items() if path.resolve().parent == (model / "blobs").resolve()}
    named = {"refs": refs, "links": {name: path.name for name, path in inside.items()}}
    return {key: {name: to for name, to in names.items() if is_plain(name)} for key, names in named.items()}


def write_links(model: Path, kept: dict) -> int:
    """Make what `read_links` read, as far as its blobs are there and nothing stands there yet. Returns how many links are new.

    Raises DataError for names that lead out of the model's folder; then nothing is made.
    """
    refs, links = _checked_links(model, kept)
    made = 0
    for name, blob in links.items():
        place = model / "snapshots" / name
        if (model / "blobs" / blob).is_file() and not place.is_symlink() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(model / "blobs" / blob, place.parent))
            made += 1
    for name, commit in refs.items():
        if not (model / "refs" / name).exists():
            with store.atomic_file(model / "refs" / name) as file:
                file.write(commit)
    return made


def _checked_links(model: Path, kept) -> tuple[dict, dict]:
    refs, links = (kept.get(key) if isinstance(kept, dict) else None for key in ("refs", "links"))
    if not (isinstance(refs, dict) and isinstance(links, dict)):
        raise DataError(f"The copy of {model.name} lists no refs and links.")
    wrong = [name for name, commit in refs.items() if not (is_plain(name) and _COMMIT.fullmatch(str(commit)))]
    wrong += [name for name, blob in links.items() if not (is_plain(name) and re.fullmatch(r"[\w-]+", str(blob)))]
    if wrong:
        raise DataError(f"The copy of {model.name} names {shortened(repr(wrong[0]), 80)}, which is no file of a model.")
    return refs, links
