"""What a target may tell its engine, and what an engine sees of the environment: what is listed, nothing else."""

import argparse
import os
import re
from pathlib import Path

import pytest

from requant import serving
from requant.config import Target
from requant.engine_arguments import FLAGS, INHERITED, REASONS, problem_in, wrong_variable
from requant.target_files import FOLDER, read_targets

ROOT = Path(__file__).resolve().parents[2]
ENGINES = tuple(FLAGS)
MTP = '{"method": "mtp", "num_speculative_tokens": 1}'


@pytest.mark.parametrize(
    ("engine", "arguments"),
    [
        ("vllm", ["--enforce-eager", "--max-num-seqs", "8", "--max-num-batched-tokens=8k", "--seed=-1"]),
        ("vllm", ["--no-enable-prefix-caching", "--cudagraph-capture-sizes", "1", "2", "4", "--dtype", "bfloat16"]),
        ("vllm", ["--speculative-config", MTP, "--reasoning-parser=deepseek_v3", "--generation-config", "vllm"]),
        ("vllm", ["--compilation-config", '{"cudagraph_capture_sizes": [1, 2], "cudagraph_mode": "PIECEWISE"}']),
        ("vllm", ["--max_num_seqs", "8", "--enable_expert_parallel"]),
        ("sglang", ["--attention-backend", "flashinfer", "--cuda-graph-bs", "1", "2", "--disable-radix-cache"]),
        ("sglang", ["--speculative-algorithm", "NEXTN", "--speculative-num-steps=3", "--tool-call-parser", "glm45"]),
        ("transformers", ["--continuous-batching", "--attn-implementation", "sdpa", "--no-compile"]),
        ("transformers", ["--chat-template-kwargs", '{"enable_thinking": false}', "--default-seed", "7"]),
        *((engine, []) for engine in ENGINES),
    ],
)
def test_what_makes_an_engine_faster_or_smaller_is_allowed(engine, arguments):
    assert problem_in(engine, arguments) is None


def test_every_target_of_the_checkout_is_allowed():
    for target in map(Target.model_validate, read_targets(ROOT / FOLDER).values()):
        assert problem_in(target.engine, target.arguments) is None


# By what it would let happen, a word each; all are tried with every engine.
REFUSED = {
    "code of a checkpoint": "--trust-remote-code --trust_remote_code --trust-r --trust-remote-code=true",
    "code by name": """
        --middleware=os.system --worker-cls=x.Y --worker-extension-cls=x.Y --scheduler-cls=x.Y --logits-processors=x.Y
        --io-processor-plugin=x --tool-parser-plugin=/x.py --reasoning-parser-plugin=/x.py --custom-weight-loader=x.y
        --model-class-overrides={} --forward-hooks=[] --sidecar=x --enable-custom-logit-processor --middle=os.system
        --worker_cls=x.Y""",
    "another model": """
        --model=org/name --model-path=/x --tokenizer=org/name --tokenizer-path=/x --hf-config-path=/x --enable-lora
        --lora-modules=a=/x --lora-paths=/x --speculative-draft-model-path=org/name --spec-model=org/name
        --revision=main --code-revision=main --token=org/name --speculative-config={"model":"org/name"}
        --speculative-config={"method":"mtp","model":"org/name"} --speculative-config.model=org/name""",
    "files": """
        --config=/x.yaml --config --chat-template=/x.jinja --download-dir=/x --ssl-keyfile=/x --ssl-ca-certs=/x --dl=/x
        --decision-config=/x --file-storage-path=/x --log-config-file=/x --allowed-local-media-path=/ -cc.backend=x.y
        --generation-config=/x --crash-dump-folder=/x --delete-ckpt-after-loading --load-format=dummy --load-format=pt
        --load-format=tensorizer --load-format=remote --compilation-config={"cache_dir":"/x"}
        --compilation-config={"backend":"x.y"} --compilation-config=/x --compilation-config={"cudagraph_mode":"../x"}
        --compilation-config.backend=x.y""",
    "others": """
        --host=0.0.0.0 --port=1 --uds=/x --api-key=a --hf-token=a --enable-cors --allowed-origins=* --root-path=/x
        --kv-transfer-config={} --otlp-traces-endpoint=http://x --nnodes=2 --tool-server=x""",
    "this model, changed": """
        --hf-overrides={} --json-model-override-args={} --quantization=fp8 -q=fp8 --override-generation-config={}
        --kv-cache-dtype=fp8 --max-model-len=1 --context-length=1 --tp=2 -tp=2 --device=cpu""",
    "values that are no names": """
        --attention-backend=org/kernels --attention-backend=x.y --attention-backend=http://x --dtype=../x --dtype=
        --attn-implementation=org/kernels --attn-implementation=paged|sdpa --moe-backend=a:b --reasoning-parser=/x.py
        --tool-call-parser=x.y --log-level=/x --moe-runner-backend=b12x/extra --distributed-executor-backend=x.Y""",
    "what is no flag": "org/name serve - -- -O3 ---dtype=auto --no-trust-remote-code",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_runs_code_reads_files_or_changes_the_model_is_refused(kind):
    for engine in ENGINES:
        keys = {"device": "cuda", "gpu": "sm90"} if engine != "transformers" else {}
        for argument in REFUSED[kind].split():
            name, equals, value = argument.partition("=")
            for arguments in ([argument], ["--dtype", "auto", *([name, value] if equals else [name])]):
                with pytest.raises(ValueError, match="arguments: ") as error:
                    Target(engine=engine, arguments=arguments, **keys)
                assert "expected" in str(error.value), (engine, arguments)


UNKNOWN = "not known as harmless; expected one of those that docs/targets.md lists for"


@pytest.mark.parametrize(
    ("engine", "arguments", "line"),
    [
        ("vllm", ["--trust-r"], "'--trust-r': no code of a checkpoint is run; expected other arguments: docs/"),
        ("vllm", ["--middleware", "x"], "'--middleware': it names code to run; expected other arguments: docs/"),
        ("vllm", ["--enforce_eage"], f"'--enforce_eage': {UNKNOWN} vllm, perhaps --enforce-eager"),
        ("vllm", ["--max-num"], f"'--max-num': {UNKNOWN} vllm, perhaps --max-num-seqs or --max-num-batched-tokens"),
        ("sglang", ["--max_log"], f"'--max_log': {UNKNOWN} sglang"),
        ("sglang", ["--page_size", "8"], f"'--page_size': {UNKNOWN} sglang, perhaps --page-size"),
        ("vllm", ["--max-num-seqs"], "'--max-num-seqs': found without a value; expected a whole number"),
        ("vllm", ["--seed", "--enforce-eager"], "'--seed': found without a value; expected a whole number"),
        ("vllm", ["--max-num-seqs", "many"], "'--max-num-seqs': 'many'; expected a whole number"),
        ("vllm", ["--enforce-eager=1"], "'--enforce-eager=1': '1' found; expected nothing"),
        ("vllm", ["--enforce-eager", "yes"], "'yes': found without a flag that takes it; expected --FLAG, as docs/"),
        ("vllm", [""], "'': found without a flag that takes it"),
        ("vllm", ["--moe-backend", "a b"], "'--moe-backend': 'a b'; expected a name that the engine knows"),
        ("vllm", ["--moe-backend=a\n--middleware=x"], "'--moe-backend': 'a\\n--middleware=x'; expected a name that"),
        ("vllm", ["--dtype", "auto", "auto"], "'auto': found without a flag that takes it"),
        ("vllm", ["--speculative-config", "{}{"], "'--speculative-config': '{}{'; expected a JSON object with method"),
    ],
)  # fmt: skip
def test_a_refusal_says_what_was_found_and_what_would_be_right(engine, arguments, line):
    assert problem_in(engine, arguments).startswith(line)


def test_no_beginning_of_a_refused_flag_is_an_allowed_one():
    """Parsers take the beginning of a flag for the whole: one that is allowed has to be whole itself."""
    for engine, flags in FLAGS.items():
        assert not flags.keys() & REASONS.keys()
        for flag in flags:
            assert re.fullmatch(r"--[a-z0-9]+(-[a-z0-9]+)*", flag)
            assert problem_in(engine, [flag[:-1], "1"]) is not None, "no beginning of it is allowed"


def test_transformers_takes_every_flag_that_is_listed_for_it():
    """The parser of this environment's engine itself; those of others are not here."""
    from transformers.cli.transformers import app

    serve = app.get_command(None, "serve")
    options = {name for option in serve.params for name in (*option.opts, *option.secondary_opts)}
    assert FLAGS["transformers"].keys() <= options
    assert {"--no-continuous-batching", "--no-compile"} <= options


def test_beginnings_are_taken_for_flags_by_pythons_parser():
    """Why they are refused."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trust-remote-code", action="store_true")
    assert parser.parse_args(["--trust-rem"]).trust_remote_code


# Variables


@pytest.mark.parametrize(
    ("engine", "name", "value"),
    [
        ("vllm", "VLLM_MLA_DISABLE", "1"),
        ("vllm", "VLLM_LOGGING_LEVEL", "WARNING"),
        ("vllm", "VLLM_WORKER_MULTIPROC_METHOD", "spawn"),
        ("sglang", "SGLANG_ENABLE_SPEC_V2", "True"),
        ("vllm", "PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:128"),
        ("sglang", "NCCL_P2P_LEVEL", "SYS"),
        ("transformers", "OMP_NUM_THREADS", "4"),
        ("transformers", "LC_ALL", "C.UTF-8"),
        ("transformers", "TZ", "Europe/Berlin"),
        ("transformers", "PATH", "/engine/bin:/usr/bin"),
    ],
)
def test_switches_and_numbers_of_engines_and_their_libraries_are_allowed(engine, name, value):
    assert wrong_variable(engine, name, value) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("LD_PRELOAD", "/x.so"),
        ("LD_LIBRARY_PATH", "/x"),
        ("PYTHONPATH", "/x"),
        ("PYTHONSTARTUP", "/x.py"),
        ("PYTHONHOME", "/x"),
        ("PYTHONINSPECT", "1"),
        ("BASH_ENV", "/x"),
        ("HOME", "/x"),
        ("HF_HUB_OFFLINE", "0"),
        ("HF_ENDPOINT", "http://x"),
        ("TRANSFORMERS_CACHE", "/x"),
        ("http_proxy", "http://x"),
        ("VLLM_PLUGINS", "1"),
        ("VLLM_PLUGINS", "x"),
        ("VLLM_LOGGING_CONFIG_PATH", "1"),
        ("VLLM_CACHE_ROOT", "1"),
        ("VLLM_SERVER_DEV_MODE", "1"),
        ("VLLM_ALLOW_INSECURE_SERIALIZATION", "1"),
        ("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "true"),
        ("VLLM_USE_MODELSCOPE", "True"),
        ("VLLM_USE_FLASHINFER_SAMPLER", "/x"),
        ("VLLM_LOGGING_LEVEL", "../x"),
        ("VLLM_HOST_IP", "10.0.0.1"),
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "x"),
        ("SGLANG_EXTERNAL_MODEL_PACKAGE", "1"),
        ("SGLANG_USE_PICKLE_IPC", "1"),
        ("SGLANG_TEST_SCRIPTED_RUNTIME_SYS_PATH_ENTRY", "1"),
        ("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1"),
        ("NCCL_NET", "1"),
        ("OMP_TOOL_LIBRARIES", "1"),
        ("TRITON_CACHE_MANAGER", "1"),
        ("TORCH_TRACE", "1"),
        ("SGLANG_MODEL_REDIRECT", "1"),
        ("OMP_NUM_THREADS", "\u0664"),
        ("NCCL_NET_PLUGIN", "x"),
        ("NCCL_NET_PLUGIN", "1"),
        ("NCCL_CONF_FILE", "1"),
        ("NCCL_DEBUG_FILE", "/x"),
        ("CUDA_INJECTION64_PATH", "/x.so"),
        ("CUDA_VISIBLE_DEVICES", "0"),
        ("TRITON_PTXAS_PATH", "/x"),
        ("NCCL_DEBUG", "INFO\nX"),
        ("vllm_mla_disable", "1"),
        ("", "1"),
        ("PATH", "/x\0"),
        ("A=B", "1"),
    ],
)
def test_variables_that_name_code_files_or_addresses_are_refused(name, value):
    for engine in ENGINES:
        keys = {"device": "cuda", "gpu": "sm90"} if engine != "transformers" else {}
        with pytest.raises(ValueError, match="environment: ") as error:
            Target(engine=engine, environment={name: value}, **keys)
        assert "expected" in str(error.value)


def test_a_program_inherits_what_it_needs_and_nothing_else(tmp_path, monkeypatch):
    """Whatever is in the environment of whoever starts it: a token under any name, a proxy, what is loaded first."""
    for name in list(os.environ):
        monkeypatch.delenv(name)
    needed = {"PATH": "/bin", "LD_LIBRARY_PATH": "/driver", "HOME": "/home/me", "LC_ALL": "C", "NCCL_DEBUG": "INFO"}
    needed |= {"CUDA_VISIBLE_DEVICES": "0", "OMP_NUM_THREADS": "2", "TMPDIR": "/scratch", "PYTHONPATH": "/engine"}
    others = ["GITHUB_PAT", "DATABASE_URL", "SSH_AUTH_SOCK", "HTTPS_PROXY", "http_proxy", "LD_PRELOAD", "PYTHONSTARTUP"]
    others += ["VLLM_PLUGINS", "VLLM_MLA_DISABLE", "HF_TOKEN", "HF_HOME", "REQUANT_BUILD", "BASH_ENV", "NCCL_API_KEY"]
    for name, value in (needed | dict.fromkeys(others, "mine")).items():
        monkeypatch.setenv(name, value)
    seen = serving._child_environment({"HF_HUB_OFFLINE": "1"}, tmp_path)
    assert seen.items() >= needed.items() and "mine" not in seen.values()
    assert seen["HF_HUB_OFFLINE"] == "1" and seen["HF_HOME"] == str(tmp_path)
    assert not any(INHERITED.fullmatch(name) for name in others[:-1])
