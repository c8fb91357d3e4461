"""lm-eval's clients of a served model, with answers that outlive the process (`answer_log`)."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from requant.answer_log import AnswerLog
from requant.config import Target
from requant.serving import Server

RETRIES = 3  # times that a request is sent at most


def client(server: Server, model: Path, target: Target, chat: bool, seed: int, context: int, answers: AnswerLog) -> Any:
    """An lm-eval model that asks `server`, which serves the checkpoint in `model`.

    seed: of the engine's sampling. context: tokens of question and answer; longer questions lose their beginning where
    log-probabilities are asked for, and are refused by the engine where text is.
    """
    from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
    from lm_eval.models.utils import postprocess_generated_text

    class Remembering:
        """Asks what has not been answered yet; cuts each answer at the task's first stop string."""

        def generate_until(self, requests, disable_tqdm=False):
            texts = answers.through("generate_until", requests, super().generate_until)
            stops = (request.args[1].get("until") or [] for request in requests)
            # Engines take a few stop strings at most, and a text may be over before the engine sees one.
            return [
                postprocess_generated_text(text, [stops_of] if isinstance(stops_of, str) else list(stops_of), None)
                for text, stops_of in zip(texts, stops, strict=True)
            ]

        def loglikelihood(self, requests, disable_tqdm=False):
            return answers.through("loglikelihood", requests, super().loglikelihood)

        def loglikelihood_rolling(self, requests, disable_tqdm=False):
            return answers.through("loglikelihood_rolling", requests, super().loglikelihood_rolling)

        def _create_payload(self, messages, *, eos=None, **settings):
            # lm-eval names the end token as a stop string only where requests are sent one by one.
            payload = super()._create_payload(messages, eos=eos or self.eos_string, **settings)
            if not payload.get("stop"):  # transformers serve fails on an empty list of them
                payload.pop("stop", None)
            return payload

    class Completions(Remembering, LocalCompletionsAPI):
        pass

    class Chat(Remembering, LocalChatCompletion):
        pass

    class Hook:
        """What lm-eval calls with each answer as it comes."""

        def add_partial(self, kind: str, request: Any, answer: Any) -> None:
            answers.add(kind, request, answer)

    common = {
        "model": server.model,
        "num_concurrent": target.concurrency,
        "max_retries": RETRIES,
        "timeout": target.request_seconds,
        "seed": seed,
        "max_length": context,
        # Without a header of its own lm-eval would send the key for another service that the environment may hold.
        "header": {"Authorization": "Bearer none"},
        "trust_remote_code": False,
    }
    if chat:
        lm = Chat(base_url=f"{server.url}/v1/chat/completions", **common)
    else:
        tokens = target.engine != "transformers"  # which takes a prompt as text alone
        lm = Completions(
            base_url=f"{server.url}/v1/completions",
            tokenizer=str(model),
            tokenizer_backend="huggingface",
            tokenized_requests=tokens,
            **common,
        )
        lm.add_bos_token = _begins_texts(lm.tokenizer)
    lm.set_cache_hook(Hook())
    return lm


def _begins_texts(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a token before each text: then so do engines, and so must prompts that are tokens."""
    return tokenizer("a").input_ids != tokenizer("a", add_special_tokens=False).input_ids


@contextlib.contextmanager
def past_proxies() -> Iterator[None]:
    """Requests to the loopback go there, whatever proxy the environment names."""
    names = ("NO_PROXY", "no_proxy")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "127.0.0.1,localhost"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})
