"""Which interpreter trains, and the environment that is made where the running one cannot."""

import json
import os
import subprocess
import sys

import pytest

from distill import engine, environment
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
    (folder / environment.SEALED).write_text(json.dumps(environment._facts()))


def test_this_python_trains_where_it_has_all():
    python, reason = environment.engine_python()
    assert python == sys.executable and "has all" in reason


def test_the_engine_starts_the_python_that_was_chosen(monkeypatch, tmp_path):
    monkeypatch.setattr(engine, "engine_python", lambda: ("/no/such/python", ""))
    with pytest.raises(FileNotFoundError, match="/no/such/python"):
        engine.run_module("distill.train", [], tmp_path / "log", lambda event: None)


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
    monkeypatch.setattr(environment, "_make", lambda: pytest.fail("an environment was made"))
    assert environment.setup_engine() == sys.executable
    assert "has all that the engine needs" in capsys.readouterr().out


def test_pip_is_held_to_the_kernels_torch(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: "2.11.0+cu128")
    options = environment._pins(tmp_path, with_uv=False)
    assert options[0] == "-c" and len(options) == 2
    assert (tmp_path / "constraints.txt").read_text().split() == ["rich==15.0.0", "torch==2.11.0+cu128"]


def test_uv_leaves_torch_out(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: "2.11.0+cu128")
    options = environment._pins(tmp_path, with_uv=True)
    assert options[2] == "--override"
    assert (tmp_path / "overrides.txt").read_text() == "torch; python_version < '3'\n"
    assert "torch" not in (tmp_path / "constraints.txt").read_text()


def test_a_kernel_without_torch_gets_the_pinned_one(bare, tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda package: None)
    assert environment._pins(tmp_path, with_uv=False) == ["-c", str(environment.CONSTRAINTS)]


def test_an_old_torch_of_the_kernel_is_refused_and_never_replaced(bare, monkeypatch):
    environment.REQUIREMENTS.write_text("torch>=999\n")
    with pytest.raises(BackendError, match="Update torch here; the lab never does"):
        environment.setup_engine()
    assert not environment.ENGINE.exists()


def test_without_an_installer_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    with pytest.raises(BackendError, match="Neither uv nor pip"):
        environment._installer()


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
    command = [python, "-m", "pip", "--python", str(environment.ENGINE / "bin" / "python"), "install"]
    monkeypatch.setattr(environment, "_installer", lambda: command)


def test_a_failed_installation_shows_the_logs_end_and_is_made_anew(bare, pip_for_this_python, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    (environment.ENGINE / "half").mkdir(parents=True)
    with pytest.raises(BackendError, match="could not be made: exit status") as error:
        environment.setup_engine()
    assert "no-such-package" in str(error.value) and "needs a network" in str(error.value)
    assert not (environment.ENGINE / "half").exists() and not (environment.ENGINE / environment.SEALED).exists()
    with pytest.raises(BackendError, match="cannot train"):
        environment.engine_python()


@pytest.mark.slow
def test_an_environment_is_made_that_sees_this_pythons_packages(bare, pip_for_this_python, monkeypatch, tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "pyproject.toml").write_text('[project]\nname = "no-such-package"\nversion = "1.0"\n[tool.setuptools]\npy-modules = []\n')
    wheels = tmp_path / "wheels"
    make_wheel = [environment._installer()[0], "-m", "pip", "wheel", "--no-deps", "-w", str(wheels), str(package)]
    done = subprocess.run(make_wheel, capture_output=True)
    if done.returncode:
        pytest.skip("setuptools cannot be had here, so no wheel can be made")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    before = {name: environment.installed(name) for name in ("torch", "trl", "numpy")}
    # the environment's own check would read the project's real requirements
    monkeypatch.setattr(environment, "probe", lambda python: {"lacking": [], "torch": before["torch"], "torch_folder": "/kernel"})
    python = environment.setup_engine()
    code = "import sys, torch, importlib.metadata as m; print(m.version('no-such-package'), torch.__file__.startswith(sys.prefix))"
    shown = subprocess.run([python, "-c", code], capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert shown.stdout.split() == ["1.0", "False"], shown.stderr
    assert before == {name: environment.installed(name) for name in before} and environment.installed("no-such-package") is None
    assert environment.engine_python()[0] == python


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
