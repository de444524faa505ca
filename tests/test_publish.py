"""A checkpoint goes to others: to a hub on this machine by the real huggingface_hub, to fewer bits, behind a port."""

import base64
import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from sealed_checkpoint import sealed

from distill import card, publish, server, store
from distill.errors import BackendError, ConfigError, DataError
from distill.models import RUN_RECORD

REPO = "acme/student"
TOKEN = "hf_" + "w" * 30
STANDIN = Path(__file__).with_name("openai_server.py")


class ReceivingHub:
    """A hub that takes what `create_repo` and `create_commit` send: small files in the commit, weights by the LFS protocol."""

    def __init__(self) -> None:
        self.repos, self.files, self.stored, self.refuses, self.asked = {}, {}, {}, None, []
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def post(self, path: str, body: bytes) -> tuple[int, dict]:
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            known = name in self.repos
            self.repos.setdefault(name, asked.get("private", asked.get("visibility") == "private"))
            return 409 if known else 200, {"url": f"{self.url}/{name}"}
        if path.endswith("/preupload/main"):
            kinds = {True: "lfs", False: "regular"}
            named = [file["path"] for file in json.loads(body)["files"]]
            return 200, {
                "files": [{"path": name, "uploadMode": kinds[name.endswith(".safetensors")], "shouldIgnore": False} for name in named]
            }
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.stored[value["oid"]]
        return 200, {"commitUrl": f"{self.url}/{REPO}/commit/1", "commitOid": "1" * 40}


class _Handler(BaseHTTPRequestHandler):
    hub: ReceivingHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        private = self.hub.repos.get(name)
        known = {"id": name, "private": private, "sha": "1" * 40, "tags": [], "siblings": []}
        self._answer(*((404, {"error": "not found"}) if private is None else (200, known)))

    def do_POST(self) -> None:
        self.hub.asked.append((self.path, self.headers.get("Authorization")))
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self._answer(*((self.hub.refuses, {"error": "no"}) if self.hub.refuses else self.hub.post(self.path.partition("?")[0], body)))

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.hub.stored[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def _answer(self, status: int, value: dict) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)


@pytest.fixture
def checkpoint(prepared_rows, project) -> Path:
    return sealed(project, prepared_rows)


@pytest.fixture
def trained(small_run, project) -> Path:
    """One that a training made."""
    return shutil.copytree(small_run["checkpoint"], project / "student")


@pytest.fixture
def hub(monkeypatch):
    from huggingface_hub import constants

    hub = ReceivingHub()
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield hub
    hub.close()


# Push


def test_a_dry_run_shows_what_would_be_sent_and_asks_nobody(checkpoint, hub, capsys):
    for name in (".env", "optimizer.bin", "token.txt", "notes.json"):
        (checkpoint / name).write_text("secret")
    before = sorted(checkpoint.iterdir())
    plan = publish.push_to_hub(checkpoint, REPO)
    assert not plan["sent"] and plan["private"] and not hub.asked and sorted(checkpoint.iterdir()) == before
    assert {each["name"] for each in plan["files"]} == {*store.read_json(checkpoint / RUN_RECORD)["files"], card.CARD, RUN_RECORD}
    assert plan["left_out"] == [".env", "notes.json", "optimizer.bin", "token.txt"]
    assert plan["bytes"] == sum(each["bytes"] for each in plan["files"]) > (checkpoint / "model.safetensors").stat().st_size
    said = capsys.readouterr().out
    assert "acme/student (private)" in said and "Nothing was sent" in said and "its license is unknown" in said


def test_what_is_sent_is_a_whole_checkpoint_without_this_machines_paths(checkpoint, hub, tmp_path, capsys):
    plan = publish.push_to_hub(checkpoint, REPO, dry_run=False, license="mit")
    assert plan["sent"] and plan["url"] == f"{hub.url}/{REPO}" and hub.repos == {REPO: True}
    assert {name: len(content) for name, content in hub.files.items()} == {each["name"]: each["bytes"] for each in plan["files"]}
    assert hub.stored and {key for _, key in hub.asked} >= {f"Bearer {TOKEN}"} and TOKEN not in capsys.readouterr().out
    came = tmp_path / "came"
    came.mkdir()
    for name, content in hub.files.items():
        (came / name).write_bytes(content)
    record = store.read_manifest(came, name=RUN_RECORD)
    assert record["job"]["models"]["student"] == "student_system1"
    for name in (RUN_RECORD, card.CARD):
        assert str(store.ROOT).encode() not in hub.files[name] and b"/tmp/" not in hub.files[name]
    assert f'name = "{REPO}"' in hub.files[card.CARD].decode()


def test_a_card_that_stands_there_is_sent_as_it_is(checkpoint, hub):
    (checkpoint / card.CARD).write_text("---\nlicense: mit\n---\nmine\n")
    publish.push_to_hub(checkpoint, REPO, dry_run=False, private=False)
    assert hub.files[card.CARD] == b"---\nlicense: mit\n---\nmine\n" and hub.repos == {REPO: False}


def test_the_labs_own_card_names_the_model_on_the_hub_and_an_edited_one_is_pointed_out(checkpoint, hub):
    place = Path(card.write_model_card(checkpoint, license="mit"))
    assert 'name = "student"' in place.read_text()
    plan = publish.push_to_hub(checkpoint, REPO, dry_run=False)
    assert hub.files[card.CARD].decode() == card.compose(checkpoint, card.read_record(checkpoint), license="mit", name=REPO)
    assert plan["problems"] == []
    place.write_text(place.read_text() + "mine\n")
    plan = publish.push_to_hub(checkpoint, REPO, dry_run=False)
    assert hub.files[card.CARD] == place.read_bytes() and plan["problems"] == [publish.EDITED]


def test_scores_of_another_model_are_not_pushed(checkpoint):
    model = {"role": "after", "path": str(checkpoint), "fingerprint": "0" * 64, "quality": {"system1": {}}}
    with pytest.raises(ConfigError, match="The evaluation is of other models than student"):
        publish.push_to_hub(checkpoint, REPO, evaluation={"models": {"system1": model}, "systems": {}})


def test_a_public_repository_is_left_alone_where_private_was_asked_for(checkpoint, hub):
    hub.repos[REPO] = False
    with pytest.raises(ConfigError, match="acme/student is public on the hub, and private was asked for"):
        publish.push_to_hub(checkpoint, REPO, dry_run=False)
    assert not hub.files and not hub.stored


@pytest.mark.parametrize("status", [401, 403])
def test_a_hub_that_refuses_says_which_token_it_wants(checkpoint, hub, status):
    hub.refuses = status
    with pytest.raises(
        ConfigError, match=f"The hub refuses acme/student with {status}: HF_TOKEN must be a token with write access to acme"
    ):
        publish.push_to_hub(checkpoint, REPO, dry_run=False)


def test_a_hub_that_fails_is_named_with_its_status(checkpoint, hub):
    hub.refuses = 500
    with pytest.raises(ConfigError, match="The hub does not take acme/student: 500"):
        publish.push_to_hub(checkpoint, REPO, dry_run=False)


def test_without_a_network_or_a_token_nobody_is_blamed(checkpoint, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="Cannot reach the hub for acme/student"):
        publish.push_to_hub(checkpoint, REPO, dry_run=False)
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ConfigError, match="No token for the hub, .* set HF_TOKEN"):
        publish.push_to_hub(checkpoint, REPO, dry_run=False)


@pytest.mark.parametrize("name", ["a b/c", "../x", "me/a--b", "https://huggingface.co/me/x", "", "me/x.git", "x"])
def test_a_name_that_the_hub_cannot_have_is_refused(checkpoint, name):
    with pytest.raises(ConfigError, match=r"repo_id = .*: (is no name on the hub|names no owner)"):
        publish.push_to_hub(checkpoint, name)


def test_a_damaged_checkpoint_and_a_file_with_a_key_are_not_sent(checkpoint, micro):
    with pytest.raises(ConfigError, match="is no checkpoint of the lab"):
        publish.push_to_hub(micro / "teacher", REPO)
    (checkpoint / card.CARD).write_text("---\nlicense: mit\n---\nread https://medium.com/@me/post\n")
    assert publish.push_to_hub(checkpoint, REPO)["files"]
    (checkpoint / card.CARD).write_text(f"my key is {TOKEN}")
    with pytest.raises(ConfigError, match=r"README.md of student holds what looks like a key") as caught:
        publish.push_to_hub(checkpoint, REPO)
    assert TOKEN not in str(caught.value)
    (checkpoint / "model.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="missing or is not what"):
        publish.push_to_hub(checkpoint, REPO)


# Export


def answers(path: Path, heldout: list[dict], **settings) -> list[str]:
    from transformers import AutoModelForCausalLM

    from distill import models
    from distill.generation import generate
    from distill.prompt import asked_ids

    tokenizer = models.load_tokenizer(str(path))
    model = AutoModelForCausalLM.from_pretrained(path, **settings).eval()
    asked = [asked_ids(tokenizer, row["instruction"], mode="system1") for row in heldout if row["system"] == 1][:40]
    return [answer.text for answer in generate(model, tokenizer, asked, 16)]


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "at_most"), [(8, 0.4), (4, 0.3)])
def test_an_export_is_smaller_loads_plainly_and_answers_as_the_lab_quantises(trained, heldout, bits, at_most):
    import torch

    from distill.models import _quantization, load_student

    made = publish.export(trained, bits)
    place = Path(made["path"])
    assert place == trained.with_name(f"student-{publish.FORMATS[bits]}") and made["bytes_after"] < at_most * made["bytes_before"]
    in_memory = {"dtype": torch.bfloat16, "quantization_config": _quantization(bits, torch.bfloat16)}
    assert answers(place, heldout) == answers(trained, heldout, **in_memory)
    record = store.read_manifest(place, name=RUN_RECORD)
    assert record["export"]["of"] == "student" and record["export"]["bits"] == bits and record["export"]["versions"]["bitsandbytes"]
    assert "resume_key" not in record and card.CARD not in record["files"]
    assert f"{bits}-bit weights" in (place / card.CARD).read_text()
    model, _ = load_student(str(place))
    assert model.get_memory_footprint() < 0.5 * made["bytes_before"]
    with pytest.raises(ConfigError, match="was exported already"):
        publish.export(place, bits)


@pytest.mark.slow
def test_the_scores_after_quantising_stand_beside_those_before(trained, heldout, project, capsys):
    store.write_jsonl(project / "questions.jsonl", [row for row in heldout if row["system"] == 1][:30])
    made = publish.export_with_scores(trained, 8, project / "questions.jsonl")
    assert {side: quality["exact_match"]["n"] for side, quality in made["scores"].items()} == {"before": 30, "after": 30}
    assert "Scores at 8 bits" in capsys.readouterr().out


def test_scores_are_shown_kept_and_leave_the_export_whole(checkpoint, project, monkeypatch, capsys):
    def quantise(folder, made, bits):
        shutil.copy(folder / "model.safetensors", made)
        return {}

    def compare(paths, mode, questions, **asked):
        assert (mode, questions, asked) == ("system1", "q.jsonl", {"limit": 30}) and all(Path(path).is_dir() for path in paths.values())
        return {name: {"exact_match": {"value": value, "n": 30, "ci": [0.7, 1.0]}} for name, value in zip(paths, (0.9, 0.8), strict=True)}

    monkeypatch.setattr(publish, "_quantise", quantise)
    monkeypatch.setattr("distill.evaluate.compare_checkpoints", compare)
    store.write_jsonl("q.jsonl", [{"instruction": "What is 1 + 1?", "answer": "2"}])
    made = publish.export_with_scores(checkpoint, 8, "q.jsonl", limit=30)
    place = Path(made["path"])
    assert store.read_manifest(place, name=RUN_RECORD)["export"]["scores"] == made["scores"]
    assert "| exact match | 30 | 0.9 [0.7, 1] | 0.8 [0.7, 1] |" in (place / card.CARD).read_text()
    assert store.read_json(project / "reports/export/student-int8/export.json")["scores"] == made["scores"]
    said = capsys.readouterr().out
    assert "Scores at 8 bits" in said and "0.8 [0.7, 1]" in said and f"{made['bytes_after']:,}" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [({"instruction": "What?"}, "row 0 of q.jsonl is no question"), ({"system": 2}, "q.jsonl holds no question for system1")],
)
def test_questions_that_cannot_be_asked_are_refused_before_quantising(checkpoint, project, row, message):
    store.write_jsonl(project / "q.jsonl", [row])
    with pytest.raises(DataError, match=message):
        publish.export_with_scores(checkpoint, 8, project / "q.jsonl")
    assert not checkpoint.with_name("student-int8").exists()


def test_an_export_that_fails_leaves_nothing_and_what_stood_there(checkpoint, project, monkeypatch):
    with pytest.raises(ConfigError, match="bits = 3: is not one of 8, 4, gguf"):
        publish.export(checkpoint, 3)
    with pytest.raises(ConfigError, match="out = student: is the checkpoint itself"):
        publish.export(checkpoint, 8, out=checkpoint)
    (project / "mine").mkdir()
    (project / "mine" / "work.txt").touch()
    with pytest.raises(ConfigError, match="something stands there that is no checkpoint"):
        publish.export(checkpoint, 8, out=project / "mine")
    monkeypatch.setattr(publish.engine, "engine_python", lambda: ("/bin/false", ""))
    with pytest.raises(BackendError, match="Quantising student failed: exit status 1"):
        publish.export(checkpoint, 8)
    assert not list(project.glob("*student-*"))


def converter(folder: Path, writes: str) -> Path:
    script = folder / publish.CONVERTER
    script.write_text(f"import sys\nout = sys.argv[sys.argv.index('--outfile') + 1]\n{writes}\n")
    return script


def test_a_converter_that_lies_in_the_working_folder_is_not_run(checkpoint, project, monkeypatch):
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.chdir(project)
    converter(project, "open('pwned', 'w')")
    with pytest.raises(ConfigError, match=r"which is not at PATH"):
        publish.export(checkpoint, "gguf")


def test_gguf_comes_of_llama_cpps_converter_and_is_checked(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMA_CPP", str(tmp_path))
    with pytest.raises(ConfigError, match=r"GGUF needs llama.cpp's convert_hf_to_gguf.py, which is not at LLAMA_CPP = .*git clone"):
        publish.export(checkpoint, "gguf")
    converter(tmp_path, "open(out, 'wb').write(b'GGUF')")
    with pytest.raises(BackendError, match=r"left no whole GGUF file: 4 bytes that begin with b'GGUF'"):
        publish.export(checkpoint, "gguf")
    converter(tmp_path, "sys.exit('unknown pre-tokenizer')")
    with pytest.raises(BackendError, match=r"Converting student to GGUF failed: exit status 1(.|\n)*unknown pre-tokenizer"):
        publish.export(checkpoint, "gguf")
    assert not checkpoint.with_name("student-gguf").exists()
    converter(tmp_path, "open(out, 'wb').write(b'GGUF' + bytes(2_000_000))")
    made = publish.export_with_scores(checkpoint, "gguf")
    assert made["scores"] is None and made["bytes_after"] == 2_000_004
    place = Path(made["path"])
    assert (
        store.read_manifest(place, name=RUN_RECORD)["files"].keys() == {"student.gguf"} and "llama-cli" in (place / card.CARD).read_text()
    )
    assert "student.gguf" in {each["name"] for each in publish.push_to_hub(place, REPO)["files"]}
    line = f"llama-server -m {place / 'student.gguf'} --host 127.0.0.1 --port 8000"
    with pytest.raises(ConfigError, match=f"student-gguf holds GGUF, which llama.cpp serves, .* Run `{line}`"):
        publish.serve(place)


# Serve

SERVE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with Ctrl-C ignored
from distill import publish, server
if sys.argv[3] != "real":
    server.choose = lambda: (server.LIGHT, "no GPU is visible", "cpu")
    server.command = lambda kind, device, port, **place: [sys.executable, sys.argv[3], "serve", place["name"], "--port", str(port)]
print(publish.serve(sys.argv[1], port=int(sys.argv[2])), flush=True)
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ask_by_its_own_curl_line(start_python, checkpoint: Path, standin) -> str:
    """Serve, ask by the line that is shown, end by Ctrl-C. Returns the answer."""
    port = free_port()
    process = start_python(SERVE, checkpoint, port, standin)
    lines = []
    while not lines or not lines[-1].startswith("Ctrl-C"):
        lines.append(process.stdout.readline())
        assert lines[-1], process.communicate()[1]
    (line,) = [line for line in lines if line.startswith("curl ")]
    said = subprocess.run(shlex.split(line), capture_output=True, text=True, timeout=120, env={**os.environ, "NO_PROXY": "*"})
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 0 and f"'base_url': 'http://127.0.0.1:{port}/v1', 'model': 'student'" in rest, errors
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0
    return json.loads(said.stdout)["choices"][0]["message"]["content"]


@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_the_line_that_serve_shows_asks_it_and_ctrl_c_ends_it(start_python, checkpoint):
    assert ask_by_its_own_curl_line(start_python, checkpoint, STANDIN)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")
def test_a_served_checkpoint_answers_as_the_lab_does(start_python, checkpoint):
    from distill import generation, models

    expected = generation.infer_student(*models.load_student(str(checkpoint)), card.QUESTION)
    assert ask_by_its_own_curl_line(start_python, checkpoint, "real") == expected


def test_a_port_that_is_taken_or_none_is_refused(checkpoint):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Cannot serve at 127.0.0.1, port = {port}: Address already in use"):
            publish.serve(checkpoint, port=port)
    with pytest.raises(ConfigError, match="port = 0: give a whole number"):
        publish.serve(checkpoint, port=0)


def test_a_host_and_a_name_of_ones_own_reach_the_server():
    start = server.command(server.LIGHT, "cpu", 8000, host="0.0.0.0", name="student")
    assert start[start.index("serve") :][:6] == ["serve", "student", "--host", "0.0.0.0", "--port", "8000"]


def test_each_command_is_one_call_with_what_it_was_given(monkeypatch):
    import argparse

    from distill.cli_publish import PUBLISH_COMMANDS

    calls = []
    for name in ("push_to_hub", "export_with_scores", "serve"):
        monkeypatch.setattr(publish, name, lambda *given, **named: calls.append((given, named)) or {})
    commands = argparse.ArgumentParser().add_subparsers()
    for add in PUBLISH_COMMANDS:
        add(commands)
    for line in (
        "push out me/x",
        "push out me/x --public --yes --license mit",
        "export out --bits 4 --questions q.jsonl",
        "serve out --port 9",
    ):
        name, *rest = line.split()
        options = commands.choices[name].parse_args(rest)
        options.run(options)
    assert calls == [
        (("out", "me/x"), {"private": True, "dry_run": True, "evaluation": None, "license": None}),
        (("out", "me/x"), {"private": False, "dry_run": False, "evaluation": None, "license": "mit"}),
        (("out", 4, "q.jsonl"), {"out": None}),
        (("out",), {"port": 9, "host": "127.0.0.1"}),
    ]
