"""The notebook as on Colab, as far as a CPU allows: opened alone in an empty folder, in an environment with the versions of Colab's image.

    python benchmarks/colab_like.py [--work FOLDER] [--python python3.11]

Makes a kernel's environment (torch's CPU build and KERNEL, TRL absent), an empty folder that holds only notebook.ipynb, and a repository of
this working tree for LAB_REPO; runs every cell headless; proves that not one file of the kernel's packages changed. Leaves the executed
notebook, its HTML and, where Chromium is there, a picture of it in `reports/colab_like/`. The first run downloads the packages.
"""

import argparse
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "reports" / "colab_like"
# Colab's image of August 2026; its torch is 2.11+cu128 on Python 3.13.
KERNEL = (
    "torch==2.13.0 transformers==5.15.* datasets==4.0.* accelerate==1.14.* peft==0.20.* pyarrow==18.1.* numpy==2.1.* pandas rich matplotlib"
)
RUNNER = "pip ipykernel nbclient nbconvert"
CHROMIUM = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync --hide-scrollbars --window-size=1100,9000"
)


def main() -> None:
    """Run the command line; exit status 0 only where every cell ran and the kernel's packages are as they were."""
    parser = argparse.ArgumentParser(description="Run the notebook as on Colab.")
    parser.add_argument("--work", type=Path, help="keep the kernel's environment here, for the next run (default: a temporary folder)")
    parser.add_argument("--python", default="python3.11", help="a Python with pip, to make the environment with (default python3.11)")
    options = parser.parse_args()
    with TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        kernel = make_kernel(work / "kernel", options.python)
        alone = make_lone_folder(Path(temporary) / "content")
        repository = make_repository(Path(temporary) / "repository")
        before = package_files(kernel)
        command = [kernel, "benchmarks/run_notebook.py", "--folder", alone, "--out", OUT, "--set", f"LAB_REPO={repository}"]
        failed = subprocess.run(command, cwd=ROOT).returncode
        after = package_files(kernel)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        print(f"kernel's packages: {len(before):,} files, {len(changed)} of them changed by the run {changed[:5]}")
        engine = alone / "qwen-distillation-lab" / ".train-env" / "engine.json"
        print(f"engine's environment: {json.loads(engine.read_text()) if engine.is_file() else 'none was made'}")
        take_picture(Path(temporary) / "chromium")
        sys.exit(1 if failed or changed or not engine.is_file() else 0)


def make_kernel(folder: Path, python: str) -> Path:
    """An environment with the versions of Colab's image; returns its interpreter. One that is there is kept."""
    interpreter = folder / "bin" / "python"
    if not (folder / "made").is_file():
        subprocess.run([python, "-m", "venv", "--without-pip", folder], check=True)
        subprocess.run([python, "-m", "pip", "--python", interpreter, "install", "--quiet", *KERNEL.split(), *RUNNER.split()], check=True)
        (folder / "made").touch()
    return interpreter


def make_lone_folder(folder: Path) -> Path:
    """A folder with notebook.ipynb and nothing else, as when it is opened from its address."""
    folder.mkdir()
    shutil.copy(ROOT / "notebook.ipynb", folder)
    return folder


def make_repository(folder: Path) -> Path:
    """A repository of the working tree as it is, for LAB_REPO to point to; the project's own is left alone."""
    listed = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True)
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    identity = ["-c", "user.name=lab", "-c", "user.email=lab@localhost"]
    for command in (["init", "--quiet"], ["add", "--all"], [*identity, "commit", "--quiet", "-m", "working tree"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def package_files(python: Path) -> dict[str, str]:
    """SHA-256 of every file of an environment's packages, bytecode aside."""
    (packages,) = python.parent.parent.glob("lib/python*/site-packages")
    files = (file for file in packages.rglob("*") if file.is_file() and file.suffix != ".pyc")
    return {str(file.relative_to(packages)): _hash(file) for file in files}


def _hash(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def take_picture(profile: Path) -> None:
    """The page as a browser shows it, where Chromium is there."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium is here: no picture of the page")
        return
    page, picture = OUT / "notebook.html", OUT / "notebook.png"
    places = [f"--user-data-dir={profile}", f"--screenshot={picture}", page.as_uri()]
    subprocess.run([browser, *CHROMIUM.split(), *places], check=True, capture_output=True, timeout=120)
    print(f"picture: {picture}")


if __name__ == "__main__":
    main()
