"""A small server of OpenAI's protocol on real sockets, which answers by rule and fails as a test wants it to.

`OpenAIServer` runs in the test's own process; `python openai_server.py serve MODEL --host HOST --port PORT …` is one that a lab can start.
"""

import json
import os
import sys
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


def by_rule(text: str) -> str:
    """An answer that shows what was asked."""
    return f"answer to {text}"


class OpenAIServer:
    """Serve while the block runs.

    answer      the user's text → the answer
    model, key  those that are not refused; key None takes any
    usage       whether answers say how many tokens they have (words, here)
    dies_after  answers after which it dies: closes its socket and answers nobody any more
    refuse      the user's text → (error status, body), None where it is answered
    """

    def __init__(self, answer=by_rule, model="teacher", key=None, usage=True, dies_after=None, refuse=None, port=0):
        self.answer, self.model, self.key, self.usage, self.dies_after, self.refuse = answer, model, key, usage, dies_after, refuse
        self.received: list[dict] = []  # every body that asked for an answer
        self.keys: set[str] = set()
        self.given = 0
        self.dead = False
        self._lock = threading.Lock()
        self.http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"owner": self}))
        self.base_url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()

    @property
    def texts(self) -> list[str]:
        """The user's turns, in the order in which they came."""
        return [body["messages"][-1]["content"] for body in self.received]

    def reply(self, body: dict) -> tuple[int, dict]:
        with self._lock:
            self.received.append(body)
            if body["model"] != self.model:
                return 404, {"error": {"message": f"The model `{body['model']}` does not exist.", "code": "model_not_found"}}
            if self.refuse and (refusal := self.refuse(body["messages"][-1]["content"])):
                return refusal
            self.given += 1
            self.dead = self.dies_after is not None and self.given > self.dies_after
        text = self.answer(body["messages"][-1]["content"])
        words = text.split(" ")
        message = {"role": "assistant", "content": " ".join(words[: body["max_tokens"]])}
        usage = {"prompt_tokens": 1, "completion_tokens": min(len(words), body["max_tokens"]), "total_tokens": 2}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        whole = {"id": "x", "object": "chat.completion", "created": 0, "model": self.model, "choices": [choice]}
        return 200, whole | ({"usage": usage} if self.usage else {})


class _Handler(BaseHTTPRequestHandler):
    owner: OpenAIServer
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self._send(*((200, {"object": "list", "data": [{"id": self.owner.model}]}) if self._may() else (401, {"error": "invalid_api_key"})))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(*(self.owner.reply(body) if self._may() else (401, {"error": "invalid_api_key"})))

    def _may(self) -> bool:
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.owner.keys.add(key)
        return self.owner.key in (None, key)

    def _send(self, status: int, value: dict) -> None:
        if self.owner.dead:
            self.close_connection = True
            self.connection.close()
            return
        text = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_):
        pass

    def finish(self):
        with suppress(OSError, ValueError):  # the connection that died above
            super().finish()


def main() -> None:
    """Serve until the end, or until DIES_AFTER answers were given; refuse to start where DOES_NOT_START is set."""
    if os.environ.get("DOES_NOT_START"):
        sys.exit("Missing dependencies for serving. Install with `pip install transformers[serving]`")
    model, port = sys.argv[2], int(sys.argv[sys.argv.index("--port") + 1])
    dies_after = int(os.environ.get("DIES_AFTER") or 10**9)
    server = OpenAIServer(model=model, port=port)

    def answer(text: str) -> str:
        if server.given > dies_after:
            os._exit(9)
        return by_rule(text)

    server.answer = answer
    print(f"serving {model} with {sorted(path.name for path in Path.cwd().iterdir())}", flush=True)
    server.http.serve_forever()


if __name__ == "__main__":
    main()
