"""Which interpreter trains, and the environment that is made where the running one cannot."""

import ast
import dataclasses
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from base64 import urlsafe_b64encode
from pathlib import Path

import pytest
import standin_easydistill

from distill import engine, environment, packages
from distill.errors import BackendError

LACKING = "no-such-package>=1\n"


@pytest.fixture
def bare(project, tmp_path, monkeypatch):
    """A project whose requirements this Python does not satisfy, with an empty place for `.train-env`."""
    monkeypatch.setattr(environment, "ENGINE", project / ".train-env")
    monkeypatch.setattr(environment, "LOG", project / "runs" / "train-env.log")
    for name, text in (("REQUIREMENTS", LACKING), ("CONSTRAINTS", "rich==15.0.0\ntorch==0.0.1\n")):
        file = tmp_path / f"{name.lower()}.txt"
        file.write_text(text)
        monkeypatch.setattr(environment, name, file)
    return project


def make_sealed(folder) -> None:
    """What a finished `.train-env` leaves."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (folder / environment.SEALED).write_text(json.dumps(environment._recipe().facts))


def test_this_python_trains_where_it_has_all():
    python, reason = environment.engine_python()
    assert python == sys.executable and "has all" in reason


def test_the_engine_starts_the_python_that_was_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "engine_python", lambda: ("/no/such/python", ""))
    ended = engine.run_module("distill.train", [], tmp_path / "log", lambda event: None)
    assert ended.status == 127 and "/no/such/python" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    "asked, lacking",
    [
        ("torch>=2.6", []),
        ("# a comment\n\nrich>=13  # why\n", []),
        ("rich>=999", ["rich>=999 ("]),
        ("no-such-package", ["no-such-package (not installed)"]),
        ("no-such-package; python_version < '3'", []),
        ("rich>=999\nno-such-package<2", ["rich>=999 (", "no-such-package<2 (not installed)"]),
    ],
)
def test_requirements_are_checked_by_version(asked, lacking):
    found = environment.lacking_packages(asked)
    assert len(found) == len(lacking) and all(one.startswith(start) for one, start in zip(found, lacking, strict=True))


def test_the_check_loads_no_torch():
    code = "import sys; from distill import environment as e; e.engine_python(); print([m for m in ('torch', 'trl') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=environment.PROJECT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr


def test_without_an_engine_the_error_names_what_lacks_and_the_remedy(bare):
    with pytest.raises(BackendError, match=r"lacks no-such-package>=1 \(not installed\)") as error:
        environment.engine_python()
    assert "distill_app.setup_engine()" in str(error.value)


def test_a_finished_environment_is_taken(bare):
    make_sealed(environment.ENGINE)
    python, reason = environment.engine_python()
    assert python == str(environment.ENGINE / "bin" / "python") and "lacks no-such-package" in reason


@pytest.mark.parametrize("changed", ["REQUIREMENTS", "CONSTRAINTS"])
def test_an_environment_for_other_versions_is_not_taken(bare, changed):
    make_sealed(environment.ENGINE)
    file = getattr(environment, changed)
    file.write_text(file.read_text() + "# changed\n")
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


def test_an_environment_whose_seal_cannot_be_read_is_not_taken(bare):
    make_sealed(environment.ENGINE)
    (environment.ENGINE / environment.SEALED).write_text("{")
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


@pytest.mark.parametrize("what", ["kernel_torch", "python", "kernel"])
def test_an_environment_for_another_kernel_is_not_taken(bare, what):
    make_sealed(environment.ENGINE)
    sealed = environment.ENGINE / environment.SEALED
    sealed.write_text(json.dumps({**json.loads(sealed.read_text()), what: "another"}))
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


def test_an_environment_without_its_seal_is_not_taken(bare):
    make_sealed(environment.ENGINE)
    (environment.ENGINE / environment.SEALED).unlink()
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


def test_setup_does_nothing_where_this_python_can_train(monkeypatch, capsys):
    monkeypatch.setattr(environment, "make", lambda recipe, prove: pytest.fail("an environment was made"))
    assert environment.setup_engine() == sys.executable
    assert "has all that the engine needs" in capsys.readouterr().out


def pins_and_options(folder, with_uv: bool) -> tuple[list[str], list[str]]:
    options = environment._options(environment._recipe(), folder, with_uv)
    return (folder / "constraints.txt").read_text().split(), options


def test_pip_is_held_to_the_kernels_torch(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: "2.11.0+cu128")
    pins, options = pins_and_options(tmp_path, with_uv=False)
    assert pins == ["rich==15.0.0", "torch==2.11.0+cu128"] and options[::2] == ["-r", "-c"]
    assert (tmp_path / "requirements.txt").read_text() == LACKING


def test_uv_leaves_torch_out(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: "2.11.0+cu128")
    pins, options = pins_and_options(tmp_path, with_uv=True)
    assert pins == ["rich==15.0.0"] and options[4] == "--override"
    assert (tmp_path / "overrides.txt").read_text() == "torch; python_version < '3'\n"


@pytest.mark.parametrize("with_uv", [False, True])
def test_a_kernel_without_torch_gets_the_pinned_one(bare, tmp_path, monkeypatch, with_uv):
    monkeypatch.setattr(environment, "installed", lambda package: None)
    pins, options = pins_and_options(tmp_path, with_uv)
    assert pins == ["rich==15.0.0", "torch==0.0.1"] and "--override" not in options


def test_an_old_torch_of_the_kernel_is_refused_and_never_replaced(bare, monkeypatch):
    environment.REQUIREMENTS.write_text("torch>=999\n")
    with pytest.raises(BackendError, match="Update torch here; the lab never does"):
        environment.setup_engine()
    assert not environment.ENGINE.exists()


def test_without_an_installer_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "_base_executable", "/bin/false")
    with pytest.raises(BackendError, match="Neither uv nor pip"):
        environment._installer(environment.ENGINE)


@pytest.mark.parametrize(
    "found, message",
    [
        ({"lacking": ["trl>=1 (not installed)"]}, "still lacks trl>=1"),
        ({"lacking": [], "torch": "0.0.1", "torch_folder": "/elsewhere"}, "torch 0.0.1 of its own"),
        ({"lacking": [], "torch": None, "torch_folder": "{engine}/lib/torch"}, "of its own"),
    ],
)
def test_an_environment_with_a_torch_of_its_own_is_refused(bare, found, message):
    environment.LOG.parent.mkdir()
    environment.LOG.write_text("last words\n")
    ours = environment.installed("torch")
    found = {key: (ours if key == "torch" and value is None else value) for key, value in found.items()}
    found = {key: value.format(engine=environment.ENGINE) if key == "torch_folder" else value for key, value in found.items()}
    with pytest.raises(BackendError, match=message) as error:
        environment._prove(found)
    assert "last words" in str(error.value)


@pytest.fixture
def pip_for_this_python(monkeypatch):
    """An installer for tests: pip of whichever Python here has one."""
    candidates = [sys.executable, sys._base_executable, "python3"]
    for python in candidates:
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0:
            break
    else:
        pytest.skip("no pip is here")
    monkeypatch.setattr(
        environment, "_installer", lambda folder: [python, "-m", "pip", "--python", str(environment.python_of(folder)), "install"]
    )


def test_a_failed_installation_shows_the_logs_end_and_is_made_anew(bare, pip_for_this_python, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (environment.ENGINE / "half").mkdir(parents=True)
    with pytest.raises(BackendError, match="could not be made: exit status") as error:
        environment.setup_engine()
    assert "no-such-package" in str(error.value) and "needs a network" in str(error.value)
    assert not environment.ENGINE.exists()
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


def recipe_in(project, **changes) -> environment.Recipe:
    """A recipe that needs no network: nothing to install."""
    recipe = environment.Recipe("The test", project / "env", project / "env.log", "again()", [], [], [str(project)], {"made": "for this"})
    return dataclasses.replace(recipe, **changes)


def install_nothing(monkeypatch) -> None:
    monkeypatch.setattr(environment, "_installer", lambda folder: [sys.executable, "-c", "print('installing')"])


def test_an_environment_sees_the_folders_of_its_recipe_behind_its_own(project, monkeypatch):
    install_nothing(monkeypatch)
    recipe = recipe_in(project)
    assert not environment.is_complete(recipe)
    environment.make(recipe, lambda python, update: None)
    code = "import sys; print(sys.path[-1], sys.prefix)"
    shown = subprocess.run([environment.python_of(recipe.folder), "-I", "-c", code], capture_output=True, text=True).stdout
    assert shown.split() == [str(project), str(recipe.folder)]
    assert environment.is_complete(recipe) and not environment.is_complete(recipe_in(project, facts={"made": "for another"}))
    assert "installing" in recipe.log.read_text()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BackendError("it does not load"), KeyboardInterrupt()])
def test_an_environment_that_fails_leaves_nothing(project, monkeypatch, error):
    install_nothing(monkeypatch)

    def prove(python, update):
        raise error

    recipe = recipe_in(project)
    with pytest.raises(BackendError if isinstance(error, OSError) else type(error)) as raised:
        environment.make(recipe, prove)
    assert not recipe.folder.exists()
    if isinstance(error, OSError):
        assert "No space left" in str(raised.value) and "`again()`" in str(raised.value) and "| installing" in str(raised.value)


def test_a_folder_whose_name_would_run_as_code_is_refused(project, monkeypatch, tmp_path):
    install_nothing(monkeypatch)
    recipe = recipe_in(project, shown=[f"/folder\nimport os; os.mkdir({str(tmp_path / 'pwned')!r})"])
    with pytest.raises(BackendError, match="has a line break in its name"):
        environment.make(recipe, lambda python, update: None)
    assert not (tmp_path / "pwned").exists() and not recipe.folder.exists()


def test_the_log_of_an_installation_holds_no_password(project, monkeypatch):
    line = "Looking in indexes: https://me:secret-password@index.example/simple, https://you:se/cr@et@other.example/simple"
    monkeypatch.setattr(environment, "_installer", lambda folder: [sys.executable, "-c", f"print({line!r})"])
    recipe = recipe_in(project)
    environment.make(recipe, lambda python, update: None)
    assert "https://***@index.example/simple, https://***@other.example/simple" in recipe.log.read_text()


# Real environments, from a wheel that is made here


def write_wheel(folder: Path) -> Path:
    """A wheel of `no-such-package`: one module, one file of data. Returns its folder."""
    folder.mkdir(parents=True)
    info = "no_such_package-1.0.dist-info"
    files = {
        "no_such_package/__init__.py": "VALUE = 1\n",
        "no_such_package/data.txt": "some data\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: no-such-package\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / "no_such_package-1.0-py3-none-any.whl", "w") as wheel:
        for name, text in files.items():
            wheel.writestr(name, text)
        digests = {name: urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=") for name, text in files.items()}
        lines = [f"{name},sha256={digests[name]},{len(text)}" for name, text in files.items()]
        wheel.writestr(f"{info}/RECORD", "\n".join([*lines, f"{info}/RECORD,,"]))
    return folder


@pytest.fixture
def wheels(bare, pip_for_this_python, monkeypatch, tmp_path):
    """Where the package that `bare` asks for can be had, without a network; the new environment is not asked what it brings."""
    monkeypatch.setenv("PIP_FIND_LINKS", str(write_wheel(tmp_path / "wheels")))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    # the environment's own check would read the project's real requirements
    monkeypatch.setattr(
        environment, "probe", lambda python: {"lacking": [], "torch": environment.installed("torch"), "torch_folder": "/kernel"}
    )
    return bare


def loads(python: str) -> bool:
    """Whether an environment's package is there, with its data."""
    code = "import no_such_package, pathlib; print(pathlib.Path(no_such_package.__file__).with_name('data.txt').read_text())"
    return subprocess.run([python, "-c", code], capture_output=True, text=True).stdout.strip() == "some data"


def break_link(folder: Path) -> None:
    environment.python_of(folder).unlink()
    environment.python_of(folder).symlink_to("/no/such/python")


def stop_python(folder: Path) -> None:
    environment.python_of(folder).unlink()
    environment.python_of(folder).write_text("no program")
    environment.python_of(folder).chmod(0o755)


def record_of(folder: Path) -> Path:
    return next(packages.folder_of(folder).glob("no_such_package*.dist-info")) / packages.RECORD


DAMAGES = {
    "a file is gone": lambda folder: (packages.folder_of(folder) / "no_such_package" / "data.txt").unlink(),
    "a file is cut": lambda folder: (packages.folder_of(folder) / "no_such_package" / "data.txt").write_text("some"),
    "a package is gone": lambda folder: [shutil.rmtree(found) for found in packages.folder_of(folder).glob("no_such_package*")],
    "the interpreter is gone": break_link,
    "the interpreter does not run": stop_python,
    "the seal is cut": lambda folder: (folder / environment.SEALED).write_text("{"),
    "the seal is a list": lambda folder: (folder / environment.SEALED).write_text("[]"),
    "a record is cut": lambda folder: record_of(folder).write_text("no_such_package/__init__.py,sha256=x"),
    "a record is no text": lambda folder: record_of(folder).write_bytes(b"\xff,\x00,1\n"),
    "all packages are gone": lambda folder: shutil.rmtree(packages.folder_of(folder)),
}


def test_a_damaged_environment_is_mended_by_the_next_set_up(wheels, capsys, tmp_path):
    python = environment.setup_engine()
    capsys.readouterr()
    assert environment.setup_engine() == python and "Making" not in capsys.readouterr().out, "a whole one is left alone"
    for number, (what, spoil) in enumerate(DAMAGES.items()):
        copy = shutil.copytree(environment.ENGINE, tmp_path / str(number), symlinks=True)
        recipe = dataclasses.replace(environment._recipe(), folder=copy)
        assert environment._why_made_anew(recipe) is None
        spoil(copy)
        assert environment._why_made_anew(recipe), what
    for what in ("a file is gone", "the interpreter is gone"):
        DAMAGES[what](environment.ENGINE)
        assert environment.setup_engine() == python and loads(python), what
        assert "is made anew" in capsys.readouterr().out
    assert environment._why_made_anew(environment._recipe()) is None


INTERRUPTED = """
from distill import environment
environment.ENGINE, environment.LOG, environment.REQUIREMENTS, environment.CONSTRAINTS = map(Path, sys.argv[1:])
wait = "import time; print('half of it', flush=True); time.sleep(60)"
environment._installer = lambda folder: [sys.executable, "-c", wait]
environment.setup_engine()
"""


@pytest.mark.parametrize("stood", [False, True], ids=["none stood", "one stood, for another Python"])
def test_an_installation_that_was_killed_is_mended_by_the_next_set_up(wheels, start_python, stood):
    if stood:
        make_sealed(environment.ENGINE)
        (environment.ENGINE / environment.SEALED).write_text('{"python": "another"}')
    places = (environment.ENGINE, environment.LOG, environment.REQUIREMENTS, environment.CONSTRAINTS)
    lab = start_python(INTERRUPTED, *places)
    deadline = time.monotonic() + 60
    while not (environment.LOG.is_file() and "half of it" in environment.LOG.read_text()):
        assert lab.poll() is None and time.monotonic() < deadline, lab.communicate()
        time.sleep(0.05)
    os.kill(lab.pid, signal.SIGKILL)
    lab.wait()
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()
    assert loads(environment.setup_engine())
    assert sorted(path.name for path in environment.ENGINE.parent.iterdir() if "train-env" in path.name) == [".train-env"]


SET_UP = """
import json, sys
from pathlib import Path
from distill import environment, notebook, store
store.ROOT = Path(sys.argv[1])
environment.ENGINE, environment.LOG = store.ROOT / ".train-env", store.ROOT / "runs" / "train-env.log"
environment.REQUIREMENTS, environment.CONSTRAINTS = Path(sys.argv[2]), Path(sys.argv[3])
notebook.setup_lab()
"""
LISTED = "import importlib.metadata as m; print(sorted((one.name, one.version) for one in m.distributions()))"


def make_kernel(folder: Path) -> Path:
    """A kernel's environment: it has what this Python has, and a package of its own. Returns its interpreter."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    own = packages.folder_of(folder)
    (own / "kernel.pth").write_text("".join(f"{place}\n" for place in environment.kernel_folders()))
    (own / "kernel_own-2.0.dist-info").mkdir()
    (own / "kernel_own-2.0.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kernel-own\nVersion: 2.0\n")
    return packages.python_of(folder)


def kernel_as_it_is(python: Path) -> tuple[str, dict[str, str]]:
    """What a kernel lists as installed, and the hash of each file of its packages, bytecode aside."""
    own = packages.folder_of(python.parent.parent)
    files = [file for file in own.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    listed = subprocess.run([python, "-c", LISTED], capture_output=True, text=True, check=True).stdout
    return listed, {str(file.relative_to(own)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


@pytest.mark.slow
def test_set_up_leaves_the_kernels_packages_as_they_are(project, tmp_path):
    kernel = make_kernel(tmp_path / "kernel")
    asked = tmp_path / "requirements.txt"
    asked.write_text(LACKING)
    (tmp_path / "constraints.txt").write_text("")
    before = kernel_as_it_is(kernel)
    variables = {"PIP_FIND_LINKS": str(write_wheel(tmp_path / "wheels")), "PIP_NO_INDEX": "1", "HF_HUB_OFFLINE": "1"}
    variables["EASYDISTILL_HOME"] = str(standin_easydistill.build(tmp_path / "easydistill"))
    command = [kernel, "-c", SET_UP, project, asked, tmp_path / "constraints.txt"]
    done = subprocess.run(command, cwd=environment.PROJECT, capture_output=True, text=True, env={**os.environ, **variables}, timeout=300)
    assert done.returncode == 0 and f"engine: {project / '.train-env'}" in done.stdout, done.stdout + done.stderr
    assert "kernel-own" in before[0] and "no-such-package" not in before[0] and kernel_as_it_is(kernel) == before
    seen = subprocess.run([project / ".train-env" / "bin" / "python", "-c", LISTED], capture_output=True, text=True).stdout
    assert "no-such-package" in seen and "kernel-own" in seen


@pytest.mark.parametrize("folder", ["distill", "tests", "benchmarks"])
def test_the_oldest_python_of_the_lab_reads_every_file(folder):
    for file in sorted((environment.PROJECT / folder).glob("*.py")):
        ast.parse(file.read_text(encoding="utf-8"), filename=str(file), feature_version=(3, 11))


@pytest.mark.parametrize("minor", [11, 12, 13])
def test_every_python_of_the_lab_compiles_it(minor, tmp_path):
    python = shutil.which(f"python3.{minor}")
    if python is None or subprocess.run([python, "--version"], capture_output=True).returncode:
        pytest.skip(f"python3.{minor} is not on PATH")
    sources = [str(environment.PROJECT / folder) for folder in ("distill", "tests", "benchmarks")]
    command = [python, "-W", "error", "-m", "compileall", "-q", "-f", "-o", "0", *sources]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr


# What an interpreter brings


def test_the_probe_says_what_an_interpreter_brings():
    found = environment.probe(sys.executable)
    assert found["lacking"] == [] and found["torch"] == environment.installed("torch") and set(found["versions"]) >= {"torch", "trl"}


def test_a_python_whose_packages_do_not_load_is_an_error(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ImportError: broken' >&2; exit 1\n")
    broken.chmod(0o755)
    with pytest.raises(BackendError, match="do not load") as error:
        environment.probe(broken)
    assert "ImportError: broken" in str(error.value)
