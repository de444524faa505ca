"""What is finished need not be done again: a stage is known by the content of all that decides it, never by a file that is there.

A *stage* is one step of the workflow with its settings, the content of what it reads, and the lab's code that does it. The manifests of its
outputs hold that beside the checksums of the files. It is finished where every file is as recorded and the record is of this very stage;
else the lab says in words what is missing or changed, and does it anew.
"""

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from . import store
from .console import say
from .errors import DataError, shortened

# The modules that decide what a stage makes; a change in them is a change of the stage. A test holds the lists complete.
_READING = ("sources.py", "hub_rows.py", "preparation.py", "prompt.py", "store.py")
ANSWERING = ("answers.py", "generation.py", "models.py", "prompt.py")
ASKING = ("asking.py", "endpoint.py")
LABELLING = ("label.py", *ASKING, *ANSWERING)
PREPARING = {
    "system1": ("data.py", *_READING),
    "system2": ("traces.py", "selection.py", "omnithought.py", *_READING),
    "traces": ("own_traces.py", "traces.py", "selection.py", "omnithought.py", *_READING),
}
TOKENIZING = ("data.py", "prompt.py", "store.py")
UNKNOWN = None  # the content of an input that cannot be asked for now


@lru_cache  # of the modules as they are run, whatever is done to the files meanwhile
def code(*modules: str) -> str:
    """SHA-256 (hex) of the source of some of the lab's modules."""
    return store.hash_json({name: store.hash_file(Path(__file__).with_name(name)) for name in sorted(set(modules))})


@dataclass(frozen=True)
class Stage:
    """One step of the workflow and all that decides what it makes.

    name      as the lab calls it, e.g. "System 1's data"
    settings  name → JSON value
    inputs    what is read, by the name that a message gives it → hash of its content; UNKNOWN where that cannot be had now
    code      `code` of the modules that do it
    """

    name: str
    settings: dict
    inputs: dict
    code: str

    @property
    def key(self) -> str:
        """SHA-256 (hex) of everything that decides the stage."""
        return store.hash_json([self.name, self.settings, self.inputs, self.code])

    def record(self, incomplete: str = "") -> dict:
        """The entry "stage" of an output's manifest.

        incomplete  why the output, whole as it is, is not to be taken for finished, e.g. "3 rows had no answer"
        """
        facts = {"name": self.name, "key": self.key, "settings": self.settings, "inputs": self.inputs, "code": self.code}
        return facts | ({"incomplete": incomplete} if incomplete else {})


def finished(stage: Stage, *outputs: Path) -> tuple[dict | None, str]:
    """The manifest of the first output where a stage's outputs stand whole; else None, and why in words.

    Where the content of an input is UNKNOWN, a finished stage that is the same in all else counts, and the words say what is not known.
    """
    manifests = []
    for output in outputs:
        try:
            manifest = store.read_manifest(output)
        except DataError as error:
            return None, str(error).rstrip(".")
        if manifest is None:
            return None, f"{store.shown(output)} was not finished" if output.exists() else ""
        if reason := _difference(manifest.get("stage"), stage):
            return None, reason
        manifests.append(manifest)
    unknown = [name for name, content in stage.inputs.items() if content is UNKNOWN]
    return manifests[0], f"whether {' and '.join(unknown)} changed since cannot be known now" if unknown else ""


def reuse(stage: Stage, *outputs: Path, fresh: bool = False) -> dict | None:
    """`finished` with what it found said in one line; None where the stage is to be done.

    fresh  do it anew whatever stands there
    """
    manifest, reason = (None, "that is asked for") if fresh else finished(stage, *outputs)
    if manifest:
        but = f"; {reason}" if reason else ""
        say(f"{stage.name}: done before, nothing has changed ({store.shown(outputs[0])}){but}")
    elif reason:
        say(f"{stage.name}: made anew, since {reason}")
    return manifest


def _difference(recorded, stage: Stage) -> str:
    """How a recorded stage differs from this one, in words; empty where it does not."""
    now = json.loads(json.dumps(stage.record()))  # as it is read back
    if not isinstance(recorded, dict) or not recorded.keys() >= now.keys():
        return "what stands there does not say how it was made"
    if recorded["name"] != now["name"]:
        return f"{recorded['name']} stands there"
    differences = changes(recorded["settings"], now["settings"]) + _inputs_changed(recorded["inputs"], now["inputs"])
    if recorded["code"] != now["code"]:
        differences.append("the lab's code for it changed")
    return " and ".join(differences) or recorded.get("incomplete", "")


def _inputs_changed(before: dict, now: dict) -> list[str]:
    changed = [name for name in now if name not in before or now[name] not in (UNKNOWN, before[name])]
    return [f"{name} changed" for name in changed] + [f"{name} is read no more" for name in before if name not in now]


def changes(before: dict, now: dict) -> list[str]:
    """How settings differ, a sentence's part each: \"rv_max was 9 and is 5\"."""
    return [
        f"{name} was {_in_words(before.get(name))} and is {_in_words(now.get(name))}"
        for name in {**now, **before}
        if store.hash_json(before.get(name)) != store.hash_json(now.get(name))  # to Python, True equals 1
    ]


def _in_words(value) -> str:
    return "not set" if value is None else shortened(value if isinstance(value, str) else json.dumps(value), 80)
