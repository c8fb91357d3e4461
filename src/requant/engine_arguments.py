"""What a target may tell its engine: flags, each with what it takes, and variables. All others are refused.

A flag or a variable is here if it neither names code, a file, a folder, an address or another model, nor makes another
model of the checkpoint that was checked. Flags of vLLM 0.26 to 0.32 (`vllm serve`), sglang 0.5 (`sglang.launch_server`)
and transformers 5.23 (`transformers serve`), read from their parsers of arguments.
"""

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from requant.errors import brief

COMPUTES = False  # what a target may say; what it says reaches a job as params


@dataclass(frozen=True)
class Value:
    """What a flag takes: a value that matches `pattern`, in words; none if it is empty. many: one value or more."""

    says: str
    pattern: str = ""
    many: bool = False


def _one_of(*words: str) -> Value:
    return Value(" or ".join([", ".join(words[:-1]), words[-1]]) if len(words) > 1 else words[0], "|".join(words))


NOTHING = Value("nothing")
EITHER_WAY = Value("nothing; `--no-` before the name turns it off")
COUNT = Value("a whole number", r"-?\d{1,18}")
COUNTS = Value("whole numbers", r"\d{1,18}", many=True)
NUMBER = Value("a number", r"-?\d{1,18}(\.\d{1,18})?")
SIZE = Value("a number, with k, M or G after it or not", r"\d{1,18}(\.\d{1,9})?[kKmMgGtT]?")
# A name that the engine knows. Without dots, slashes and colons: no module, path, repository or address.
NAME = Value("a name that the engine knows", r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
DTYPE = _one_of("auto", "bfloat16", "float16", "float32", "half", "float")
SAFETENSORS = _one_of("auto", "safetensors", "fastsafetensors")
OF_TEMPLATES = {"enable_thinking": r"true|false", "thinking": r"true|false", "reasoning_effort": r"[a-z]{1,16}"}
# Values of flags that take a JSON object: its keys, with the pattern of each.
OBJECTS = {
    "--chat-template-kwargs": OF_TEMPLATES,
    "--default-chat-template-kwargs": OF_TEMPLATES,
    "--compilation-config": {
        "mode": NAME.pattern,
        "level": r"\d",
        "cudagraph_mode": NAME.pattern,
        "cudagraph_capture_sizes": r"\[\d+(, \d+)*\]",
        "max_cudagraph_capture_size": r"\d+",
    },
    "--speculative-config": {  # by the model's own layers, or by the prompt
        "method": "mtp|deepseek_mtp|ngram",
        "num_speculative_tokens": r"\d+",
        "prompt_lookup_max": r"\d+",
        "prompt_lookup_min": r"\d+",
    },
}


def _object(flag: str) -> Value:
    return Value(f"a JSON object with {', '.join(OBJECTS[flag])}", ".*")


def _switches(*flags: str) -> dict[str, Value]:
    return dict.fromkeys(flags, NOTHING)


def _both_ways(*flags: str) -> dict[str, Value]:
    return dict.fromkeys(flags, EITHER_WAY)


FLAGS: dict[str, dict[str, Value]] = {
    "transformers": {
        **_both_ways("--continuous-batching", "--compile", "--cb-use-cuda-graph"),
        "--attn-implementation": _one_of("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"),
        "--dtype": DTYPE,
        "--cb-block-size": COUNT,
        "--cb-num-blocks": COUNT,
        "--cb-max-batch-tokens": COUNT,
        "--cb-max-memory-percent": NUMBER,
        "--reasoning": _one_of("on", "off", "auto"),
        "--chat-template-kwargs": _object("--chat-template-kwargs"),
        "--log-level": _one_of("debug", "info", "warning", "error", "critical"),
        "--default-seed": COUNT,
    },
    "vllm": {
        **_both_ways(
            "--enforce-eager",
            "--enable-expert-parallel",
            "--enable-prefix-caching",
            "--enable-chunked-prefill",
            "--disable-custom-all-reduce",
            "--disable-sliding-window",
            "--disable-cascade-attn",
            "--disable-hybrid-kv-cache-manager",
            "--async-scheduling",
            "--enable-dbo",
            "--enable-eplb",
            "--enable-flashinfer-autotune",
            "--language-model-only",
            "--skip-mm-profiling",
            "--use-tqdm-on-load",
            "--enable-log-requests",
            "--enable-auto-tool-choice",
            "--enable-prompt-tokens-details",
            "--enable-force-include-usage",
            "--return-tokens-as-token-ids",
            "--disable-fastapi-docs",
            "--disable-uvicorn-access-log",
        ),
        **_switches("--disable-log-stats"),
        "--dtype": DTYPE,
        "--seed": COUNT,
        "--load-format": SAFETENSORS,
        "--model-impl": _one_of("auto", "vllm", "transformers"),
        "--tokenizer-mode": _one_of("auto", "hf", "slow", "deepseek_v32"),
        "--generation-config": _one_of("auto", "vllm"),
        "--max-num-seqs": COUNT,
        "--max-num-batched-tokens": SIZE,
        "--max-logprobs": COUNT,
        "--logprobs-mode": NAME,
        "--long-prefill-token-threshold": COUNT,
        "--scheduling-policy": _one_of("fcfs", "priority"),
        "--stream-interval": COUNT,
        "--block-size": COUNT,
        "--num-gpu-blocks-override": COUNT,
        "--kv-cache-memory-bytes": SIZE,
        "--prefix-caching-hash-algo": NAME,
        "--swap-space": NUMBER,
        "--cpu-offload-gb": NUMBER,
        "--max-parallel-loading-workers": COUNT,
        "--safetensors-load-strategy": NAME,
        "--attention-backend": NAME,
        "--moe-backend": NAME,
        "--linear-backend": NAME,
        "--all2all-backend": NAME,
        "--distributed-executor-backend": _one_of("mp", "uni"),
        "--distributed-timeout-seconds": COUNT,
        "--cudagraph-capture-sizes": COUNTS,
        "--max-cudagraph-capture-size": COUNT,
        "--compilation-config": _object("--compilation-config"),
        "--optimization-level": COUNT,
        "--performance-mode": NAME,
        "--speculative-config": _object("--speculative-config"),
        "--reasoning-parser": NAME,
        "--tool-call-parser": NAME,
        "--chat-template-content-format": _one_of("auto", "string", "openai"),
        "--default-chat-template-kwargs": _object("--default-chat-template-kwargs"),
        "--max-log-len": COUNT,
        "--uvicorn-log-level": _one_of("debug", "info", "warning", "error", "critical", "trace"),
    },
    "sglang": {
        **_switches(
            "--disable-radix-cache",
            "--disable-cuda-graph",
            "--disable-cuda-graph-padding",
            "--disable-custom-all-reduce",
            "--disable-overlap-schedule",
            "--disable-chunked-prefix-cache",
            "--disable-flashinfer-autotune",
            "--disable-flashinfer-cutlass-moe-fp4-allgather",
            "--disable-hybrid-swa-memory",
            "--disable-shared-experts-fusion",
            "--enable-deterministic-inference",
            "--enable-dp-attention",
            "--enable-dp-lm-head",
            "--enable-eplb",
            "--enable-flashinfer-allreduce-fusion",
            "--enable-fp32-lm-head",
            "--enable-mixed-chunk",
            "--enable-mscclpp",
            "--enable-nccl-nvls",
            "--enable-p2p-check",
            "--enable-symm-mem",
            "--enable-torch-compile",
            "--enable-torch-symm-mem",
            "--enable-two-batch-overlap",
            "--enable-single-batch-overlap",
            "--enable-cache-report",
            "--flashinfer-mla-disable-ragged",
            "--pre-warm-nccl",
            "--skip-server-warmup",
            "--sleep-on-idle",
            "--strip-thinking-cache",
            "--triton-attention-reduce-in-fp32",
            "--weight-loader-disable-mmap",
            "--weight-loader-prefetch-checkpoints",
        ),
        "--dtype": DTYPE,
        "--load-format": SAFETENSORS,
        "--model-impl": _one_of("auto", "sglang", "transformers"),
        "--tokenizer-mode": _one_of("auto", "slow"),
        "--random-seed": COUNT,
        "--sampling-defaults": _one_of("openai", "model"),
        "--max-running-requests": COUNT,
        "--max-queued-requests": COUNT,
        "--max-total-tokens": COUNT,
        "--max-prefill-tokens": COUNT,
        "--prefill-max-requests": COUNT,
        "--chunked-prefill-size": COUNT,
        "--schedule-policy": NAME,
        "--schedule-conservativeness": NUMBER,
        "--num-continuous-decode-steps": COUNT,
        "--stream-interval": COUNT,
        "--page-size": COUNT,
        "--swa-full-tokens-ratio": NUMBER,
        "--cpu-offload-gb": COUNT,
        "--attention-backend": NAME,
        "--decode-attention-backend": NAME,
        "--prefill-attention-backend": NAME,
        "--sampling-backend": NAME,
        "--grammar-backend": _one_of("xgrammar", "outlines", "llguidance", "none"),
        "--moe-runner-backend": NAME,
        "--moe-a2a-backend": NAME,
        "--fp8-gemm-runner-backend": NAME,
        "--fp4-gemm-runner-backend": NAME,
        "--bf16-gemm-backend": NAME,
        "--dsa-prefill-backend": NAME,
        "--dsa-decode-backend": NAME,
        "--nsa-prefill-backend": NAME,
        "--nsa-decode-backend": NAME,
        "--deepep-mode": NAME,
        "--ep-size": COUNT,
        "--ep-num-redundant-experts": COUNT,
        "--dp-size": COUNT,
        "--moe-dense-tp-size": COUNT,
        "--cuda-graph-max-bs": COUNT,
        "--cuda-graph-max-bs-decode": COUNT,
        "--cuda-graph-max-bs-prefill": COUNT,
        "--cuda-graph-bs": COUNTS,
        "--cuda-graph-bs-decode": COUNTS,
        "--cuda-graph-bs-prefill": COUNTS,
        "--cuda-graph-backend-decode": NAME,
        "--cuda-graph-backend-prefill": NAME,
        "--torch-compile-max-bs": COUNT,
        "--triton-attention-num-kv-splits": COUNT,
        "--speculative-algorithm": _one_of("EAGLE", "NEXTN", "NGRAM"),  # by the model's own layers, or by the prompt
        "--speculative-num-steps": COUNT,
        "--speculative-eagle-topk": COUNT,
        "--speculative-num-draft-tokens": COUNT,
        "--speculative-attention-mode": _one_of("prefill", "decode"),
        "--reasoning-parser": NAME,
        "--tool-call-parser": NAME,
        "--watchdog-timeout": NUMBER,
        "--dist-timeout": COUNT,
        "--decode-log-interval": COUNT,
        "--weight-loader-prefetch-num-threads": COUNT,
        "--log-level": _one_of("debug", "info", "warning", "error", "critical"),
        "--log-level-http": _one_of("debug", "info", "warning", "error", "critical"),
    },
}
# Flags that people look for, and why none of them is above; of any engine.
REASONS = {
    flag: reason
    for reason, flags in {
        "it is where the checkpoint is": "--model --model-path --served-model-name",
        "requant chooses where the engine listens": "--host --port --uds",
        "`devices` says it": "--tensor-parallel-size -tp --tp --tp-size --device",
        "`context` says it": "--max-model-len --context-length",
        "`memory_fraction` says it": "--gpu-memory-utilization --device-memory-utilization --mem-fraction-static",
        "`kv_cache` says it": "--kv-cache-dtype",
        "it follows from the checkpoint, or from `quantization`": "--quantization -q --quantization-config",
        "no code of a checkpoint is run": "--trust-remote-code",
        "a credential": "--api-key --admin-api-key --hf-token --ssl-keyfile-password",
        "it names code to run": "--middleware --logits-processors --logits-processor-pattern --io-processor-plugin "
        "--tool-parser-plugin --reasoning-parser-plugin --worker-cls --worker-extension-cls --scheduler-cls "
        "--model-class-overrides --custom-weight-loader --forward-hooks --enable-custom-logit-processor --sidecar",
        "it names another model": "--tokenizer --tokenizer-path --hf-config-path --revision --code-revision "
        "--tokenizer-revision --enable-lora --lora-modules --lora-paths --spec-model --speculative-model "
        "--speculative-draft-model-path",
        "it names a file or a folder": "--config --chat-template --completion-template --download-dir "
        "--decision-config --log-config-file --ssl-keyfile --ssl-certfile --ssl-ca-certs --allowed-local-media-path "
        "--file-storage-path --model-loader-extra-config --additional-config --lmcache-config-file",
        "it opens the engine to others": "--enable-cors --allowed-origins --root-path --master-addr --dist-init-addr "
        "--kv-transfer-config --otlp-traces-endpoint --tool-server",
        "it makes another model of the checkpoint": "--hf-overrides --json-model-override-args "
        "--override-generation-config --preferred-sampling-params --torchao-config",
    }.items()
    for flag in flags.split()
}


def problem_in(engine: str, arguments: Sequence[str]) -> str | None:
    """Why `engine` is not given these arguments, and what would be right; None if it is."""
    known, words = FLAGS[engine], list(arguments)
    while words:
        word = words.pop(0)
        spelled, equals, value = word.partition("=")
        flag = _whole_name(spelled, engine)
        takes = known.get(flag)
        if takes is None and flag.startswith("--no-"):
            turned = known.get(f"--{flag.removeprefix('--no-')}")
            takes = turned if turned is EITHER_WAY else None
        if takes is None:
            return f"{brief(word)}: {_why_not(flag, known, engine)}"
        given = [value] if equals else []
        while words and not words[0].startswith("--") and (takes.many or not given) and takes.pattern and not equals:
            given.append(words.pop(0))
        if bool(given) != bool(takes.pattern):
            return f"{brief(word)}: {_shown(given)}; expected {takes.says}"
        for each in given:
            if not re.fullmatch(takes.pattern, each, re.DOTALL | re.ASCII) or not _is_object(flag, each):
                return f"{brief(flag)}: {brief(each)}; expected {takes.says}"
    return None


def _whole_name(spelled: str, engine: str) -> str:
    """A flag as its engine's parser reads it: vLLM takes underscores for dashes."""
    return spelled.replace("_", "-") if engine == "vllm" and spelled.startswith("--") else spelled


def _why_not(flag: str, known: Mapping[str, Value], engine: str) -> str:
    dashed = flag.partition(".")[0].replace("_", "-")
    if not dashed.startswith("-"):
        return f"found without a flag that takes it; expected --FLAG, as docs/targets.md lists them for {engine}"
    # Parsers take the beginning of a flag for the flag.
    meant = [name for name in REASONS if name == dashed or (len(dashed) > 2 and name.startswith(dashed))]
    if meant and dashed not in known:
        return f"{REASONS[meant[0]]}; expected other arguments: docs/targets.md lists those of {engine}"
    near = [name for name in known if name.startswith(dashed)] if len(dashed) > 2 else []
    near = near[:3] or difflib.get_close_matches(dashed, known, n=3, cutoff=0.6)
    perhaps = f", perhaps {' or '.join(near)}" if near else ""
    return f"not known as harmless; expected one of those that docs/targets.md lists for {engine}{perhaps}"


def _shown(given: Sequence[str]) -> str:
    return f"{brief(given[0])} found" if given else "found without a value"


def _is_object(flag: str, value: str) -> bool:
    """Whether `value` is right for a flag that takes a JSON object; true of other flags."""
    if flag not in OBJECTS:
        return True
    try:
        found = json.loads(value)
    except ValueError:
        return False
    patterns = OBJECTS[flag]
    return isinstance(found, dict) and all(
        key in patterns and re.fullmatch(patterns[key], each if isinstance(each, str) else json.dumps(each))
        for key, each in found.items()
    )


# Variables of a target

# Settings of libraries below an engine, and of engines: switches and numbers.
FAMILIES = ("CUDA", "NCCL", "OMP", "KMP", "MKL", "GOMP", "TORCH", "PYTORCH", "TORCHDYNAMO", "TORCHINDUCTOR", "TRITON")
FAMILIES_OF = {"transformers": (), "vllm": ("VLLM", "FLASHINFER"), "sglang": ("SGLANG", "SGL", "FLASHINFER")}
SWITCH = r"-?\d{1,18}(\.\d{1,9})?|[Tt]rue|[Ff]alse|TRUE|FALSE|[Oo]n|[Oo]ff|[Yy]es|[Nn]o"
# No switches: an engine takes code, files or models from elsewhere by them, or opens itself to whoever asks.
NO_SWITCHES = re.compile(
    r"INSECURE|PICKLE|DEV_MODE|LORA|MODELSCOPE|PLUGIN|EXTERNAL|_TEST_|SCRIPTED|REMOTE|TRUST|VISIBLE_DEVICES"
    r"|WEIGHTS_ONLY|LIBRARIES|MANAGER|REDIRECT|TRACE|TARGET_DEVICE|^NCCL_NET$"
    r"|_(PATH|DIR|FOLDER|ROOT|FILE|HOME|PORT)(_|$)"
)
# Variables with values of another kind, and what these may be.
VARIABLES = {
    "PATH": r"[^\0]*",  # where the program of the engine is
    "LANG": r"[\w.@-]{1,64}",
    "TZ": r"[\w+-]+(/[\w+-]+)*",
    "DO_NOT_TRACK": SWITCH,
    "NO_COLOR": SWITCH,
    "TOKENIZERS_PARALLELISM": SWITCH,
    "PYTHONDONTWRITEBYTECODE": SWITCH,
    "PYTHONHASHSEED": r"\d{1,10}",
    "CUDA_DEVICE_ORDER": "FASTEST_FIRST|PCI_BUS_ID",
    "CUDA_MODULE_LOADING": "LAZY|EAGER",
    "PYTORCH_ALLOC_CONF": r"[\w:,.\[\]-]+",
    "PYTORCH_CUDA_ALLOC_CONF": r"[\w:,.\[\]-]+",
    "TORCH_CUDA_ARCH_LIST": r"[\d.a +;PTX]+",
    "GLOO_SOCKET_IFNAME": r"[\w.:-]{1,32}",
    **dict.fromkeys(
        ("NCCL_P2P_LEVEL", "NCCL_NET_GDR_LEVEL", "NCCL_DEBUG", "NCCL_DEBUG_SUBSYS", "NCCL_ALGO", "NCCL_PROTO"),
        r"[\w,^:;-]{1,64}",
    ),
    **dict.fromkeys(("NCCL_SOCKET_IFNAME", "NCCL_IB_HCA"), r"[\w,=^:.-]{1,128}"),
    **dict.fromkeys(("OMP_PROC_BIND", "OMP_PLACES", "OMP_SCHEDULE", "OMP_WAIT_POLICY"), r"[\w,(){}:-]{1,128}"),
    "KMP_AFFINITY": r"[\w,=\[\]{}-]{1,128}",
    "MKL_THREADING_LAYER": r"\w{1,16}",
}
VARIABLES_OF = {
    "transformers": {},
    "vllm": {
        "VLLM_LOGGING_LEVEL": r"[A-Z]{1,8}",
        "VLLM_ATTENTION_BACKEND": NAME.pattern,
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn|fork",
        "VLLM_KV_CACHE_LAYOUT": NAME.pattern,
        "VLLM_MARLIN_INPUT_DTYPE": NAME.pattern,
        "VLLM_FLASHINFER_MOE_BACKEND": NAME.pattern,
        "VLLM_FLASHINFER_ALLREDUCE_BACKEND": NAME.pattern,
        "VLLM_NVFP4_GEMM_BACKEND": NAME.pattern,
        "VLLM_ALL2ALL_BACKEND": NAME.pattern,
        "VLLM_CPU_OMP_THREADS_BIND": r"[\w,|-]{1,128}",
        "VLLM_HOST_IP": r"127\.0\.0\.1",
        "VLLM_LOOPBACK_IP": r"127\.0\.0\.1",
    },
    "sglang": {"SGLANG_SM120_FLASHMLA_BACKEND": NAME.pattern, "SGLANG_FORCE_FUSED_OP_BACKEND": NAME.pattern},
}
LOCALE = re.compile(r"LC_[A-Z]+")


def wrong_variable(engine: str, name: str, value: str) -> str | None:
    """Why `engine` is not given this variable by a target, and what would be right; None if it is."""
    if LOCALE.fullmatch(name):
        return _unless(VARIABLES["LANG"], value)
    if pattern := (VARIABLES | VARIABLES_OF[engine]).get(name):
        return _unless(pattern, value)
    family = re.fullmatch(r"([A-Z]+)_[A-Z0-9_]+", name)
    if family and family[1] in (*FAMILIES, *FAMILIES_OF[engine]) and not NO_SWITCHES.search(name):
        return None if re.fullmatch(SWITCH, value, re.ASCII) else f"{brief(value)}; expected a number, true or false"
    return f"not known as harmless; expected one of those that docs/targets.md lists for {engine}"


def _unless(pattern: str, value: str) -> str | None:
    return None if re.fullmatch(pattern, value, re.ASCII) else f"{brief(value)}; expected as docs/targets.md says"


# Variables that a program inherits from whoever starts it.

INHERITED = re.compile(
    "PATH|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_PREFIX"  # where the engine and its libraries are
    "|HOME|USER|LOGNAME|SHELL|TERM|TMPDIR|XDG_CACHE_HOME|TRITON_CACHE_DIR|TORCHINDUCTOR_CACHE_DIR"  # where it may write
    "|LANG|LANGUAGE|LC_[A-Z]+|LOCALE_ARCHIVE|TZ"
    "|(CUDA|NVIDIA|NCCL|OMP|KMP|MKL|GOMP|OPENBLAS)_[A-Z0-9_]+"  # what this machine needs
)
