"""Made-up records of a release, each value its own, for tests of what reads records."""

import hashlib
import json
from pathlib import Path

from requant.card import ReleaseFacts, load_release
from requant.config import parse
from requant.environment import Machine
from requant.provenance import Provenance, Statement, collect, dependencies, statement
from requant.saliency import table_of, write_table
from requant.standalone import standalone

EXPERTS = 16
RELEASE = {"model": "alpha", "calibration": "default", "blocks": 6, "benchmark": "default"}
BASE = {"base_model": "some-org/alpha", "license": "mit"}
MACHINE = Machine(system="Linux", architecture="x86_64", cpu="some processor", gpus=[])
NVFP4, W3A16, BF16 = "alpha-nvfp4", "alpha-w3a16", "alpha-bf16"


def sha(seed) -> str:
    return hashlib.sha256(str(seed).encode()).hexdigest()


def quality(seed: int, kl: float, stderr: float) -> dict:
    return {
        "perplexity": 4.1173 + 0.0931 * seed,
        "kl_divergence": kl,
        "kl_divergence_stderr": stderr,
        "top1_agreement": 1 - 0.01273 * seed,
    }


def weights_of(block: int, moe: bool) -> dict[str, list[int]]:
    prefix = f"model.layers.{block}"
    weights = {f"{prefix}.self_attn.o_proj.weight": [128, 96]}
    names = [f"mlp.experts.{e}" for e in range(EXPERTS)] + ["mlp.shared_experts"] if moe else ["mlp"]
    for name in names:
        weights[f"{prefix}.{name}.up_proj.weight"] = [136, 128]
        weights[f"{prefix}.{name}.down_proj.weight"] = [128, 136]
    return weights


def score(task: str, value: float, stderr: float | None, higher: bool = True) -> dict:
    return {
        "task": task,
        "metric": "exact_match" if higher else "word_perplexity",
        "higher_is_better": higher,
        "value": value,
        "stderr": stderr,
        "samples": 411,
    }


def throughput(release: str) -> dict:
    def spread(middle: float) -> dict:
        return {"median": middle, "lowest": 0.83 * middle, "highest": 1.19 * middle}

    levels = [
        {
            "concurrency": concurrency,
            "requests": 3 * concurrency,
            "prompt_tokens": {"median": 31.0, "lowest": 31.0, "highest": 31.0},
            "tokens": spread(29.0),
            "first_token_seconds": spread(0.0437 * concurrency),
            "decode_tokens_per_second": spread(61.7 / concurrency) if concurrency > 1 else None,
            "total_tokens_per_second": spread(57.3),
        }
        for concurrency in (1, 4)
    ]
    return {
        "release": release,
        "target": "cpu-transformers",
        "engine": "transformers",
        "engine_version": "5.23.0",
        "command": ["transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "8101"],
        "weights": "decoded to BF16",
        "threads": 1,
        "machine": MACHINE.model_dump(),
        "repeats": 3,
        "warmup": 1,
        "max_tokens": 32,
        "levels": levels,
        "seconds": 7.9,
    }


def load_test(release: str) -> dict:
    """The record of the first blocks, served by themselves."""
    return {
        "release": release,
        "target": "cpu-transformers",
        "blocks": 2,
        "moe_blocks": 1,
        "engine": "transformers",
        "engine_version": "5.23.0",
        "command": ["transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "8101"],
        "environment": {"OMP_NUM_THREADS": "1"},
        "weights": "decoded to BF16",
        "why_decoded": None,
        "startup_seconds": 8.9,
        "answers": [],
        "tokens": 63,
        "agreement": 0.9841,
        "agreement_limit": 0.95,
        "agreement_rule": "within 2^-7 |l| of the best logit l",
        "control": "without block 0",
        "control_agreement": 0.211,
        "other_model_status": 400,
        "verdict": "passed",
        "seconds": 17.3,
    }


def served(release: str, name: str = "gsm8k", **changes) -> dict:
    """The record of a benchmark of a served release, 5-shot, with the source measured on the same rows."""
    measured = {
        "subject": release,
        "benchmark": "default",
        "name": name,
        "tasks": {name: "3"},
        "method": "generation",
        "chat_template": False,
        "num_fewshot": 5,
        "limit": None,
        "seed": 42,
        "repeats": 1,
        "temperature": 0.0,
        "max_tokens": None,
        "harness": "lm-eval",
        "harness_version": "0.4.13",
        "data": "the hub",
        "documents_sha256": sha("rows"),
        "prompts": 1319,
        "prompts_sha256": sha("prompts"),
        "scores": [score(name, 0.8211, 0.01056)],
        "samples": {"size": 4711, "sha256": sha("samples")},
        "target": "cpu-transformers",
        "engine": "transformers serve",
        "engine_version": "5.23.0",
        "command": ["transformers", "serve", "{model}"],
        "environment": {},
        "weights": "decoded to BF16",
        "why_decoded": None,
        "sandbox": None,
        "sentences": None,
        "kept_answers": 0,
        "seconds": 61.9,
    }
    test = {"test": "McNemar, exact", "rows": 1319, "better": 17, "worse": 29, "p_value": 0.1038}
    return {
        "release": release,
        "measured": measured,
        "metric": "exact_match",
        "score": 0.8211,
        "stderr": 0.01056,
        "higher_is_better": True,
        "expected": [0.78, 0.88],
        "verdict": "inside",
        "source_kind": "measured",
        "source_model": "alpha",
        "source_score": 0.8301,
        "source_stderr": 0.01034,
        "citation": None,
        "source_scores": [score(name, 0.8301, 0.01034)],
        "recovery": 0.98916,
        "recovery_interval": [0.9731, 1.0052],
        "interval_method": "bootstrap",
        "paired": {"exact_match": test},
        "unpaired_because": None,
    } | changes


def write(root: Path, path: str, data: dict) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(json.dumps(data))


def make_records(root: Path, release=NVFP4, scheme="NVFP4", model="alpha", dense=False, seed=0) -> None:
    """Writes the records of a release of six blocks: the first dense, the others MoE unless `dense`."""
    blocks = RELEASE["blocks"]
    moe_blocks = 0 if dense else blocks - 1
    experts = 0 if dense else EXPERTS
    files = {
        f"model-0000{i}-of-00003.safetensors": {"size": 3_141_000 + i, "sha256": sha((model, i))} for i in (1, 2, 3)
    }
    write(
        root,
        f"results/source/{model}/source.json",
        {
            "model": model,
            "path": "/private/alpha",
            "revision": sha((model, "revision")),
            "files": files,
            "parameters": 4_712_345,
            "tensors": 317,
            "blocks": blocks,
            "architecture": "DeepseekV3ForCausalLM",
            "dtypes": {"BF16": 4_712_345},
            "routed_experts": experts,
            "shared_experts": min(1, experts),
            "experts_per_token": min(4, experts),
            "moe_blocks": moe_blocks,
            "dense_blocks": blocks - moe_blocks,
            "seconds": 1.37,
        },
    )
    texts = [
        {
            "name": name,
            "path": f"/private/{name}.jsonl",
            "sha256": sha(name),
            "share": share,
            "documents": 1201 + i,
            "tokens_available": 98_701 + i,
            "samples": 61 + i,
            "tokens": 15_616 + i,
        }
        for i, (name, share) in enumerate((("stories", 0.375), ("exercises", 0.625)))
    ]
    write(
        root,
        f"results/calibration/{model}/default/calibration.json",
        {
            "model": model,
            "calibration": "default",
            "tokenizer_sha256": sha("tokenizer"),
            "seqlen": 256,
            "pack": "concat",
            "seed": 43,
            "calibration_set": {
                "samples": 123,
                "tokens": 31_233,
                "sha256": sha("calibration"),
                "sources": texts,
            },
            "heldout_set": {"samples": 32, "tokens": 8_191, "sha256": sha("heldout"), "sources": texts[:1]},
            "seconds": 2.63,
        },
    )
    for block in range(blocks):
        moe = not dense and block > 0
        load = [(7919 * (e + 3) * (block + 2)) % 13_577 + 401 for e in range(EXPERTS)] if moe else []
        write(
            root,
            f"results/reference/{model}/default/routing_{block}.json",
            {
                "model": model,
                "calibration": "default",
                "block": block,
                "kind": "moe" if moe else "dense",
                "tokens": 31_233,
                "tokens_per_expert": load,
                "never_reached": [],
                "seconds": 2.11 + block,
                "peak_memory_bytes": 911_000_000 + block,
            },
        )
        initial = (1.31 + 0.1 * seed) * 10 ** (block - 6)
        losses = [initial * (1 - 0.0021 * i) for i in range(200)]
        write(
            root,
            f"results/{release}/blocks/{block}.json",
            {
                "release": release,
                "block": block,
                "kind": "moe" if moe else "dense",
                "scheme": scheme,
                "engine": "auto_round",
                "engine_version": "0.16.1",
                "settings": {
                    "iters": 200,
                    "batch_size": 8,
                    "lr": 0.005,
                    "minmax": True,
                    "momentum": 0.0,
                    "seed": 42,
                    "inputs": "quantized",
                },
                "seed": 1_000_003 + block,
                "loss_initial": initial,
                "loss_best": losses[150 + block],
                "best_iteration": 150 + block,
                "iterations": 200,
                "losses": losses,
                "quantized": weights_of(block, moe),
                "kept": {f"model.layers.{block}.mlp.gate": "router: decides which experts run"} if moe else {},
                "shared_global_scale": [],
                "tokens_per_expert": load,
                "never_reached": [],
                "tokens": 31_233,
                "seconds": 21.9 + block + seed,
                "peak_memory_bytes": 1_213_000_000 + block,
                "threads": 1,
                "device": "cpu",
                "libraries": {"torch": "2.13.0", "transformers": "5.23.0"},
                "sha256": sha((release, block)),
            },
        )
    names = [name for block in range(blocks) for name in weights_of(block, not dense and block > 0)]
    packed = {"model-00001-of-00001.safetensors": {"size": 2_871_113 + seed, "sha256": sha(release)}}
    write(
        root,
        f"results/{release}/pack.json",
        {
            "release": release,
            "model": model,
            "scheme": scheme,
            "files": packed,
            "bytes": 2_871_113 + seed,
            "source_bytes": 9_423_009,
            "parameters": 4_712_345,
            "quantized_parameters": 4_201_987 + seed,
            "bits_per_quantized_weight": 4.503 - 0.37 * seed,
            "blocks": blocks,
            "dense_blocks": blocks - moe_blocks,
            "moe_blocks": moe_blocks,
            "routed_experts": experts,
            "shared_experts": min(1, experts),
            "experts_per_token": min(4, experts),
            "activated_parameters": 1_987_321,
            "hard_linked": True,
            "seconds": 0.83,
        },
    )
    checks = {
        name: {
            "block": int(name.split(".")[2]),
            "cosine": 0.99571 - 1e-5 * i - 0.03 * seed,
            "relative_mae": 0.0912 + 1e-4 * i,
            "sqnr_db": 20.61 - 0.01 * i,
        }
        for i, name in enumerate(names)
    }
    write(
        root,
        f"results/{release}/verify.json",
        {
            "release": release,
            "scheme": scheme,
            "limits": {"cosine": 0.985, "relative_mae": 0.14},
            "tensors": checks,
            "unchanged": 117,
            "unchanged_means": "the same bits",
            "source_tensors": 117 + len(names),
            "lowest_cosine": checks[names[-1]]["cosine"],
            "lowest_cosine_tensor": names[-1],
            "highest_relative_mae": checks[names[-1]]["relative_mae"],
            "mean_cosine": 0.99517,
            "mean_relative_mae": 0.0937,
            "mean_sqnr_db": 20.43,
            "codes_rederived": len(names),
            "scale_groups": 47,
            "public_decoder": "compressed-tensors 0.20.0",
            "public_decoder_tensors": 16,
            "seconds": 3.41,
        },
    )
    write(
        root,
        f"results/{release}/evaluate.json",
        {
            "release": release,
            "model": model,
            "tokens": 8_159,
            "samples": 32,
            "seqlen": 256,
            "heldout_sha256": sha("heldout"),
            "activations": "quantized as the scheme says, on the fly",
            "source": quality(0, 0, 0),
            "rounded": quality(2, 0.03127 + 0.02 * seed, 0.00091),
            "quantized": quality(1, 0.01913 + 0.015 * seed, 0.00053),
            "block_mse": [{"rounded": 2.3e-6 * 7**b, "quantized": 1.7e-6 * 6.5**b} for b in range(blocks)],
            "reference_text": {"tokens": [[5, 7]], "log_probabilities": [[-1.3]], "weights_alone": [[-1.2]]},
            "seconds": 8.83,
            "peak_memory_bytes": 1_017_000_000,
        },
    )
    write(
        root,
        f"results/{release}/deploy.json",
        {
            "release": release,
            "target": "cpu-transformers",
            "engine": "transformers",
            "engine_version": "5.23.0",
            "command": ["transformers", "serve", "{model}", "--host", "127.0.0.1", "--port", "8101"],
            "environment": {"OMP_NUM_THREADS": "1"},
            "weights": "decoded to BF16",
            "why_decoded": "transformers 5.23.0 does not divide out the global scale of fused experts",
            "startup_seconds": 9.71,
            "answers": [
                {
                    "prompt": "Ann has 3 apples and",
                    "answer": " 2 pears. ```",
                    "tokens": 16,
                    "agreeing": 16,
                    "worst_gap": 0.0,
                    "source_answer_differs": True,
                }
            ],
            "tokens": 127,
            "agreement": 0.9921,
            "agreement_limit": 0.97,
            "control_agreement": 0.1417,
            "agreement_rule": "within 2^-7 |l| of the best logit l",
            "control": "block 3 left out",
            "other_model_status": 400,
            "checks": [
                {"name": "greedy", "verdict": "passed", "found": "0.992 of 127", "expected": "0.97", "samples": 127},
                {"name": "stop_sequences", "verdict": "not applicable", "reason": "no answer to stop"},
            ],
            "verdict": "passed",
            "seconds": 19.37,
        },
    )
    write(root, f"results/{release}/throughput.json", throughput(release))
    source_scores = [score("exercises", 0.9051, 0.01447), score("stories", 6.037, None, higher=False)]
    common = {
        "benchmark": "default",
        "harness": "lm_eval",
        "harness_version": "0.4.13",
        "settings": {"limit": None, "num_fewshot": 0, "seed": 44},
        "peak_memory_bytes": 1_117_000_000,
    }
    write(
        root,
        f"results/reference/{model}/benchmark/default.json",
        {
            **common,
            "subject": model,
            "arithmetic": "BF16 weights and activations",
            "scores": source_scores,
            "source_scores": None,
            "recovery": None,
            "seconds": 31.3,
        },
    )
    write(
        root,
        f"results/{release}/benchmark.json",
        {
            **common,
            "subject": release,
            "arithmetic": "weights decoded to BF16",
            "scores": [score("exercises", 0.8832, 0.01583), score("stories", 6.211, None, higher=False)],
            "source_scores": source_scores,
            "recovery": {"exercises/exact_match": 0.9758, "stories/word_perplexity": 0.97199},
            "seconds": 33.7,
        },
    )


def make_copied(root: Path) -> None:
    """Writes the records of a release of the same model in BF16."""
    make_records(root, BF16, "BF16", seed=2)
    folder = f"results/{BF16}"
    for block in range(RELEASE["blocks"]):
        record = {"release": BF16, "block": block, "scheme": "BF16", "tensors": 31 + block, "seconds": 3.21 + block}
        write(
            root,
            f"{folder}/blocks/{block}.json",
            record | {"peak_memory_bytes": 1_301_000_000 + block, "sha256": sha((BF16, block))},
        )
    tensors = json.loads((root / folder / "verify.json").read_text())["source_tensors"]
    none = ("lowest_cosine", "lowest_cosine_tensor", "highest_relative_mae", "mean_cosine", "mean_relative_mae")
    none += ("mean_sqnr_db", "public_decoder")
    zero = dict.fromkeys(("codes_rederived", "scale_groups", "public_decoder_tensors"), 0)
    checked = dict.fromkeys(none) | zero | {"limits": {}, "tensors": {}, "unchanged": tensors}
    change(root, f"{folder}/verify.json", lambda data: data.update(checked))
    packed = {"quantized_parameters": 0, "bits_per_quantized_weight": None, "bytes": 9_423_001}
    change(root, f"{folder}/pack.json", lambda data: data.update(packed))
    same = {"kl_divergence": 0.0, "kl_divergence_stderr": 0.0, "top1_agreement": 1.0}
    measured = {"rounded": None, "block_mse": [{"quantized": 0.0}] * RELEASE["blocks"], "activations": "BF16"}
    change(root, f"{folder}/evaluate.json", lambda data: data.update(measured, quantized=data["source"] | same))
    served = {"weights": "the packed checkpoint as it is", "why_decoded": None}
    change(root, f"{folder}/deploy.json", lambda data: data.update(served))


def load(root: Path, release=NVFP4, **changes) -> ReleaseFacts:
    return load_release(root, release, **{**RELEASE, **BASE, **changes})


def provenance_of(facts: ReleaseFacts, commit: str | None = "0123abc") -> Provenance:
    pruning = (facts.pruning.keep, facts.pruning.calibration) if facts.pruning else ()
    records = (facts.source, facts.calibration, facts.blocks, facts.pack)
    return collect(*records, facts.base_model, commit, MACHINE, *pruning)


def statement_of(facts: ReleaseFacts, others: dict | None = None) -> Statement:
    """provenance.json of a release, with a config that builds it as far as records tell."""
    config = parse(
        {
            "models": {"alpha": {"path": "/private/alpha"}},
            "releases": {facts.name: {"model": "alpha", "scheme": facts.pack.scheme}},
            "build": [facts.name],
        }
    )
    alone = standalone(config, facts.name)
    code = {"requant": {"sha256": sha("code")}} | (others or {})
    resolved = dependencies(facts.source, [facts.calibration], alone, code)
    versions = {"python": "3.11.2", "requant": "0.1.0", "torch": "2.13.0"}
    return statement(provenance_of(facts, None), alone, resolved, facts.blocks or facts.copied, versions)


def change(root: Path, path: str, edit) -> None:
    """Applies `edit` to the JSON in `path`."""
    data = json.loads((root / path).read_text())
    edit(data)
    (root / path).write_text(json.dumps(data))


def put(*keys_and_value):
    """An edit that sets the value at a path of keys."""
    *keys, last, value = keys_and_value

    def edit(data):
        for key in keys:
            data = data[key]
        data[last] = value

    return edit


def make_pruned(root: Path, model: str, method: str, *, kl: float, experts: int = 12) -> None:
    """Writes what is recorded of pruning `alpha`: a keep list without the first of every group, an evaluation, scores.

    Groups are of 4 experts.
    """
    kept = [expert for expert in range(EXPERTS) if expert % 4 >= 4 - experts // 4]
    keep = {
        "model": model,
        "source": "alpha",
        "method": method,
        "observe": "oneshot",
        "calibration": "default",
        "seed": 77,
        "experts_before": EXPERTS,
        "experts": experts,
        "groups": 4,
        "blocks": {block: kept for block in range(1, RELEASE["blocks"])},
        "never_reached": {3: [0, 4]},
    }
    write(root, f"results/{model}/prune/keep.json", keep)
    write(
        root,
        f"results/{model}/prune/evaluate.json",
        {
            "model": model,
            "source": "alpha",
            "tokens": 8_159,
            "samples": 32,
            "seqlen": 256,
            "heldout_sha256": sha("heldout"),
            "original": quality(0, 0, 0),
            "pruned": quality(3, kl, 0.0021),
            "block_mse": [1e-3 * 3**block for block in range(RELEASE["blocks"])],
            "seconds": 5.91,
            "peak_memory_bytes": 1_219_000_000,
        },
    )
    scores = json.loads((root / "results/reference/alpha/benchmark/default.json").read_text())
    scores |= {
        "subject": model,
        "scores": [score("exercises", 0.9051 - kl, 0.01447), score("stories", 6.3, None, False)],
    }
    write(root, f"results/reference/{model}/benchmark/default.json", scores)


def make_pruned_release(root: Path, release: str = "alpha-25-nvfp4", model: str = "alpha-25") -> None:
    """Writes the records of a release of `alpha-25`, beside those of a release of alpha that are there."""
    make_records(root, release, model=model)
    for block in range(RELEASE["blocks"]):
        path = root / f"results/reference/alpha/default/saliency_{block}.csv"
        tokens = [100 + expert for expert in range(EXPERTS)] if block else []
        mass = [(1.0 + expert % 4) * count for expert, count in enumerate(tokens)]
        write_table(path, table_of(tokens, [float(count) for count in tokens], mass, 4))
    make_pruned(root, model, "reap", kl=0.0583)
    make_pruned(root, f"{model}.random", "random", kl=0.1731)
    change(root, f"results/{release}/pack.json", put("routed_experts", 12))
    change(root, f"results/{release}/evaluate.json", put("original", quality(0, 0, 0)))
    change(root, f"results/{release}/evaluate.json", put("against_original", quality(4, 0.0917, 0.0031)))
    scores = json.loads((root / f"results/reference/{model}/benchmark/default.json").read_text())["scores"]
    change(root, f"results/{release}/benchmark.json", put("source_scores", scores))
    for block in range(RELEASE["blocks"]):
        path = f"results/{release}/blocks/{block}.json"
        change(root, path, lambda data: data.update(tokens_per_expert=data["tokens_per_expert"][:12]))


PRUNED = {"model": "alpha-25", "source": "alpha", "compare": ["alpha-25.random"]}
