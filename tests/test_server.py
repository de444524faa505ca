"""The server that the lab starts itself, with a small real server in place of vLLM and `transformers serve`."""

import os
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from distill import engine, environment, models, process, server
from distill.errors import BackendError, ConfigError
from distill.prompt import tokenizer_hash

STANDIN = Path(__file__).with_name("openai_server.py")


@pytest.fixture
def teacher(micro) -> str:
    return str(micro / "teacher")


@pytest.fixture
def small(monkeypatch):
    """`serving` starts the small server, on a machine without a GPU."""
    monkeypatch.setattr(server, "choose", lambda: (server.LIGHT, "no GPU is visible", "cpu"))

    def command(kind, device, port):
        return [sys.executable, str(STANDIN), "serve", server.SERVED, "--host", server.HOST, "--port", str(port)]

    monkeypatch.setattr(server, "command", command)


def wait_until(true, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_server_is_up_within_the_block_and_gone_after_it(small, teacher, tmp_path):
    with server.serving(teacher, tmp_path / "server.log") as one:
        group = psutil.Process(one.pid)
        members = [group, *group.children(recursive=True)]
        assert one.alive() and one.base_url.startswith("http://127.0.0.1:") and one.base_url.endswith("/v1")
        one.ensure()
        assert one.pid == group.pid and len(members) == 2
    assert not any(member.is_running() and member.status() != psutil.STATUS_ZOMBIE for member in members)
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


BINDS = """
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
class Well(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
HTTPServer((sys.argv[1], int(sys.argv[2])), Well).serve_forever()
"""


@pytest.mark.parametrize(("host", "asked"), [("127.0.0.2", "127.0.0.2"), ("0.0.0.0", "127.0.0.1"), ("", "127.0.0.1")])
def test_a_server_is_asked_at_the_address_that_it_listens_at(small, teacher, tmp_path, monkeypatch, host, asked):
    monkeypatch.setattr(server, "START_SECONDS", 10)
    monkeypatch.setattr(server, "command", lambda kind, device, port, host: [sys.executable, "-c", BINDS, host, str(port)])
    with server.serving(teacher, tmp_path / "server.log", host=host) as one:
        assert one.alive() and one.base_url.startswith(f"http://{asked}:")


def test_a_model_is_served_under_a_plain_name_whatever_its_folder_is_called(small, teacher, tmp_path):
    model = tmp_path / "it's a@model; touch pwned $(touch pwned)\n:x.gguf"
    model.symlink_to(teacher)
    with server.serving(str(model), tmp_path / "server.log") as one:
        assert one.model_id == "teacher"
    assert "with ['teacher']" in (tmp_path / "server.log").read_text()
    assert not list(tmp_path.rglob("pwned"))


def test_the_served_files_are_the_models_own_and_answers_are_left_whole(teacher, tmp_path):
    server.link_model(teacher, tmp_path / "served")
    for file in Path(teacher).iterdir():
        served = tmp_path / "served" / file.name
        assert served.is_file() and (file.name in (server.TOKENIZER, server.GENERATION) or served.resolve() == file)
    tokenizer = models.load_tokenizer(str(tmp_path / "served"))
    assert tokenizer_hash(tokenizer) == tokenizer_hash(models.load_tokenizer(teacher))
    for answer in ["<think>\na {b} $c\n</think>\n\n9", "plain", '<tool_call>{"a": 1}</tool_call> x', ""]:
        ids = tokenizer(f"{answer}<|im_end|>", add_special_tokens=False)["input_ids"]
        assert tokenizer.parse_response(ids, prefix="<|im_start|>user\n<think><|im_end|>").get("content", "") == answer


def test_a_server_that_died_is_started_anew(small, teacher, tmp_path, capsys):
    with server.serving(teacher, tmp_path / "server.log") as one:
        before = one.pid
        os.killpg(one.pid, signal.SIGKILL)
        wait_until(lambda: not one.alive())
        one.ensure()
        assert one.alive() and one.pid != before
    assert "does not answer any more; starting it anew" in capsys.readouterr().out


def test_a_server_that_does_not_answer_is_started_anew(small, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "HEALTH_SECONDS", 0.5)
    monkeypatch.setattr(process, "PATIENCE_SECONDS", 0.5)
    with server.serving(teacher, tmp_path / "server.log") as one:
        stuck = psutil.Process(one.pid).children()[0]
        stuck.suspend()
        assert not one.alive()
        one.ensure()
        assert one.alive() and stuck.status() == psutil.STATUS_ZOMBIE


def test_a_server_that_dies_again_and_again_is_given_up(small, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "RESTARTS", 1)
    with pytest.raises(BackendError, match=r"cannot serve .*teacher. It has died 2 times.*\n.*serving teacher"):
        with server.serving(teacher, tmp_path / "server.log") as one:
            for _ in range(3):
                os.killpg(one.pid, signal.SIGKILL)
                wait_until(lambda: not one.alive())
                one.ensure()


def test_a_server_that_does_not_start_says_why(small, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("DOES_NOT_START", "1")
    with pytest.raises(BackendError, match="exit status 1. The engine's environment lacks what serves") as caught:
        with server.serving(teacher, tmp_path / "server.log"):
            raise AssertionError("never reached")
    assert "| Missing dependencies for serving" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["server.log"]


def test_a_server_that_never_answers_is_ended(small, teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(server, "START_SECONDS", 0.5)
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", "import time; time.sleep(60)"])
    with pytest.raises(BackendError, match="has not answered within 0.5 s"):
        with server.serving(teacher, tmp_path / "server.log"):
            raise AssertionError("never reached")
    assert not [child for child in psutil.Process().children(recursive=True) if "time.sleep(60)" in child.cmdline()]


def test_no_key_and_no_look_for_updates_go_to_a_server_and_the_hubs_cache_is_there(tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    variables = server._environment()
    assert "sk-secret" not in variables.values() and variables["HF_HUB_DISABLE_UPDATE_CHECK"] == "1" and (tmp_path / "hub").is_dir()
    assert variables.items() >= engine._one_gpu().items()


def test_no_proxy_stands_between_the_lab_and_this_machine():
    variables = server.without_proxy({"NO_PROXY": "example.org", "HTTP_PROXY": "http://proxy:1"})
    assert variables["NO_PROXY"] == variables["no_proxy"] == "example.org,127.0.0.1,localhost"


@pytest.mark.parametrize(
    ("gpu", "vllm", "chosen"),
    [
        (None, "0.11", (server.LIGHT, "no GPU is visible", "cpu")),
        ({"name": "T4"}, None, (server.LIGHT, "a GPU is visible; vLLM, which is faster, is not installed", "cuda")),
        ({"name": "T4"}, "0.11", (server.HEAVY, "a GPU is visible, and vllm 0.11 is installed", "cuda")),
    ],
)
def test_vllm_serves_on_a_gpu_and_transformers_elsewhere(gpu, vllm, chosen, monkeypatch):
    monkeypatch.setattr(environment, "probe", lambda python: {"gpu": gpu, "optional": {"vllm": vllm}})
    assert server.choose() == chosen


def test_servers_are_started_by_argument_lists_and_run_no_code_of_a_models():
    python = environment.engine_python()[0]
    start = ["serve", "teacher", "--host", "127.0.0.1", "--port", "8123"]
    light = [python, "-m", "transformers.cli.transformers", *start]
    assert server.command(server.LIGHT, "cpu", 8123) == [*light, "--device", "cpu", "--dtype", "float32"]
    assert server.command(server.LIGHT, "cuda", 8123) == [*light, "--device", "cuda", "--dtype", "auto"]
    assert server.command(server.HEAVY, "cuda", 8123) == [python, "-m", "vllm.entrypoints.cli.main", *start]


def test_a_model_of_the_hub_that_cannot_be_fetched_blames_nobody(small, tmp_path):
    with pytest.raises(ConfigError, match="Cannot reach the hub for owner/model"):
        with server.serving("owner/model", tmp_path / "server.log"):
            raise AssertionError("never reached")
    assert not list(tmp_path.iterdir())


def test_of_a_models_generation_settings_only_its_stop_tokens_are_served(micro, tmp_path):
    import shutil

    from distill import store

    model = tmp_path / "model"
    shutil.copytree(micro / "teacher", model)
    own = store.read_json(model / "generation_config.json")
    store.write_json(model / "generation_config.json", {**own, "repetition_penalty": 2.5, "do_sample": True})
    server.link_model(str(model), tmp_path / "served")
    served = store.read_json(tmp_path / "served" / "generation_config.json")
    assert (
        set(served) == {"eos_token_id", "pad_token_id"} and set(served["eos_token_id"]) >= {own["eos_token_id"]} - {None}
        if isinstance(own["eos_token_id"], int)
        else set(served["eos_token_id"]) >= set(own["eos_token_id"])
    )
