"""Finding EasyDistill, telling its kinds apart, and making an environment for it; with stand-ins, without a network."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import easydistill, environment, packages, store
from distill.errors import BackendError, ConfigError

KINDS = {
    1: {"kd/train.py": "", "cli.py": "print('one', __file__)\n", "__init__.py": ""},
    2: {"cli/main.py": "", "cli/__init__.py": "", "cli/__main__.py": "print('two')\n", "__init__.py": '__version__ = "2.0.3"\n'},
    "placeholder": {"__init__.py": ""},
    "1.x without its trainer": {"__init__.py": "", "cli.py": ""},
    "a later one": {"__init__.py": '__version__ = "3.0.0"\n', "cli/main.py": ""},
}


@pytest.fixture(autouse=True)
def nothing_named(monkeypatch, project):
    monkeypatch.delenv(easydistill.HOME, raising=False)


def write_package(home: Path, kind) -> Path:
    """The package `easydistill` of a kind in `home`."""
    for name, text in KINDS[kind].items():
        file = home / "easydistill" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return home


def make_environment(folder: Path, packages: dict, kind=None, checkout: Path | None = None) -> Path:
    """An environment that says it has these packages, and a package `easydistill` of its own or by the path of a checkout."""
    base = Path(sys._base_executable).resolve()
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python").symlink_to(base)
    (folder / "pyvenv.cfg").write_text(f"home = {base.parent}\nversion = {sys.version.split()[0]}\n")
    for name, version in packages.items():
        info = site / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    if kind:
        write_package(site, kind)
    if checkout:
        (site / "checkout.pth").write_text(f"{checkout}\n")
    return folder


def all_of(major: int) -> dict:
    return dict.fromkeys(easydistill.RUNS_ON[major], "4.5.6")


def name_homes(monkeypatch, *places) -> None:
    monkeypatch.setenv(easydistill.HOME, os.pathsep.join(map(str, places)))


# Finding


@pytest.mark.parametrize("major, version", [(1, "1.0"), (2, "2.0.3")])
def test_an_environment_is_found_by_its_files(tmp_path, monkeypatch, major, version):
    folder = make_environment(tmp_path / "env", all_of(major), kind=major)
    name_homes(monkeypatch, folder)
    found, reason = easydistill.find(major)
    assert (found.major, found.version, found.origin) == (major, version, "EASYDISTILL_HOME") and str(folder) in reason
    assert found.python == folder / "bin" / "python" and (found.home / "easydistill").is_dir()
    assert found.versions == {"python": sys.version.split()[0], **all_of(major)}
    assert easydistill.require(major) == found


@pytest.mark.parametrize("major, said", [(1, "one"), (2, "two")])
def test_the_command_starts_its_command_line(tmp_path, monkeypatch, major, said):
    name_homes(monkeypatch, make_environment(tmp_path / "an environment; $(touch pwned)", all_of(major), kind=major))
    done = subprocess.run(easydistill.command(easydistill.require(major)), cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.startswith(said) and not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("folder", [".venv", "venv"])
def test_a_checkout_brings_its_own_environment(tmp_path, monkeypatch, folder):
    checkout = write_package(tmp_path / "checkout", 1)
    make_environment(checkout / folder, all_of(1), checkout=checkout)
    name_homes(monkeypatch, checkout)
    found, _ = easydistill.find(1)
    assert found.home == checkout and found.python == checkout / folder / "bin" / "python"


def test_among_several_places_each_kind_is_found(tmp_path, monkeypatch):
    name_homes(monkeypatch, *[make_environment(tmp_path / f"env{major}", all_of(major), kind=major) for major in (1, 2)])
    assert [easydistill.find(major)[0].major for major in (1, 2)] == [1, 2]


def test_a_relative_place_counts_from_the_project(project, monkeypatch):
    make_environment(project / "mine", all_of(1), kind=1)
    name_homes(monkeypatch, "mine")
    assert easydistill.find(1)[1] == "EasyDistill 1.0 in mine, by EASYDISTILL_HOME"


def test_finding_is_quick_and_loads_no_package_of_it(tmp_path, monkeypatch):
    folder = make_environment(tmp_path / "env", all_of(1), kind=1)
    for module in ("torch", "easydistill"):
        (folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages" / module).mkdir(exist_ok=True)
    (next(folder.glob("lib/*/site-packages/easydistill")) / "__init__.py").write_text("raise SystemExit('imported')")
    name_homes(monkeypatch, folder)
    start = time.monotonic()
    assert easydistill.find(1)[0] and time.monotonic() - start < 1


# What is no EasyDistill that the job can use


def say_no(major: int) -> str:
    found, reason = easydistill.find(major)
    assert found is None
    with pytest.raises(BackendError) as error:
        easydistill.require(major)
    message = str(error.value)
    assert reason in message and f"setup-easydistill {major}" in message and "1.x trains students" in message and "cannot train" in message
    return reason


@pytest.mark.parametrize(
    "there, needed, said", [(2, 1, "makes data with a teacher behind an API and cannot train"), (1, 2, "trains students")]
)
def test_the_other_kind_is_named_with_what_it_can_do(tmp_path, monkeypatch, there, needed, said):
    name_homes(monkeypatch, make_environment(tmp_path / "env", all_of(there), kind=there))
    assert f"holds another: EasyDistill {there}.x {said}" in say_no(needed)


@pytest.mark.parametrize("kind", ["placeholder", "1.x without its trainer", "a later one"])
@pytest.mark.parametrize("needed", [1, 2])
def test_the_placeholder_is_neither(tmp_path, monkeypatch, kind, needed):
    name_homes(monkeypatch, make_environment(tmp_path / "env", {"easydistill": "0.0.1", **all_of(needed)}, kind=kind))
    assert "empty placeholder" in say_no(needed)


def test_a_placeholder_of_metadata_alone_is_seen(tmp_path, monkeypatch):
    name_homes(monkeypatch, make_environment(tmp_path / "env", {"easydistill": "0.0.1"}))
    assert "empty placeholder" in say_no(1)


def test_without_any_it_says_so():
    assert say_no(1) == "EasyDistill 1.x is not installed here."


@pytest.mark.parametrize(
    "place, said", [("nowhere", "nowhere, named by EASYDISTILL_HOME, is not there"), ("", "is neither an environment")]
)
def test_a_place_that_holds_none_is_named(project, monkeypatch, place, said):
    name_homes(monkeypatch, project / place)
    assert said in say_no(1)


def test_a_name_that_no_path_can_have_is_no_crash(monkeypatch):
    name_homes(monkeypatch, "x" * 300)
    assert "is no path" in say_no(1)


def break_link(folder: Path) -> None:
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").symlink_to("/no/such/python")


def break_interpreter(folder: Path) -> None:
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\nexit 3\n")
    (folder / "bin" / "python").chmod(0o755)


def make_unexecutable(folder: Path) -> None:
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("no program")


def take_package_away(folder: Path) -> None:
    next(folder.glob("lib/*/site-packages/trl-*/METADATA")).unlink()
    next(folder.glob("lib/*/site-packages/trl-*")).rmdir()


@pytest.mark.parametrize(
    "damage, said",
    [
        (break_link, "broken: No such file"),
        (break_interpreter, "broken: it does not answer"),
        (make_unexecutable, "broken: Permission denied"),
        (take_package_away, "broken: it lacks trl"),
    ],
)
def test_a_broken_environment_is_noticed(tmp_path, monkeypatch, damage, said):
    folder = make_environment(tmp_path / "env", all_of(1), kind=1)
    damage(folder)
    name_homes(monkeypatch, folder)
    assert said in say_no(1)


def test_an_environment_that_hangs_is_noticed(tmp_path, monkeypatch):
    folder = make_environment(tmp_path / "env", all_of(1), kind=1)
    (folder / "bin" / "python").unlink()
    (folder / "bin" / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    (folder / "bin" / "python").chmod(0o755)
    name_homes(monkeypatch, folder)
    monkeypatch.setattr(easydistill, "QUESTION_SECONDS", 0.3)
    assert "does not answer" in say_no(1)


def test_an_environment_without_easydistill_says_how_it_is_installed(tmp_path, monkeypatch):
    name_homes(monkeypatch, make_environment(tmp_path / "env", all_of(1)))
    assert "`pip install -e`" in say_no(1)


# Installing


@pytest.fixture
def stand_in_installer(monkeypatch):
    """Environments are made for real; instead of downloading, what is asked for is said to be there."""
    install = """
import pathlib, sys
site, = pathlib.Path(sys.argv[1]).glob("lib/*/site-packages")
for name in sys.argv[2].split():
    (site / f"{name}-4.5.6.dist-info").mkdir()
    (site / f"{name}-4.5.6.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\\nName: {name}\\nVersion: 4.5.6\\n")
    (site / f"{name}.txt").write_text("some data")
    (site / f"{name}-4.5.6.dist-info" / "RECORD").write_text(f"{name}.txt,sha256=x,9\\n")
"""
    names = " ".join({*easydistill.RUNS_ON[1], *easydistill.RUNS_ON[2]} - {"torch"})
    monkeypatch.setattr(environment, "_installer", lambda folder: [sys.executable, "-c", install, str(folder), names])
    monkeypatch.setattr(easydistill, "PROOFS", dict.fromkeys((1, 2), ["-c", "import easydistill"]))


@pytest.fixture
def repository(tmp_path, monkeypatch) -> Path:
    """A git repository with EasyDistill's two tags, in place of the public one."""
    folder = tmp_path / "public"
    git = ["git", "-C", str(folder), "-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    for major, tag in easydistill.TAGS.items():
        subprocess.run([*git, "rm", "-rfq", "--ignore-unmatch", "."], check=True)
        write_package(folder, major)
        (folder / "pyproject.toml").write_text('[project]\nname = "easydistill"\ndependencies = ["openai>=1.30"]\n')
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "-q", "-m", tag], check=True)
        subprocess.run([*git, "tag", tag], check=True)
    monkeypatch.setattr(easydistill, "SOURCE", f"file://{folder}")
    return folder


def test_both_are_fetched_and_installed_each_in_an_environment_of_its_own(project, repository, stand_in_installer, capsys):
    found = easydistill.setup_easydistill(1, 2)
    for major, version in ((1, "1.0.0"), (2, "2.0.3")):
        assert found[major] == easydistill.find(major)[0] and found[major].version == version and found[major].origin == ".easydistill"
        assert found[major].home == project / ".easydistill" / f"v{major}.0.0"
        assert found[major].python.is_relative_to(project / ".easydistill" / f"env-{major}")
    assert found[1].versions["torch"] == environment.installed("torch")  # the kernel's
    assert not environment.holds(project / ".easydistill" / "env-1", "torch") and "torch" not in found[2].versions
    said = capsys.readouterr().out
    assert "Fetching EasyDistill v1.0.0" in said and "EasyDistill 2.0.3 in .easydistill/v2.0.0" in said
    before = (project / ".easydistill" / "env-1" / environment.SEALED).stat().st_mtime_ns
    assert easydistill.setup_easydistill() == {1: found[1]}  # nothing is done twice
    assert (project / ".easydistill" / "env-1" / environment.SEALED).stat().st_mtime_ns == before


def test_an_environment_is_made_from_a_named_checkout_which_stays_as_it_is(tmp_path, project, stand_in_installer, monkeypatch):
    checkout = write_package(tmp_path / "a checkout", 1)
    files = sorted(checkout.rglob("*.py"))
    name_homes(monkeypatch, checkout)
    assert "is not made yet" in say_no(1)
    found = easydistill.setup_easydistill()[1]
    assert found.home == checkout and found.python.is_relative_to(project) and sorted(checkout.rglob("*.py")) == files
    other = write_package(tmp_path / "another", 1)
    name_homes(monkeypatch, other)
    assert "made for another Python, torch or checkout" in say_no(1)
    assert easydistill.setup_easydistill()[1].home == other


@pytest.mark.parametrize("changed", ["REQUIREMENTS", "torch"])
def test_an_environment_for_other_versions_is_made_anew(tmp_path, stand_in_installer, monkeypatch, changed):
    name_homes(monkeypatch, write_package(tmp_path / "checkout", 1))
    easydistill.setup_easydistill()
    if changed == "torch":
        monkeypatch.setattr(environment, "installed", lambda package: "99.0")
    else:
        monkeypatch.setattr(easydistill, "REQUIREMENTS", ("transformers==4.51.2",))
    assert "made for another" in say_no(1)
    if changed == "REQUIREMENTS":
        assert easydistill.setup_easydistill()[1]


def test_the_requirements_of_2_are_its_own(tmp_path):
    checkout = write_package(tmp_path / "checkout", 2)
    (checkout / "pyproject.toml").write_text('[project]\ndependencies = ["openai>=1.30", "pyyaml>=6"]\n')
    recipe = easydistill._recipe(checkout, 2)
    assert recipe.requirements == ["openai>=1.30", "pyyaml>=6"] and recipe.shown == [str(checkout)]
    (checkout / "pyproject.toml").write_text("{")
    with pytest.raises(BackendError, match=r"no pyproject\.toml that says what it needs"):
        easydistill._recipe(checkout, 2)


def test_the_requirements_of_1_are_its_pins_and_neither_vllm_nor_deepspeed(tmp_path):
    asked = easydistill._recipe(tmp_path, 1).requirements
    assert {"transformers==4.51.1", "trl==0.17.0", "tokenizers==0.21.1", "jsonlines"} <= set(asked)
    assert not [one for one in asked if "vllm" in one or "deepspeed" in one or one.startswith("torch")]


def test_without_a_network_it_goes_on_and_leaves_nothing(project, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(easydistill, "SOURCE", f"file://{tmp_path}/no-such-repository")
    assert easydistill.setup_easydistill(1, 2) == {1: None, 2: None}
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "EasyDistill 1.x cannot be fetched (no network?)" in line and "the built-in engine trains" in line]
    assert [line for line in lines if "EasyDistill 2.x cannot be fetched (no network?)" in line and "a teacher that is loaded" in line]
    assert not (project / ".easydistill").exists()


def test_a_fetch_that_hangs_is_ended(project, tmp_path, monkeypatch, capsys):
    git = tmp_path / "bin" / "git"
    git.parent.mkdir()
    git.write_text("#!/bin/sh\nsleep 60\n")
    git.chmod(0o755)
    monkeypatch.setenv("PATH", f"{git.parent}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(easydistill, "FETCH_SECONDS", 0.5)
    assert easydistill.setup_easydistill() == {1: None}
    assert "no answer within 0.5 s" in capsys.readouterr().out and not (project / ".easydistill").exists()


def test_without_git_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(easydistill.shutil, "which", lambda name: None)
    assert easydistill.setup_easydistill() == {1: None}
    assert "Install git" in capsys.readouterr().out


def test_a_fetch_of_something_else_is_not_kept(project, repository, stand_in_installer, monkeypatch, capsys):
    monkeypatch.setattr(easydistill, "TAGS", {1: "v2.0.0", 2: "v2.0.0"})
    assert easydistill.setup_easydistill(1) == {1: None}
    assert "is no EasyDistill 1.x" in capsys.readouterr().out and not (project / ".easydistill").exists()


@pytest.mark.parametrize("step", ["installing", "proving"])
def test_an_environment_that_fails_says_why_and_leaves_the_checkout_alone(
    project, repository, stand_in_installer, monkeypatch, capsys, step
):
    failing = ["-c", "print('No space left on device'); raise SystemExit(1)"]
    if step == "installing":
        monkeypatch.setattr(environment, "_installer", lambda folder: [sys.executable, *failing])
    else:
        monkeypatch.setattr(easydistill, "PROOFS", {1: failing})
    assert easydistill.setup_easydistill() == {1: None}
    said = capsys.readouterr().out
    assert "EasyDistill 1.x's environment could not be made: exit status 1" in said and "| No space left on device" in said
    assert "runs/easydistill-1.log" in said and "Going on without EasyDistill 1.x: the built-in engine trains" in said
    assert [path.name for path in (project / ".easydistill").iterdir()] == ["v1.0.0"]


def test_a_torch_of_its_own_is_refused(tmp_path, project, stand_in_installer, monkeypatch, capsys):
    name_homes(monkeypatch, write_package(tmp_path / "checkout", 1))
    monkeypatch.setattr(environment, "holds", lambda folder, package: True)
    assert easydistill.setup_easydistill() == {1: None}
    assert "it holds a torch of its own" in capsys.readouterr().out and not list((project / ".easydistill").iterdir())


def test_a_named_environment_is_never_changed(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(easydistill, "SOURCE", str(tmp_path / "no-such-repository"))
    folder = make_environment(tmp_path / "env", {}, kind=1)
    before = sorted(folder.rglob("*"))
    name_homes(monkeypatch, folder)
    assert easydistill.setup_easydistill() == {1: None}
    said = capsys.readouterr().out
    assert "it lacks torch, transformers" in said and "cannot be fetched" in said
    assert sorted(folder.rglob("*")) == before


def test_two_at_once_are_refused(tmp_path, monkeypatch, project, capsys):
    name_homes(monkeypatch, write_package(tmp_path / "checkout", 1))
    with store.lock(project / ".easydistill" / "env-1"):
        assert easydistill.setup_easydistill() == {1: None}
    assert "Another run is writing .easydistill/env-1" in capsys.readouterr().out


def test_a_number_that_no_easydistill_has_is_an_error():
    with pytest.raises(ConfigError, match=r"no EasyDistill 3\.x"):
        easydistill.setup_easydistill(3)


def test_an_interrupted_installation_is_made_anew(tmp_path, project, stand_in_installer, monkeypatch):
    name_homes(monkeypatch, write_package(tmp_path / "checkout", 1))
    half = project / ".easydistill" / "env-1"
    make_environment(half, all_of(1))
    assert "not to its end" in say_no(1)
    assert easydistill.setup_easydistill()[1].python.is_relative_to(half)


def site_of(project: Path) -> Path:
    return packages.folder_of(project / ".easydistill" / "env-1")


DAMAGES = {
    "a file is gone": (lambda project: (site_of(project) / "trl.txt").unlink(), r"is damaged \(trl.txt is not as it was installed\)"),
    "a file is cut": (lambda project: (site_of(project) / "trl.txt").write_text(""), r"is damaged \(trl.txt is not as it was installed\)"),
    "a record is gone": (
        lambda project: (site_of(project) / "trl-4.5.6.dist-info" / "RECORD").unlink(),
        r"is damaged \(trl-4.5.6 is gone\)",
    ),
    "the seal is cut": (lambda project: (project / ".easydistill" / "env-1" / environment.SEALED).write_text("{"), "not to its end"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_an_environment_of_the_labs_own_that_lost_files_is_noticed_and_mended(project, repository, stand_in_installer, what):
    spoil, said = DAMAGES[what]
    made = easydistill.setup_easydistill(1)[1]
    spoil(project)
    assert re.search(f"The environment of .*{said}.*; run `python distill_app.py setup-easydistill 1`", say_no(1))
    assert easydistill.setup_easydistill(1) == {1: made} and (site_of(project) / "trl.txt").read_text() == "some data"


# What nobody needs unless asked


def recipe_with(tmp_path, monkeypatch, extras):
    monkeypatch.setattr(easydistill.store, "ROOT", tmp_path)
    return easydistill._recipe(tmp_path / "checkout", 1, extras)


def test_neither_vllm_nor_deepspeed_is_installed_unless_asked_for(tmp_path, monkeypatch):
    plain, asked = recipe_with(tmp_path, monkeypatch, []), recipe_with(tmp_path, monkeypatch, ["deepspeed"])
    assert not [line for line in plain.requirements if line.startswith(("vllm", "deepspeed"))]
    assert asked.requirements == [*plain.requirements, "deepspeed"] and not asked.own_torch and asked.python == sys.executable


def test_vllm_gets_a_torch_of_its_own_and_a_python_that_it_has_a_build_for(tmp_path, monkeypatch):
    recipe = recipe_with(tmp_path, monkeypatch, ["vllm"])
    assert recipe.own_torch and recipe.shown == [str(tmp_path / "checkout")] and "vllm==0.8.5" in recipe.requirements
    monkeypatch.setattr(sys, "version_info", (3, 13, 0))
    monkeypatch.setattr(easydistill.shutil, "which", lambda name: f"/usr/bin/{name}" if name == "python3.11" else None)
    assert recipe_with(tmp_path, monkeypatch, ["vllm"]).python == "/usr/bin/python3.11"
    monkeypatch.setattr(easydistill.shutil, "which", lambda name: None)
    with pytest.raises(BackendError, match="no build for this Python"):
        recipe_with(tmp_path, monkeypatch, ["vllm"])


def test_another_extra_is_refused():
    with pytest.raises(ConfigError, match="no extra 'vlm'; there are vllm, deepspeed"):
        easydistill.setup_easydistill(1, extras=["vlm"])


def test_a_failed_addition_leaves_the_environment_that_worked_and_says_that_it_failed(project, monkeypatch, capsys):
    checkout = write_package(project / ".easydistill" / "v1.0.0", 1)
    recipe = easydistill._recipe(checkout, 1, [])
    python = environment.python_of(recipe.folder)
    python.parent.mkdir(parents=True)
    python.write_text("works")
    store.write_json(recipe.folder / environment.SEALED, recipe.facts)
    monkeypatch.setattr(environment, "_installer", lambda folder: [sys.executable, "-c", "raise SystemExit(3)"])
    assert easydistill.setup_easydistill(1, extras=["deepspeed"]) == {1: None}
    assert python.read_text() == "works" and "could not be made" in capsys.readouterr().out
    assert sorted(path.name for path in (project / ".easydistill").iterdir()) == ["env-1", "v1.0.0"]


def test_what_is_named_comes_first_and_the_projects_own_serves_the_other_version(tmp_path, project, monkeypatch):
    named = make_environment(tmp_path / "named", all_of(1), kind=1)
    name_homes(monkeypatch, named)
    assert easydistill.find(1)[0].origin == "EASYDISTILL_HOME"
    assert easydistill.find(2)[0] is None
    own = write_package(project / ".easydistill" / "v2.0.0", 2)
    make_environment(own / ".venv", all_of(2), kind=2)
    found, reason = easydistill.find(2)
    assert found and found.origin == ".easydistill" and "holds another: EasyDistill 1.x" in reason


def test_an_environment_remembers_the_checkout_that_it_was_made_for(tmp_path, project, stand_in_installer, monkeypatch):
    checkout = write_package(tmp_path / "mine", 1)
    name_homes(monkeypatch, checkout)
    assert easydistill.setup_easydistill(1)[1].home == checkout
    monkeypatch.delenv(easydistill.HOME)
    assert easydistill.find(1)[0].home == checkout


def test_without_pip_of_its_own_an_environment_is_filled_by_the_pip_that_made_it(monkeypatch, tmp_path):
    monkeypatch.setattr(environment, "find_spec", lambda name: None)
    monkeypatch.setattr(environment.shutil, "which", lambda name: None)
    assert environment._installer(tmp_path)[:3] == [sys._base_executable, "-m", "pip"]
    monkeypatch.setattr(sys, "_base_executable", "/bin/false")
    with pytest.raises(BackendError, match=f"{sys.executable} -m ensurepip"):
        environment._installer(tmp_path)
