"""What this machine has, what each job would take, and what is missing. Nothing is changed, fetched or installed by looking."""

import os
import platform
import shutil
import sys
from pathlib import Path

from . import config, easydistill, engine, environment, launch, models, notebook, pipeline, store
from .console import say, table
from .errors import DistillError

PRESETS = ("micro_system1", "micro_system2", "system1", "system2")
KEYS = {
    "HF_TOKEN": "private and gated models and data; public ones need none",
    "OPENAI_API_KEY": "a teacher or judge behind an API that asks for a key",
}
MARKS = {True: "yes", False: "no"}


def doctor() -> dict:
    """Print what is here, which backend each job would take and why, and the command that mends what is missing.

    Returns the same as a dict that JSON can hold. What is missing or broken is part of the answer, never an error.
    Of keys and tokens only whether they are set is said. Takes some seconds: the engine's packages are loaded, in a process of their own.
    """
    found = examine()
    _show(found)
    return found


def examine() -> dict:
    """{"python", "machine", "gpu", "environments", "servers", "jobs", "keys", "missing"}: what `doctor` prints."""
    brought, trouble = _engine()
    gpu = brought["gpu"] if brought else None
    installations = {major: easydistill.find(major) for major in easydistill.TAGS}
    absent = {major: (None, f"EasyDistill {major}.x cannot be used") for major, (found, _) in installations.items() if not found}
    found = installations | absent  # the reason stands once, beside the environment
    servers = _servers(brought)
    return {
        "python": {"version": platform.python_version(), "path": sys.executable},
        "machine": _machine(),
        "gpu": gpu,
        "environments": _environments(brought, trouble, installations),
        "servers": servers,
        "jobs": [*_trainings(brought, found[1]), *_others(brought, found[2], servers)],
        "keys": {name: bool(os.environ.get(name)) for name in KEYS},
        "missing": _missing(brought, trouble, installations, servers),
    }


def _engine() -> tuple[dict | None, str]:
    """What the engine's interpreter brings and why that one is taken; or None, and what keeps it from working."""
    try:
        python, reason = environment.engine_python()
        return {**environment.probe(python), "path": python}, reason
    except DistillError as error:
        return None, str(error)


def _machine() -> dict:
    memory = {name: {"used": round(used, 1), "total": round(total, 1)} for name, (used, total) in notebook.memory_gib().items()}
    free_gib = round(shutil.disk_usage(store.ROOT).free / 2**30, 1)
    return {"system": platform.platform(), "usable_cores": engine.usable_cores(), "memory_gib": memory, "disk_free_gib": free_gib}


def _environments(brought: dict | None, trouble: str, installations: dict) -> dict:
    """Name → {"usable", "path", "versions", "note"}."""
    here = {name: version for name in ("torch", "transformers", "trl", "datasets") if (version := environment.installed(name))}
    found = {
        "this Python": {"usable": True, "path": sys.executable, "versions": here, "note": ""},
        "engine": {
            "usable": bool(brought),
            "path": brought and brought["path"],
            "versions": brought["versions"] if brought else {},
            "note": trouble,
        },
    }
    for major, (installation, reason) in installations.items():
        found[f"EasyDistill {major}.x"] = {
            "usable": bool(installation),
            "path": str(installation.python) if installation else None,
            "versions": installation.versions if installation else {},
            "note": reason,
        }
    return found


def _servers(brought: dict | None) -> dict:
    """Name → {"available", "why"}: what can serve a teacher's weights to EasyDistill 2.x."""
    if not brought:
        return dict.fromkeys(("vllm serve", "transformers serve"), {"available": False, "why": "the engine cannot be used"})
    versions, gpu = brought["optional"], brought["gpu"]
    vllm = versions["vllm"] and (f"vllm {versions['vllm']}" if gpu else "no GPU is visible")
    lacking = [name for name, version in versions.items() if name != "vllm" and not version]
    serve = f"it lacks {', '.join(lacking)}" if lacking else f"transformers {brought['versions']['transformers']}"
    return {
        "vllm serve": {"available": bool(versions["vllm"] and gpu), "why": vllm or "vllm is not installed"},
        "transformers serve": {"available": not lacking, "why": serve},
    }


def _job(job: str, backend: str, why: str) -> dict:
    return {"job": job, "backend": backend, "why": why}


def _trainings(brought: dict | None, found: tuple) -> list[dict]:
    if not brought:
        return [_job(f"train by preset {preset}", "none", "the engine cannot be used") for preset in PRESETS]
    return [_job(f"train by preset {preset}", *_training(preset, *found)) for preset in PRESETS]


def _training(preset: str, installation: easydistill.Installation | None, reason: str) -> tuple[str, str]:
    """The backend of a preset's training and why. A student on the hub is not fetched for the sake of looking at it."""
    try:
        settings = config.resolve({}, preset=preset)
        job = config.build_job(settings, Path(settings.values["labeled_path"]))
        on_hub = not store.is_dir(settings.values["student_model"])
        if installation and on_hub and not launch.settings_refusals(job):
            return _named(installation), f"{reason}; unless the run finds against it: memory, precision, the student's files"
        if installation and on_hub:
            return "builtin", pipeline.refused_because(launch.settings_refusals(job))
        chosen, why = pipeline.choose_backend(job, "auto")
    except DistillError as error:
        return "none", str(error)
    return _named(chosen), why


def _named(installation: easydistill.Installation | None) -> str:
    return f"EasyDistill {installation.version}" if installation else "builtin"


def _others(brought: dict | None, found: tuple, servers: dict) -> list[dict]:
    loaded = ("builtin", _where(brought["gpu"])) if brought else ("none", "the engine cannot be used")
    installation, reason = found
    behind = (_named(installation), reason) if installation else ("none", reason)
    return [
        _job("label with a teacher loaded here", *loaded),
        _job("label with a teacher behind an API", *behind),
        _job("label with a teacher that the lab serves", *_served(behind, servers)),
        _job("judge answers", *behind),
        _job("compare and chat", *loaded),
    ]


def _where(gpu: dict | None) -> str:
    return f"on {gpu['name']}" if gpu else "on the CPU, for small models"


def _served(behind: tuple[str, str], servers: dict) -> tuple[str, str]:
    """The backend of what needs EasyDistill 2.x and a server of the lab's own, by the backend of what needs no server."""
    server = next((name for name, one in servers.items() if one["available"]), None)
    if behind[0] == "none":
        return behind
    return (f"{behind[0]} and {server}", servers[server]["why"]) if server else ("none", "there is no server for it")


def _missing(brought: dict | None, trouble: str, installations: dict, servers: dict) -> list[dict]:
    """[{"what", "command"}]: what is not there and how it is had, the needed before the optional."""
    missing = []
    if not brought:
        missing.append({"what": f"the engine: {trouble}", "command": _in_a_shell(environment.SETUP)})
    elif engine.gpu_is_visible() and not brought["gpu"]:
        missing.append({"what": "a torch that can use this machine's GPU", "command": "see pytorch.org for the build of your CUDA driver"})
    for major, (installation, _) in installations.items():
        if not installation:
            missing.append({"what": f"EasyDistill {major}.x (optional)", "command": easydistill.setup_call(major)})
    if brought and not servers["transformers serve"]["available"]:
        command = f"{brought['path']} -m pip install -r requirements.txt"
        missing.append({"what": f"transformers serve (optional): {servers['transformers serve']['why']}", "command": command})
    return missing


def _in_a_shell(call: str) -> str:
    return f'{sys.executable} -c "{call}"'


# Showing it


def _show(found: dict) -> None:
    table("Machine", ["what", "found"], _machine_rows(found), justify="left")
    rows = [[name, MARKS[one["usable"]], _versions(one["versions"]), one["note"]] for name, one in found["environments"].items()]
    table("Environments", ["environment", "usable", "versions", "note"], rows, justify="left")
    rows = [[name, MARKS[server["available"]], server["why"]] for name, server in found["servers"].items()]
    table("Servers for a teacher", ["server", "available", "why"], rows, justify="left")
    table("Which backend a job would take", ["job", "backend", "why"], [list(job.values()) for job in found["jobs"]], justify="left")
    for missing in found["missing"]:
        say(f"missing: {missing['what']}\n  mend:  {missing['command']}")
    if not found["missing"]:
        say("Nothing is missing.")


def _machine_rows(found: dict) -> list[list[str]]:
    machine, gpu = found["machine"], found["gpu"]
    ability = "none that the engine can use"
    if gpu:
        half, _ = models.half_precision(models.capability_of(gpu))
        ability = f"{gpu['name']}, {gpu['gib']} GiB, compute capability {gpu['capability']}, computes in {half}"
    memory = [[f"memory, {name}", f"{gib['used']} of {gib['total']} GiB used"] for name, gib in machine["memory_gib"].items()]
    keys = [[name, f"{'set' if given else 'not set'} (for {KEYS[name]})"] for name, given in found["keys"].items()]
    return [
        ["Python", f"{found['python']['version']}, {found['python']['path']}"],
        ["system", f"{machine['system']}, {machine['usable_cores']} usable cores"],
        ["GPU", ability],
        *memory,
        ["disk", f"{machine['disk_free_gib']} GiB free"],
        *keys,
    ]


def _versions(versions: dict) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
