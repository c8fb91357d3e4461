"""A stand-in for a served model: an OpenAI endpoint on the loopback whose answers a test decides, and which it counts.

`likelihoods` answers as vLLM does a request for the log-probabilities of its own prompt, with a real model behind it.
"""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from requant.serving import Server

Answer = Callable[[dict[str, Any]], dict[str, Any]]


@contextlib.contextmanager
def endpoint(answer: Answer, model: str = "model") -> Iterator[tuple[Server, list[dict[str, Any]]]]:
    """(the server, the requests that have reached it so far): each is answered by `answer`."""
    requests: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request | {"authorization": self.headers["Authorization"], "path": self.path})
            body = json.dumps(answer(request)).encode()
            with contextlib.suppress(OSError):  # the client was killed
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield served_at(f"http://127.0.0.1:{server.server_port}", model), requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def served_at(url: str, model: str = "model") -> Server:
    """What the code under test knows of the server at `url`."""
    return Server(
        url=url,
        model=model,
        pid=0,
        engine="stand-in",
        version="1",
        command=["stand-in", "{model}"],
        environment={},
        startup_seconds=0.0,
    )


def text(answer: str) -> dict[str, Any]:
    """An answer of both endpoints."""
    return {"choices": [{"index": 0, "text": answer, "message": {"role": "assistant", "content": answer}}]}


def likelihoods(checkpoint: Path) -> Answer:
    """Answers with the log-probabilities of the prompt's tokens, as the model in `checkpoint` has them."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        assert request["echo"] and request["logprobs"] == 1 and request["max_tokens"] == 1
        (ids,) = request["prompt"]
        with torch.no_grad():
            logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        ids = [*ids, int(logs[-1].argmax())]
        own = [None, *(float(logs[place, token]) for place, token in enumerate(ids[1:]))]
        top = [None, *({str(int(row.argmax())): float(row.max())} for row in logs)]
        return {"choices": [{"index": 0, "text": "", "logprobs": {"token_logprobs": own, "top_logprobs": top}}]}

    return answer
