"""A tiny checkpoint of each family through the whole graph, NVFP4 and W3A16, as its maker would store it."""

import pytest
import tiny
import yaml
from building import TASK, Build

# Name: model_type, how it is stored, scheme of the release that goes through the whole graph, card included.
MODELS = {
    "v32": ("deepseek_v32", {"mtp": True, "num_hidden_layers": 2}, "w3a16"),
    "kimi": ("kimi_k2", {"mtp": True, "first_k_dense_replace": 0}, "nvfp4"),
    "glm": ("glm4_moe", {"stacked": True, "first_k_dense_replace": 0}, "w3a16"),
    "mixtral": ("mixtral", {}, "w3a16"),
    "qwen": ("qwen3", {"tie_word_embeddings": True}, "nvfp4"),
}
SCHEMES = {"nvfp4": "NVFP4", "w3a16": "W3A16"}
RELEASES = [f"{model}-{scheme}" for model in MODELS for scheme in SCHEMES]
SERVED = [f"{model}-{scheme}" for model, (_, _, scheme) in MODELS.items()]


@pytest.fixture(scope="module")
def families(tmp_path_factory) -> Build:
    """Both releases of each model to evaluate.json and verify.json, and one of them through the whole graph."""
    directory = tmp_path_factory.mktemp("families")
    for name, (model_type, changes, _) in MODELS.items():
        changes = {"num_hidden_layers": 1, "shard_size": "1MB"} | changes
        tiny.write_checkpoint(directory / "models" / name, model_type, seed=7, **changes)
    tiny.write_text(directory / "text.txt", 100, 1)
    (directory / "tasks").mkdir()
    (directory / "tasks/tiny.yaml").write_text(TASK)
    (directory / "tasks/rows.jsonl").write_text('{"question": "the cat sat on", "answer": "the mat"}\n' * 2)
    release = {
        "calibration": "small",
        "benchmark": "tiny",
        "tuning": {"iters": 2, "batch_size": 4},
        "deploy": {"prompts": 2, "prompt_tokens": 8, "max_tokens": 4},
    }
    releases = {
        name: release | {"model": name.split("-")[0], "scheme": SCHEMES[name.split("-")[1]]} for name in RELEASES
    }
    releases["kimi-nvfp4"]["mtp"] = "drop"
    config = {
        "models": {name: {"path": f"models/{name}"} for name in MODELS},
        "calibrations": {
            "small": {"sources": [{"path": "text.txt"}], "nsamples": 8, "seqlen": 32, "heldout": {"nsamples": 4}}
        },
        "benchmarks": {"tiny": {"tasks": ["tiny"], "include_path": "tasks", "batch_size": 4}},
        "releases": releases,
        "build": SERVED,
    }
    (directory / "mine.yaml").write_text(yaml.safe_dump(config))
    build = Build(directory)
    checks = [f"results/{name}/{stage}.json" for name in RELEASES for stage in ("verify", "evaluate")]
    build.run("model_card.md", *checks)
    return build
