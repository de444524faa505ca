"""Nothing that a user hands over runs: no code of a model, no pickle, no name, no text on a page. And no secret is written down."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest
import standin_easydistill2
from openai_server import OpenAIServer

from distill import compare, compare_page, data, easydistill, label, models, notebook, pipeline, store, traces
from distill.cli import main
from distill.console import visible
from distill.endpoint import Endpoint
from distill.errors import ConfigError, DataError, DistillError

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [*sorted((ROOT / "distill").glob("*.py")), ROOT / "distill_app.py"]
# what any shell, Python's -c, str.format or an option's parser would act on
NASTY = "--help; touch pwned; $(touch pwned)`touch pwned` && touch 'pwned' \"|\" touch pwned\n$HOME {0} %s -c import os"


def called(tree: ast.Module) -> list[tuple[str, ast.Call]]:
    """Every call of a module as (dotted name, node)."""
    return [(ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call)]


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request) -> ast.Module:
    return ast.parse(request.param.read_text(encoding="utf-8"))


# What the source never does


def test_no_shell_no_evaluation_no_archive_no_pickle(source):
    forbidden = r"eval|exec|os\.(system|popen)|.*getoutput|pickle\..*|torch\.load|marshal\..*|yaml\.load|.*unpack_archive|.*extractall"
    assert not [name for name, _ in called(source) if re.fullmatch(forbidden, name)]
    modules = {"pickle", "marshal", "shelve", "tarfile", "zipfile", "dill", "joblib"}
    for node in ast.walk(source):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        assert not modules & {name.split(".")[0] for name in names}


def test_a_command_is_a_list_and_remote_code_is_never_trusted(source):
    for name, call in called(source):
        given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert given.get("shell", "False") == "False" and given.get("trust_remote_code", "False") == "False"
        if name.startswith("subprocess.") and call.args:
            assert not isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp) or isinstance(call.args[0], ast.List)
    for node in ast.walk(source):
        assert not (isinstance(node, ast.Constant) and str(node.value).strip("-") == "trust-remote-code")


# Code that comes with a model


@pytest.fixture
def model_folder(micro, tmp_path) -> Path:
    """A copy of a micro student, to be changed."""
    return Path(shutil.copytree(micro / "student_system1", tmp_path / "model"))


def edit(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def bring_code(folder: Path, model_type: str) -> Path:
    """Let a model folder name code of its own; returns the file that it would make."""
    proof = folder.parent / "pwned"
    (folder / "evil.py").write_text(f"import pathlib\npathlib.Path({str(proof)!r}).touch()\nclass Config: pass\nclass Model: pass\n")
    edit(folder / "config.json", model_type=model_type, auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    edit(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Config", "evil.Config"]})
    return proof


@pytest.mark.parametrize("load", [models.check_student, models.load_student, models.load_to_train, models.load_teacher])
def test_code_beside_a_model_of_a_known_kind_is_not_run(model_folder, load):
    proof = bring_code(model_folder, "qwen2")
    load(str(model_folder))
    assert not proof.exists()


@pytest.mark.parametrize("load", [models.load_student, models.load_to_train, models.load_teacher])
def test_a_model_that_needs_code_of_its_own_is_refused(model_folder, load):
    proof = bring_code(model_folder, "no_such_kind")
    with pytest.raises(ConfigError, match="code of its own") as error:
        load(str(model_folder))
    assert not proof.exists() and "trust_remote_code" not in str(error.value)


def test_nobody_is_asked_whether_code_may_run(model_folder):
    """transformers asks on standard input where nothing is said, and takes a y for a yes."""
    proof = bring_code(model_folder, "no_such_kind")
    code = "import sys; from distill import models; models.load_to_train(sys.argv[1])"
    done = subprocess.run([sys.executable, "-c", code, str(model_folder)], cwd=ROOT, input="y\n" * 9, capture_output=True, text=True)
    assert done.returncode == 1 and "code of its own" in done.stderr and "[y/N]" not in done.stdout and not proof.exists()


# Pickles


class MakesAFolder:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = str(place)

    def __reduce__(self):
        return os.mkdir, (self.place,)


def write_pickles(folder: Path, *names: str) -> Path:
    """Pickles that make a folder when they are opened; returns that folder's path."""
    import torch

    proof = folder.parent / "pwned"
    for name in names:
        torch.save({"lm_head.weight": MakesAFolder(proof)}, folder / name)
    return proof


LOADERS = {
    "check_student": models.check_student,
    "load_student": models.load_student,
    "load_teacher": models.load_teacher,
    "load_to_train": models.load_to_train,
    "load_quantized": lambda folder: models.load_quantized(folder, "fp32"),
    "label": lambda folder: label.label_with_teacher(folder, None, ["What?"]),
    "prepare": lambda folder: traces.prepare_system2_dataset(source=str(ROOT / "data/micro/omnithought.parquet"), student_model=folder),
    "distil": lambda folder: pipeline.distill_system1({"preset": "micro_system1", "student_model": folder}),
    "ask": lambda folder: notebook.ask_student(folder, "What?"),
    "compare": lambda folder: compare.compare_models(["What?"], folder, folder, folder),
    "serve": lambda folder: Endpoint(folder).check(),
}


def test_the_pickles_of_these_tests_would_run_if_they_were_opened(tmp_path):
    import torch

    (tmp_path / "model").mkdir()
    proof = write_pickles(tmp_path / "model", "pytorch_model.bin")
    torch.load(tmp_path / "model" / "pytorch_model.bin", weights_only=False)
    assert proof.is_dir()


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_a_model_that_is_a_pickle_is_refused_unopened(model_folder, project, load):
    (model_folder / "model.safetensors").unlink()
    proof = write_pickles(model_folder, "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only a pickle \(pytorch_model.bin\)[\s\S]*safetensors"):
        load(str(model_folder))
    assert not proof.exists()


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_an_adapter_beside_a_model_is_refused_unopened(model_folder, project, load):
    """transformers would load it into the model, from a pickle where there is no other."""
    proof = write_pickles(model_folder, "adapter_model.bin")
    settings = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "base_model_name_or_path": str(model_folder)}
    (model_folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="holds an adapter"):
        load(str(model_folder))
    assert not proof.exists()


def test_an_adapter_from_the_hub_is_refused(micro, tmp_path):
    commit = "0" * 40
    model = tmp_path / "hub" / "models--acme--adapter"
    shutil.copytree(micro / "student_system1", model / "snapshots" / commit)
    (model / "snapshots" / commit / "adapter_config.json").write_text("{}")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text(commit)
    code = "from distill import models; models.check_student('acme/adapter')"
    variables = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert "Invalid student model: acme/adapter: it holds an adapter" in done.stderr


@pytest.mark.parametrize("load", [models.load_student, models.load_teacher, models.load_to_train])
def test_of_safetensors_and_pickle_the_pickle_is_not_opened(model_folder, load):
    proof = write_pickles(model_folder, "pytorch_model.bin", "training_args.bin", "optimizer.pt", "adapter_model.bin")
    model, _ = load(str(model_folder))
    assert model.num_parameters() > 100_000 and not proof.exists()


def test_what_is_downloaded_is_neither_code_nor_pickle():
    from fnmatch import fnmatch

    hostile = ("pytorch_model.bin", "modeling_evil.py", "model.pt", "model.pth", "weights.ckpt", "model.pkl", "run.sh", "tf_model.h5")
    assert not [name for name in hostile for pattern in models.MODEL_FILES if fnmatch(name, pattern)]


# Names


COMMANDS = {
    "a source": ["prepare-system1", "--source={}"],
    "a slice": ["prepare-system1", "--source=rows.json", "--slice={}"],
    "a column": ["prepare-system1", "--source=rows.json", "--columns=instruction={}"],
    "a field": ["prepare-system1", "--source=rows.json", "--columns={}"],
    "a mixture": ["prepare-system1", "--mix={}"],
    "a tokenizer": ["prepare-system2", "--source=rows.json", "--student={}"],
    "a file of questions": ["label", "./{}", "--teacher={}", "--out={}.json"],
    "a teacher": ["traces", "--source=rows.json", "--teacher={}"],
    "a prompt": ["traces", "--source=rows.json", "--teacher=t", "--endpoint=http://127.0.0.1:9/v1", "--prompt-file={}"],
    "a key's variable": ["score", "rows.json", "--model=m", "--endpoint=http://127.0.0.1:9/v1", "--key-variable={}", "--out=o.json"],
    "a judge": ["judge", "./{}", "--model={}"],
    "a trace": ["shorten", "./{}", "--model={}", "--out={}.json"],
    "an endpoint": ["label", "rows.json", "--teacher=t", "--endpoint={}", "--out=o.json"],
    "a preset": ["system1", "--preset={}"],
    "a configuration": ["system2", "--config={}"],
    "a setting": ["system1", "--set={}"],
    "a student": ["system1", "--set=student_model={}"],
    "a place": ["system2", "--set=out_dir={}", "--set=config_path={}.json", "--set=cot_path={}"],
    "models": ["compare", "What?", "--teacher={}", "--system1={}", "--system2={}"],
    "a checkpoint": ["chat", "./{}"],
    "an extra": ["setup-easydistill", "--with", "{}"],
}
NAMES = [NASTY, "--help", "-c", "; touch pwned", "$(touch pwned)", "`touch pwned`", "a\ntouch pwned", "| touch pwned", "it's", '"', "*"]


def pwned(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob("*") if "pwned" in path.name and "touch" not in path.name]


@pytest.mark.parametrize("arguments", COMMANDS.values(), ids=COMMANDS)
def test_a_name_on_the_command_line_is_a_name(arguments, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (project / "rows.json").write_text('[{"instruction": "a", "output": "b"}]')
    for name in NAMES:
        with suppress(SystemExit):  # argparse's own refusal
            assert main([part.format(name) for part in arguments] if name != NASTY else [part.replace("{}", name) for part in arguments])
    assert not pwned(tmp_path) and not (ROOT / "pwned").exists()


FUNCTIONS = {
    "run_easy_distill": pipeline.run_easy_distill,
    "load_teacher": models.load_teacher,
    "load_student": models.load_student,
    "plot_loss": notebook.plot_loss,
    "ask_student": lambda name: notebook.ask_student(name, "What?"),
    "show_training_row": lambda name: notebook.show_training_row(name, name, "system1"),
    "label_with_teacher": lambda name: label.label_with_teacher(name, None, ["What?"]),
    "prepare_system1_dataset": lambda name: data.prepare_system1_dataset(source="rows.json", out_labeled=name, out_instructions=name),
    "write_system1_config": lambda name: pipeline.write_system1_config(
        {"teacher_model": name, "template_path": name, "labeled_path": name}
    ),
    "setup_easydistill": lambda name: easydistill.setup_easydistill(extras=[name]),
    "read_rows": lambda name: list(store.read_rows(name)),
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_a_name_in_python_is_a_name(function, name, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DistillError):
        function(name)
    assert not pwned(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_easydistills_place_is_a_name(name, project, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EASYDISTILL_HOME", name)
    assert easydistill.find(1)[0] is None and not pwned(tmp_path)


# A whole job with nasty names and with keys, by the real command line


SECRETS = {"HF_TOKEN": "hf_aSecretThatNobodyMayRead", "OPENAI_API_KEY": "sk-another-secret-nobody-may-read"}
PASSWORD = "aPasswordThatNobodyMayRead"


class Watch:
    """The arguments of all processes that this one starts, looked at all the time while the block runs."""

    def __enter__(self):
        self.seen, self._over = set(), threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            for child in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    self.seen.add("\0".join(child.cmdline()))


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A copy of the lab in which every file, column and model is called NASTY: prepared, trained, labelled, compared; and four failures.

    Returns (the copy, its commands as they ended, Watch, the endpoint that was asked).
    """
    lab, packages = tmp_path_factory.mktemp("nasty") / "lab", tmp_path_factory.mktemp("easydistill")
    nasty = lab / NASTY
    for part in ("distill", "configs", "distill_app.py", "requirements.txt", "constraints.txt"):
        (lab / part).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / part).is_dir() else shutil.copy)(ROOT / part, lab / part)
    shutil.copytree(ROOT / "data" / "micro" / "student_system1", nasty / "student")
    rows = [{NASTY: f"Tell me the parity of {number}. {NASTY}", "answer": "even"} for number in range(1000, 1034)]
    (nasty / "rows.json").write_text(json.dumps(rows))
    (nasty / "questions.json").write_text(json.dumps([{"instruction": row[NASTY]} for row in rows[:2]]))
    with OpenAIServer(model=NASTY, key=SECRETS["OPENAI_API_KEY"]) as server, Watch() as watch:
        variables = {**os.environ, **SECRETS, "PYTHONPATH": str(lab), "HF_HOME": str(lab / "hf")}
        variables["EASYDISTILL_HOME"] = str(standin_easydistill2.build(packages))
        done = {}
        for name, command in nasty_commands(server).items():
            done[name] = subprocess.run(
                [sys.executable, "distill_app.py", *command], cwd=lab, env=variables, capture_output=True, text=True, timeout=180
            )
    return lab, done, watch, server


def nasty_commands(server: OpenAIServer) -> dict[str, list[str]]:
    columns, questions = f"--columns=instruction={NASTY},output=answer", f"./{NASTY}/questions.json"
    out = [f"--out-labeled={NASTY}/labeled.json", f"--out-instructions={NASTY}/instructions.json"]
    settings = {"student_model": "student", "labeled_path": "labeled.json", "out_dir": "out", "config_path": "job.json"}
    train = [f"--set={key}={NASTY}/{name}" for key, name in settings.items()]
    nobody = f"--teacher={NASTY}/nobody"
    return {
        "prepare": ["prepare-system1", f"--source={NASTY}/rows.json", "--slice=train", columns, *out],
        "train": ["system1", "--preset=micro_system1", *train, "--set=num_epochs=1", "--set=backend=builtin"],
        "endpoint": ["label", questions, f"--teacher={NASTY}", f"--endpoint={server.base_url}", f"--out={NASTY}/asked.json"],
        "compare": ["compare", NASTY, nobody, f"--system1={NASTY}/out", f"--system2={NASTY}/nobody"],
        "failed address": ["label", questions, "--teacher=t", f"--endpoint=https://me:{PASSWORD}@host/v1", "--out=o.json"],
        "failed name": ["label", questions, "--teacher=t", f"--endpoint={server.base_url}", "--out=o.json"],
        "failed hub": ["system1", "--preset=micro_system1", *train, "--set=student_model=nobody/nothing"],
        "failed key": ["label", questions, "--teacher=t", "--endpoint=http://h/v1", f"--key-variable={PASSWORD}!", "--out=o.json"],
    }


def test_nasty_names_do_no_harm_to_a_job(job):
    lab, done, *_ = job
    failed = {name for name, one in done.items() if one.returncode}
    assert failed == {name for name in done if name.startswith("failed")}, "\n".join(one.stdout + one.stderr for one in done.values())
    assert (lab / NASTY / "out" / "distill_run.json").is_file() and (lab / NASTY / "asked.json").is_file()
    assert not pwned(lab.parent)


def test_no_secret_is_in_any_file(job):
    lab, *_ = job
    files = [path for path in lab.rglob("*") if path.is_file()]
    assert any(path.name == "train.log" for path in files) and any(path.name == "distill_run.json" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not [secret for secret in (*SECRETS.values(), PASSWORD) if secret.encode() in content], path


def test_no_secret_is_said(job):
    _, done, *_ = job
    assert all("Error: " in done[name].stderr for name in done if name.startswith("failed"))
    for one in done.values():
        assert not [secret for secret in (*SECRETS.values(), PASSWORD) if secret in one.stdout + one.stderr]


def test_no_secret_is_a_process_argument_but_the_server_got_its_key(job):
    _, _, watch, server = job
    assert server.keys == {SECRETS["OPENAI_API_KEY"]}
    assert all(any(module in seen for seen in watch.seen) for module in ("distill.train", "distill.answers", "easydistill.cli"))
    assert not [seen for seen in watch.seen if any(secret in seen for secret in SECRETS.values())]


@pytest.mark.parametrize(
    "arguments",
    [
        ["system1", "--set=student_model={}"],
        ["system1", "--set=labeled_path={}"],
        ["system1", "--preset={}"],
        ["chat", "{}"],
        ["compare", "What?", "--teacher={}", "--system1={}", "--system2={}"],
        ["label", "{}", "--teacher={}", "--out=o.json"],
        ["prepare-system1", "--source={}"],
        ["traces", "--source={}", "--teacher={}"],
    ],
)
@pytest.mark.parametrize("name", [f"https://me:{PASSWORD}@host/x.json", f"https://{SECRETS['HF_TOKEN']}@huggingface.co/a/b"])
def test_a_secret_in_a_name_is_not_repeated(arguments, name, project, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert main([part.format(name) for part in arguments]) == 1
    said = capsys.readouterr()
    assert PASSWORD not in said.out + said.err and SECRETS["HF_TOKEN"] not in said.out + said.err


# Pages


PAYLOADS = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "&lt;b&gt; &amp; &#60;script&#62;",
    "</div></details></style><svg onload=alert(1)>",
    "]]><!-- --><?php ?>{{ 7*7 }}${7*7}",
    "javascript:alert(1) a\u2028b\u2029c",
    "right \u202eto left\u202c \u2066isolate\u2069 \x1b[2J\x00",
]


class Page(HTMLParser):
    """A page's tags, attributes and text, as a browser would make them of it."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.attributes, self.text = set(), set(), ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attributes}

    def handle_data(self, data):
        self.text += data


def compared(text: str) -> compare.Comparison:
    column = {"role": "teacher", "name": text, "path": text, "bits": 8, "max_new_tokens": 9, "parameters": 1, "weight_bytes": 1}
    column |= {"device": text, "load_seconds": 1.0, "versions": {"torch": text}}
    said = {"text": text, "reasoning": text, "final": text, "tokens": 1, "seconds": 1.0, "tokens_per_second": 1.0, "stopped": True}
    answer = {"prompt": 0, "mode": "system1", "role": "teacher", **said}
    asked = {"prompt": text, "modes": ["system1"]}
    return compare.Comparison(prompts=[asked], columns=[column], answers=[answer], missing={"system1": text}, made=text)


SURFACES = {
    "comparison": lambda text: compared(text)._repr_html_(),
    "comparison's file": lambda text: compare_page.html_page(compared(text).to_dict()),
    "training row": lambda text: notebook.RenderedRow([(text, True), (text, False)], {"asked": 1, "supervised": 1})._repr_html_(),
    "answer": lambda text: notebook.StudentAnswer(text, text, text, 1, 1.0, True)._repr_html_(),
}


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("surface", SURFACES.values(), ids=SURFACES)
def test_a_page_shows_text_as_text(surface, payload):
    page, plain = Page(surface(payload)), Page(surface("plain"))
    assert page.tags == plain.tags and page.attributes == plain.attributes
    # a training row marks its line breaks
    shown = page.text.replace("⏎", "")
    assert visible(payload) in shown
    assert not re.search("[\u202a-\u202e\u2066-\u2069\u2028\u2029\x00\x1b]", shown)


# Paths


@pytest.mark.parametrize("name", ["../secret.json", "../../../etc/passwd", "{tmp}/secret.json", "a/../../secret.json"])
def test_a_manifest_that_names_a_file_outside_of_its_folder_is_refused(project, tmp_path, name):
    rows = store.write_json(project / "data" / "rows.json", [])
    secret = store.write_json(tmp_path / "secret.json", {})
    fact = {"bytes": secret.stat().st_size, "sha256": store.hash_file(secret)}
    store.write_json(project / "data" / "rows.json.manifest.json", {"files": {name.format(tmp=tmp_path): fact}})
    with pytest.raises(DataError, match="outside of its folder"):
        store.read_manifest(rows)
