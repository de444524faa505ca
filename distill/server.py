"""A server of the lab's own for a teacher: started, asked whether it is well, started anew when it is not, ended with the lab.

`vllm serve` where a GPU is visible and vLLM is installed, `transformers serve` elsewhere; both by the engine's Python, both speak OpenAI's
protocol, neither runs code that comes with a model. The weights keep the precision that they are stored in; on a CPU they are fp32.
"""

import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from subprocess import Popen
from typing import IO

from . import engine, environment, models, process, prompt, store
from .config import is_hub_name
from .console import say
from .errors import BackendError
from .machine import check_served

HOST = "127.0.0.1"
EVERYWHERE = ("", "0.0.0.0")  # to listen at every address, which is none to ask at
SERVED = "teacher"  # what a model is called where it is served: its own name may hold what a server reads as its own signs
TOKENIZER, GENERATION = "tokenizer_config.json", "generation_config.json"
START_SECONDS = 1800
HEALTH_SECONDS = 30
RESTARTS = 5
LIGHT, HEAVY = "transformers serve", "vllm serve"
MODULES = {LIGHT: "transformers.cli.transformers", HEAVY: "vllm.entrypoints.cli.main"}


@contextmanager
def serving(model: str, log: Path, *, port: int = 0, **place: str) -> Iterator["Server"]:
    """Serve a model while the block runs.

    model  a folder, or a name on the hub
    log    file that gets everything the server prints
    port   0: a free one
    place  "host", the address that it listens at, and "name", what the model is called there; HOST and SERVED by default
    Raises BackendError with the log's end where the server cannot be started, PreflightError where the model does not fit.
    """
    check_served(model)
    kind, reason, device = choose()
    say(f"serving {model if is_hub_name(model) else store.shown(model)} by {kind} ({reason})")
    folder = log.with_suffix("")
    shutil.rmtree(folder, ignore_errors=True)  # what a killed run left
    try:
        link_model(model, folder / place.get("name", SERVED))
        with open(log, "w", encoding="utf-8") as output:
            server = Server(kind, model, device, folder, output, port, place)
            try:
                server.ensure()
                yield server
            finally:
                server.stop()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def link_model(model: str, folder: Path) -> None:
    """Make a folder that a server may read: links to a model's files, and two files that have it answer as the lab itself does.

    Of generation settings only the stop tokens stay: a server adds the model's own to what it is asked (Qwen2.5-Instruct's penalise
    repetition).

    `transformers serve` takes the thought out of an answer of Qwen's and puts it where a client of OpenAI's does not look, unless the
    tokenizer says how an answer is to be read; here all of it up to its end is the answer.
    """
    source = models.local_folder(model)
    folder.mkdir(parents=True)
    for file in source.iterdir():
        if file.is_file() and file.name not in (TOKENIZER, GENERATION):
            (folder / file.name).symlink_to(file.resolve())
    tokenizer = models.load_tokenizer(str(source), "teacher")
    generation = store.read_json(source / GENERATION) if store.is_file(source / GENERATION) else {}
    named = generation.get("eos_token_id") or []
    stops = dict.fromkeys([*prompt.stop_ids(tokenizer), *(named if isinstance(named, list) else [named])])
    store.write_json(folder / GENERATION, {"eos_token_id": list(stops), "pad_token_id": tokenizer.pad_token_id})
    ends = [tokenizer.convert_ids_to_tokens(number) for number in stops]
    whole = {"start_anchor_pattern": ".+", "defaults": {"role": "assistant"}, "fields": {"content": {"content": "text", "close": ends}}}
    known = store.read_json(source / TOKENIZER) if store.is_file(source / TOKENIZER) else {}
    store.write_json(folder / TOKENIZER, {**known, "response_template": whole})


def choose() -> tuple[str, str, str]:
    """The server to use, why that one, and the device it computes on ("cuda" or "cpu")."""
    found = environment.probe(environment.engine_python()[0])
    if not found["gpu"]:
        return LIGHT, "no GPU is visible", "cpu"
    if not found["optional"]["vllm"]:
        return LIGHT, "a GPU is visible; vLLM, which is faster, is not installed", "cuda"
    return HEAVY, f"a GPU is visible, and vllm {found['optional']['vllm']} is installed", "cuda"


def command(kind: str, device: str, port: int, *, host: str = HOST, name: str = SERVED) -> list[str]:
    """What starts a server, in a working folder that holds the model."""
    python = environment.engine_python()[0]
    start = [python, "-m", MODULES[kind], "serve", name, "--host", host, "--port", str(port)]
    if kind == HEAVY:
        return start
    return [*start, "--device", device, "--dtype", "float32" if device == "cpu" else "auto"]


class Server:
    """A server under the lab's care. `ensure` before each use; its address may be another one after that."""

    def __init__(self, kind: str, model: str, device: str, folder: Path, output: IO, port: int, place: dict) -> None:
        self.kind, self.model, self.model_id = kind, model, place.get("name", SERVED)
        self._device, self._folder, self._output, self._fixed_port, self._place = device, folder, output, port, place
        host = place.get("host", HOST)
        self._host = HOST if host in EVERYWHERE else host
        self._child: Popen | None = None
        self._port = self._starts = 0

    @property
    def base_url(self) -> str:
        return f"http://{self._host}:{self._port}/v1"

    @property
    def log(self) -> Path:
        return Path(self._output.name)

    @property
    def pid(self) -> int:
        """The first process of the server's group."""
        return self._child.pid

    def alive(self) -> bool:
        """Whether the server runs and answers."""
        return self._runs() and self._answers()

    def ensure(self) -> None:
        """Start the server where it is not alive. Raises BackendError where it does not start, or has died too often."""
        if self._child and self.alive():
            return
        if self._starts > RESTARTS:
            raise self._failure(f"It has died {self._starts} times")
        if self._starts:
            say(f"The server of {self.model} does not answer any more; starting it anew")
        self.stop()
        self._start()

    def stop(self) -> None:
        """End the server and all that it started."""
        if self._child:
            process.end(self._child)
            self._child = None

    def _start(self) -> None:
        self._starts += 1
        self._port = self._fixed_port or _free_port()
        child_command = command(self.kind, self._device, self._port, **self._place)
        self._child = process.start(child_command, cwd=self._folder, env=_environment(), output=self._output)
        deadline = time.monotonic() + START_SECONDS
        while not self._answers():
            if not self._runs():
                raise self._failure(f"It ended before it answered, with {process.how_it_ended(self._child.returncode)}")
            if time.monotonic() > deadline:
                raise self._failure(f"It has not answered within {START_SECONDS} s")
            time.sleep(0.2)

    def _runs(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def _answers(self) -> bool:
        from urllib.request import ProxyHandler, build_opener

        try:
            with build_opener(ProxyHandler({})).open(f"http://{self._host}:{self._port}/health", timeout=HEALTH_SECONDS) as answer:
                return answer.status == 200
        except OSError:  # refused, reset, too slow, or an error status
            return False

    def _failure(self, what: str) -> BackendError:
        lines = process.tail(self.log)
        advice = "Give the base_url of a server that runs elsewhere, or a smaller teacher."
        if any("pip install transformers[serving]" in line for line in lines):
            advice = f"The engine's environment lacks what serves: install requirements.txt anew, or run `{environment.SETUP}`."
        message = f"{self.kind} cannot serve {self.model}. {what}. {advice} The end of {store.shown(self.log)}:"
        return BackendError("\n".join([message, *lines]))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


def _environment() -> dict:
    """A server's environment variables: those of every process that loads a model, no key of an API, no look for updates."""
    from huggingface_hub.constants import HF_HUB_CACHE

    Path(HF_HUB_CACHE).mkdir(parents=True, exist_ok=True)  # `transformers serve` lists it and fails where it is not there
    kept = {key: value for key, value in engine.child_environment().items() if not key.endswith("_API_KEY")}
    return {**kept, "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}


def without_proxy(variables: dict) -> dict:
    """Environment variables under which no proxy stands between a client and this machine."""
    known = [part for key in ("no_proxy", "NO_PROXY") for part in variables.get(key, "").split(",") if part]
    listed = ",".join(dict.fromkeys([*known, HOST, "localhost"]))
    return {**variables, "NO_PROXY": listed, "no_proxy": listed}
