"""A stand-in for EasyDistill 2.x that behaves as the real one was seen to: a real little environment beside a checkout with prompts, a
command line that asks the given server for real, writes at its end alone, and ends with exit status 0 whatever is missing.

`build(folder, behaviour)` makes one; EASYDISTILL_HOME names the checkout that it returns. A behaviour is one of BEHAVIOURS.
"""

import json
import sys
from pathlib import Path

VERSIONS = {"openai": "1.99", "pydantic": "2.11", "httpx": "0.28", "pyyaml": "6.0", "langgraph": "0.6"}
BEHAVIOURS = ("works", "half", "none", "killed once", "killed", "hangs", "says the key", "twice", "broken line", "fails")
METRICS = {
    "default_eval_prompts.yaml": ["informativeness", "helpfulness", "generalization", "correctness"],
    "default_cot_eval_prompts.yaml": ["reasoning_verbosity", "cognitive_difficulty", "logical_correctness"],
}

MAIN = '''
import json, os, re, signal, sys, time, urllib.error, urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parents[2]
BEHAVIOUR = (HERE / "behaviour").read_text()
STARTED = HERE / "started"


def log(text):
    print(f"2026-01-01 - easydistill - INFO - {text}", file=sys.stderr, flush=True)


def expanded(value):
    """Every $NAME in settings becomes what the environment says, and an unknown one is an error."""
    if isinstance(value, str):
        def replace(found):
            name = found[1] or found[2]
            if name not in os.environ:
                raise ValueError(f"Config references unset environment variable '{name}'")
            return os.environ[name]
        return re.sub(r"\\$\\{(\\w+)\\}|\\$(\\w+)", replace, value)
    if isinstance(value, dict):
        return {key: expanded(one) for key, one in value.items()}
    return [expanded(one) for one in value] if isinstance(value, list) else value


def request(path, body=None):
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}", "Content-Type": "application/json"}
    data = json.dumps(body).encode() if body else None
    asked = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + path, data, headers)
    with urllib.request.urlopen(asked, timeout=60) as answer:
        return json.load(answer)


def why(error):
    if isinstance(error, urllib.error.HTTPError):
        return f"Error code: {error.code} - {error.read().decode()}"
    return "Connection error."


def generate(backend, settings, name, text):
    """One answer, or None after a few attempts: the row is then missing, and nobody is told."""
    body = {"model": backend["model_id"], "messages": [{"role": "user", "content": text}], "temperature": settings["temperature"],
            "max_tokens": settings["max_tokens"]}
    for attempt in range(2):
        try:
            answer = request("/chat/completions", body)
        except OSError as error:
            said = why(error)
            if said.startswith("Error code: 4"):
                break
            time.sleep(0.05)
        else:
            log('HTTP Request: POST http://x/v1/chat/completions "HTTP/1.1 200 OK"')
            return answer
    log(f"Failed to generate for instruction {name} after 2 attempts: {said}")
    return None


def score(text):
    found = re.search(r"<score>(\\d+)</score>", text) or re.search(r"\\b(\\d+)\\b", text)
    return int(found[1]) if found else None


def judged(backend, settings, row, output, prompts):
    scores = {}
    for metric in settings["metrics"]:
        text = prompts[metric].format(instruction=row["instruction"], output=row[output])
        answer = generate(backend, settings, f"{row['id']}_{metric}", text)
        if answer:
            value = score(answer["choices"][0]["message"]["content"])
            scores[metric] = bool(value) if "correctness" in metric and value is not None else value
    return {**row, **scores}


def labelled(backend, settings, row):
    text = row["instruction"]
    if "prompt_template_file" in settings:
        text = open(settings["prompt_template_file"], encoding="utf-8").read().rstrip("\\n").format(instruction=text)
    answer = generate(backend, settings, row["id"], text)
    if answer is None:
        return None
    said = answer["choices"][0]["message"]["content"]
    extra = {key: value for key, value in row.items() if key not in ("id", "instruction")}
    metadata = {"request_id": row["id"], **extra, **({"usage": answer["usage"]} if "usage" in answer else {})}
    return {"messages": [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": said}], "metadata": metadata}


def work(config):
    backend = expanded(config["backend"])
    try:
        request("/models")
    except OSError as error:
        log(f"Backend health check failed: {why(error)}")
        sys.exit("RuntimeError: Backend health check failed. Check your backend config and connectivity.")
    rows = [json.loads(line) for line in open(config["dataset"]["input_path"], encoding="utf-8")]
    if config["job_type"] == "instruct_distill":
        settings, place = config["generation"], config["dataset"]["output_path"]
        one = lambda row: labelled(backend, settings, row)
    else:
        stages = config.get("pipeline")
        settings = stages[0]["config"] if stages else config["eval"]
        place = stages[0]["output_path"] if stages else config["dataset"]["output_path"]
        output = "response" if stages else "output"
        name = "default_eval_prompts.yaml" if config["job_type"] == "instruct_eval" else "default_cot_eval_prompts.yaml"
        prompts = json.load(open(f"configs/prompts/{name}", encoding="utf-8"))
        one = lambda row: judged(backend, settings, row, output, prompts)
    with ThreadPoolExecutor(settings["max_workers"]) as pool:
        return [line for line in pool.map(one, rows) if line is not None], place


def main():
    times = int(STARTED.read_text()) + 1 if STARTED.exists() else 1
    STARTED.write_text(str(times))
    config = expanded(json.load(open(sys.argv[sys.argv.index("--config") + 1], encoding="utf-8")))
    if BEHAVIOUR == "fails":
        raise ValueError("Extra inputs are not permitted")
    if BEHAVIOUR == "hangs":
        time.sleep(600)
    if BEHAVIOUR == "says the key":
        log(f"the key is {os.environ['OPENAI_API_KEY']}")
    lines, place = work(config)
    if BEHAVIOUR == "killed" or (BEHAVIOUR == "killed once" and times == 2):
        os.kill(os.getpid(), signal.SIGKILL)
    chosen = {"half": lines[::2], "none": [], "twice": [line for line in lines for _ in range(2)]}.get(BEHAVIOUR, lines)
    with open(place, "w", encoding="utf-8") as file:
        for line in chosen:
            file.write(json.dumps(line, ensure_ascii=False) + "\\n")
        if BEHAVIOUR == "broken line":
            file.write('{"messages": [{"role": "us')
'''


def build(folder: Path, behaviour: str = "works", prompts: bool = True) -> Path:
    """Make the stand-in in `folder`; returns its checkout, which brings its environment.

    prompts  whether it has the judge's prompts, which an installed wheel lacks
    """
    assert behaviour in BEHAVIOURS
    checkout = folder / "checkout2"
    environment = checkout / ".venv"
    packages = environment / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    files = {
        checkout / "behaviour": behaviour,
        checkout / "easydistill" / "__init__.py": '__version__ = "2.0.0"\n',
        checkout / "easydistill" / "cli" / "__init__.py": "",
        checkout / "easydistill" / "cli" / "main.py": MAIN,
        checkout / "easydistill" / "cli" / "__main__.py": "from easydistill.cli.main import main\n\nmain()\n",
        packages / "standin.pth": f"{checkout}\n",
        environment / "pyvenv.cfg": f"home = {Path(sys.base_prefix) / 'bin'}\ninclude-system-site-packages = false\n",
    }
    files |= {
        packages / f"{name}-{version}.dist-info" / "METADATA": f"Name: {name}\nVersion: {version}\n" for name, version in VERSIONS.items()
    }
    if prompts:
        files |= {
            checkout / "configs" / "prompts" / name: json.dumps({metric: metric + ": {instruction} => {output}" for metric in metrics})
            for name, metrics in METRICS.items()
        }
    for path, text in files.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    python = environment / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    if not python.is_symlink():
        python.symlink_to(Path(sys.executable).resolve())
    return checkout
