"""A stand-in for vLLM and sglang, which need a GPU: their API on a real model, with faults to order.

/v1/completions with streaming, stop texts, token ids for a prompt, and `echo` with log-probabilities; /tokenize and
/detokenize. All numbers are computed by transformers on the checkpoint that it serves.
"""

import contextlib
import json
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

from requant.serving import Server

NAME = "the-release"


class Engine:
    """faults: any of any_name, ignores_stop, one_piece, loops, garbles, crashes, cuts_prompts, mixes, no_logprobs,
    no_max_length and bad_whole. No faults: "splits", each Linear adds up its inputs in two halves, another right
    rounding; "names_by_text", tokens are not named by their ids."""

    def __init__(self, folder: Path, faults: frozenset[str], context: int):
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.faults, self.context, self.lock, self.busy = faults, context, threading.Lock(), 0
        if "splits" in faults:
            split(self.model)

    def ids(self, prompt: str | list[int]) -> list[int]:
        found = self.tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if len(found) >= self.context:
            raise HTTPException(500 if "crashes" in self.faults else 400, "maximum context length")
        return found[-16:] if "cuts_prompts" in self.faults else found

    def written(self, ids: list[int], count: int, ends: bool) -> list[int]:
        """Greedy tokens after `ids`; without `ends` an end of text doesn't end them."""
        with self.lock, torch.no_grad():
            tokens, cache = torch.tensor([ids]), None
            written: list[int] = []
            for _ in range(count):
                out = self.model(tokens, past_key_values=cache, use_cache=True)
                token, cache = int(out.logits[0, -1].argmax()), out.past_key_values
                written.append(token)
                tokens = torch.tensor([[token]])
                if ends and token == self.tokenizer.eos_token_id:
                    break
        if "loops" in self.faults and len(written) > 2:
            written = [written[0]] * len(written)
        if "mixes" in self.faults and self.busy > 1:
            written = written[::-1]
        return written

    def pieces(self, written: list[int]) -> list[str]:
        stream = DecodeStream([], skip_special_tokens=True)
        texts = [stream.step(self.tokenizer.backend_tokenizer, token) or "" for token in written]
        return [text[:-1] + "\ufffd" if text else "" for text in texts] if "garbles" in self.faults else texts

    @torch.no_grad()
    def log_probabilities(self, ids: list[int], top: int, by_id: bool) -> dict[str, list]:
        """Of the prompt and of one token more: the largest by the ids of their tokens, or, as sglang, their texts."""
        with self.lock:
            scores = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        tokens = [*ids[1:], int(scores[-1].argmax())]
        best, candidates = (part.tolist() for part in scores.topk(top))
        name = "token_id:{}".format if by_id else lambda token: self.tokenizer.decode([token])
        texts = [list(map(name, row)) for row in candidates]
        largest = [dict(zip(names, values, strict=True)) for names, values in zip(texts, best, strict=True)]
        own = scores.gather(-1, torch.tensor(tokens)[:, None])[:, 0].tolist()
        return {"token_logprobs": [None, *own], "top_logprobs": [None, *largest]}


def split(model: torch.nn.Module) -> torch.nn.Module:
    """Lets each Linear of `model` add up its inputs in two halves, each of them rounded."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        half, linear = self.weight.shape[1] // 2, torch.nn.functional.linear
        parts = linear(x[..., :half], self.weight[:, :half]) + linear(x[..., half:], self.weight[:, half:])
        return parts if self.bias is None else parts + self.bias

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.forward = types.MethodType(forward, module)
    return model


def app_of(engine: Engine) -> FastAPI:
    app = FastAPI()

    def check_name(name: str) -> None:
        if name != NAME and "any_name" not in engine.faults:
            raise HTTPException(404, f"The model {name} does not exist.")

    def choice(text: str, reason: str | None, logprobs: dict | None = None) -> dict:
        return {"index": 0, "text": text, "finish_reason": reason, "logprobs": logprobs}

    def answer(choices: list[dict], usage: dict | None = None) -> dict:
        shape = {"id": "cmpl-1", "object": "text_completion", "created": int(time.time()), "model": NAME}
        return shape | {"choices": choices, "usage": usage}

    def complete(body: dict) -> JSONResponse | StreamingResponse:
        check_name(body["model"])
        ids = engine.ids(body["prompt"])
        if body.get("echo"):
            by_id = bool(body.get("return_tokens_as_token_ids")) and "names_by_text" not in engine.faults
            found = None if "no_logprobs" in engine.faults else engine.log_probabilities(ids, body["logprobs"], by_id)
            return JSONResponse(answer([choice("", "length", found)]))
        written = engine.written(ids, body["max_tokens"], not body.get("ignore_eos"))
        texts = engine.pieces(written)
        reason = "length" if len(written) == body["max_tokens"] else "stop"
        whole = "".join(texts)
        for stop in body.get("stop") or []:
            if stop in whole and "ignores_stop" not in engine.faults:
                whole, reason = whole[: whole.index(stop)], "stop"
        usage = {"prompt_tokens": len(ids), "completion_tokens": len(written), "total_tokens": len(ids) + len(written)}
        if not body.get("stream"):
            return JSONResponse(answer([choice(whole + "!" * ("bad_whole" in engine.faults), reason)], usage))
        shown = [whole] if "one_piece" in engine.faults else [text for text in texts if text]
        chunks = [answer([choice(text, None)]) for text in shown] + [answer([choice("", reason)])]
        if (body.get("stream_options") or {}).get("include_usage"):
            chunks.append(answer([], usage))
        lines = [f"data: {json.dumps(chunk)}\n\n" for chunk in chunks]
        return StreamingResponse(iter([*lines, "data: [DONE]\n\n"]), media_type="text/event-stream")

    @app.post("/v1/completions")
    async def completions(request: Request):
        body = await request.json()
        engine.busy += 1
        await run_in_threadpool(time.sleep, 0.02)  # so that requests at one time meet
        try:
            return await run_in_threadpool(complete, body)
        finally:
            engine.busy -= 1

    @app.post("/tokenize")
    async def tokenize(request: Request):
        body = await request.json()
        if "no_max_length" in engine.faults:
            raise HTTPException(500, "Integer exceeds 64-bit range")
        return {"tokens": engine.tokenizer(body["prompt"], add_special_tokens=body["add_special_tokens"])["input_ids"]}

    @app.post("/detokenize")
    async def detokenize(request: Request):
        return {"prompt": engine.tokenizer.decode((await request.json())["tokens"])}

    return app


@contextlib.contextmanager
def serve(
    folder: Path, faults: frozenset[str] = frozenset(), context: int = 1024, engine: str = "vllm"
) -> Iterator[Server]:
    """The stand-in on a port of the loopback."""
    running = uvicorn.Server(
        uvicorn.Config(app_of(Engine(folder, faults, context)), host="127.0.0.1", port=0, log_level="error")
    )
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        time.sleep(0.01)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield Server(f"http://127.0.0.1:{port}", NAME, 0, engine, "a stand-in", ["stand-in", "{model}"], {}, 0.1)
    finally:
        running.should_exit = True
        thread.join(10)
