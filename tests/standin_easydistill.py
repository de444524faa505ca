"""A stand-in for EasyDistill 1.x that behaves as the real one was seen to: a real little environment, and a checkout whose command line
runs `accelerate launch …` through a shell string, logs what comes, and ends with exit status 0 whatever happens.

`build(folder, behaviour)` makes one; EASYDISTILL_HOME names what it returns. A behaviour is one of BEHAVIOURS: what its training does.
"""

import re
import sys
from pathlib import Path

CLI = """
import json, logging, os, subprocess, sys
logging.basicConfig(level=logging.INFO, format="%(asctime)s - %(levelname)s - %(message)s")
here = os.path.dirname(os.path.abspath(__file__))
config = sys.argv[sys.argv.index("--config") + 1]
assert json.load(open(config))["job_type"] == "kd_black_box_train_only"
settings = os.path.join(os.path.dirname(here), "configs/accelerate_config/muti_gpu.yaml")
command = f"accelerate launch --config_file {settings} {os.path.join(here, 'kd/train.py')} --config {config}"
logging.info(f"Running command: {command}")
os.environ["STANDIN_CLI"] = str(os.getpid())
child = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
for line in child.stdout:
    logging.info(line.rstrip())
    if "error" in line.lower() or "failed" in line.lower():
        logging.error(f"Detected error in output: {line.strip()}")
if child.wait():
    logging.error(f"Command failed (returncode={child.returncode}, errors detected)")
"""

ACCELERATE = """
import subprocess, sys
at = next(number for number, word in enumerate(sys.argv) if word.endswith(".py") and number)
print("accelerate", *sys.argv[1:at], flush=True)
command = [sys.executable, *sys.argv[at:]]
status = subprocess.run(command).returncode
if status:
    raise subprocess.CalledProcessError(status, command)
"""

TRAIN = '''
import json, os, sys, time
from pathlib import Path
import numpy
from safetensors.numpy import save_file

HERE = Path(__file__).resolve().parents[2]
job = json.load(open(sys.argv[sys.argv.index("--config") + 1]))
student, out = Path(job["models"]["student"]), Path(job["training"]["output_dir"])


def student_weights():
    """As fp32, whatever they are stored in."""
    raw = (student / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    made = {}
    for name, fact in json.loads(raw[8:start]).items():
        if name != "__metadata__":
            first, last = fact["data_offsets"]
            bits = numpy.frombuffer(raw[start + first : start + last], {"BF16": "<u2", "F32": "<f4"}[fact["dtype"]])
            values = (bits.astype("<u4") << 16).view("<f4") if fact["dtype"] == "BF16" else bits
            made[name] = values.reshape(fact["shape"]).copy()
    return made


def steps(count=4):
    every = job["training"]["logging_steps"]
    for step in range(count + 1):
        print(f" {step * 25}%|##        | {step}/{count} [00:00<00:05,  6.47it/s]", file=sys.stderr, flush=True)
        if step and step % every == 0:
            print({"loss": 4.0 / step, "grad_norm": float("nan"), "learning_rate": 1e-05, "epoch": step / count}, flush=True)


def end():
    print({"train_runtime": 1.5, "train_samples_per_second": 9.0, "train_loss": 2.0, "epoch": 1.0}, flush=True)


def save(weights):
    out.mkdir(exist_ok=True)
    (out / "config.json").write_text((student / "config.json").read_text())
    (out / "tokenizer.json").write_text((student / "tokenizer.json").read_text())
    save_file(weights, out / "model.safetensors", {"format": "pt"})


def changed(by=0.01):
    return {name: values + numpy.float32(by) for name, values in student_weights().items()}


def trains():
    print("job", json.dumps(job))
    print("variables", json.dumps(sorted(os.environ)), os.environ["PATH"], os.environ["PYTHONPATH"], os.environ["HF_HOME"], flush=True)
    steps(), end(), save(changed())


def says_error():
    print("0 errors, nothing failed; ErrorCounter: 0 exceptions", flush=True)
    trains()


def dies():
    steps(2)
    raise RuntimeError("a shape does not fit")


def does_nothing():
    pass


def saves_nothing():
    steps(), end()


def saves_the_student():
    steps(), end(), save(student_weights())


def saves_nan():
    steps(), end(), save(changed(float("nan")))


def saves_a_part():
    steps(), end(), save({name: values for name, values in changed().items() if "layers.0." not in name})


def saves_a_torn_file():
    steps(), end(), save(changed())
    os.truncate(out / "model.safetensors", 4096)


def is_killed():
    steps(2)
    os.kill(os.getpid(), 9)


def loses_its_command_line():
    os.kill(int(os.environ["STANDIN_CLI"]), 9)
    time.sleep(60)


def crashes():
    os.kill(os.getpid(), 11)


def hangs():
    steps(1)
    time.sleep(60)


def fills_the_gpu():
    steps(1)
    raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.74 GiB")


def fills_the_memory():
    import resource

    resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
    numpy.ones(2**33)


def fills_the_disk():
    steps(), end()
    with open("/dev/full", "w") as file:
        file.write("x" * 2**20)


def meets_an_unknown_setting():
    raise TypeError("SFTConfig.__init__() got an unexpected keyword argument 'learnin_rate'")


def finds_no_data():
    raise FileNotFoundError("Unable to find '/x/tokens.json'")


def finds_no_student():
    raise OSError("/x/student does not appear to have a file named config.json.")


def meets_a_new_student():
    raise ValueError("The checkpoint has model type `qwen9` but Transformers does not recognize this architecture.")


def lacks_a_package():
    import vllm  # noqa: F401


def asks_for_wandb():
    raise RuntimeError("wandb.errors.errors.UsageError: api_key not configured (no-tty). call wandb.login(key=[your_api_key])")


globals()[(HERE / "behaviour").read_text()]()
'''

BEHAVIOURS = re.findall(r"^def (\w+)", TRAIN[TRAIN.index("def trains") :], re.M)
VERSIONS = {"torch": "2.13.0", "transformers": "4.51.1", "trl": "0.17.0", "tokenizers": "0.21.1", "datasets": "5.0.1"}
VERSIONS |= {"accelerate": "1.15.0", "jsonlines": "4.0.0"}


def build(folder: Path, behaviour: str = "trains") -> Path:
    """Make the stand-in in `folder`; returns its environment."""
    assert behaviour in BEHAVIOURS
    checkout, environment = folder / "checkout", folder / "environment"
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    ours = next(path for path in sys.path if (Path(path) / "safetensors").is_dir())
    files = {
        checkout / "behaviour": behaviour,
        checkout / "easydistill" / "__init__.py": "",
        checkout / "easydistill" / "cli.py": CLI,
        checkout / "easydistill" / "kd" / "train.py": TRAIN,
        packages / "standin.pth": f"{checkout}\n{ours}\n",
        packages / "accelerate" / "__init__.py": "",
        packages / "accelerate" / "commands" / "__init__.py": "",
        packages / "accelerate" / "commands" / "launch.py": ACCELERATE,
        environment / "pyvenv.cfg": f"home = {Path(sys.base_prefix) / 'bin'}\ninclude-system-site-packages = false\n",
    }
    files |= {
        packages / f"{name}-{version}.dist-info" / "METADATA": f"Name: {name}\nVersion: {version}\n" for name, version in VERSIONS.items()
    }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    for name in ("python", "python3"):
        place = environment / "bin" / name
        place.parent.mkdir(exist_ok=True)
        if not place.is_symlink():
            place.symlink_to(Path(sys.executable).resolve())
    return environment
