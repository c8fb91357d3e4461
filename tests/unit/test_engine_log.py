"""The error that a user sees of an engine is the first real one of its log, whatever its processes say while they end.

The logs have the form of the engines' own: vLLM 0.26 (and 0.8, whose lines name no process), sglang 0.5 and
transformers 5, and of what shells, Docker and the kernel write.
"""

import pytest

from requant import engine_log
from requant.engine_log import first_error, last_lines, told

VLLM_WORKERS = """\
INFO 11-30 12:00:00 [__init__.py:216] Automatically detected platform cuda.
(APIServer pid=1) INFO 11-30 12:00:04 [api_server.py:1839] vLLM API server version 0.26.0
(EngineCore_DP0 pid=96) WARNING 11-30 12:00:09 [_custom_ops.py:20] Failed to import from vllm._C with ImportError('x')
(Worker_TP0 pid=120) INFO 11-30 12:00:19 [gpu_model_runner.py:2602] Starting to load model release...
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783] WorkerProc failed to start.
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783] Traceback (most recent call last):
(Worker_TP0 pid=120) ERROR 11-30 12:00:20 [multiproc_executor.py:783] WorkerProc failed to start.
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783]   File "v1/executor.py", line 754, in worker_main
(Worker_TP0 pid=120) ERROR 11-30 12:00:20 [multiproc_executor.py:783] Traceback (most recent call last):
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783]     worker = WorkerProc(*args, **kwargs)
(Worker_TP0 pid=120) ERROR 11-30 12:00:20 [multiproc_executor.py:783]   File "v1/executor.py", line 754, in worker_main
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783]              ^^^^^^^^^^^^^^^^^^^^^^^^^^^
(Worker_TP1 pid=121) ERROR 11-30 12:00:20 [multiproc_executor.py:783] ValueError: only supports int4 and int8 now
(Worker_TP0 pid=120) ERROR 11-30 12:00:20 [multiproc_executor.py:783]     worker = WorkerProc(*args, **kwargs)
(Worker_TP0 pid=120) ERROR 11-30 12:00:20 [multiproc_executor.py:783] ValueError: only supports int4 and int8 now
[rank0]:[W1130 12:00:21.512 ProcessGroupNCCL.cpp:1538] Warning: destroy_process_group() was not called
(EngineCore_DP0 pid=96) ERROR 11-30 12:00:22 [core.py:866] EngineCore failed to start.
(EngineCore_DP0 pid=96) ERROR 11-30 12:00:22 [core.py:866] Traceback (most recent call last):
(EngineCore_DP0 pid=96) ERROR 11-30 12:00:22 [core.py:866]   File "v1/core.py", line 857, in run_engine_core
(EngineCore_DP0 pid=96) ERROR 11-30 12:00:22 [core.py:866]     raise e from None
(EngineCore_DP0 pid=96) ERROR 11-30 12:00:22 [core.py:866] Exception: WorkerProc initialization failed due to an \
exception in a background process. See stack trace for root cause.
(EngineCore_DP0 pid=96) Process EngineCore_DP0:
(EngineCore_DP0 pid=96) Traceback (most recent call last):
(EngineCore_DP0 pid=96)   File "multiprocessing/process.py", line 314, in _bootstrap
(EngineCore_DP0 pid=96)     self.run()
(EngineCore_DP0 pid=96) Exception: WorkerProc initialization failed due to an exception in a background process. See \
stack trace for root cause.
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "bin/vllm", line 10, in <module>
(APIServer pid=1)     sys.exit(main())
(APIServer pid=1)              ^^^^^^
(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
"""
VLLM_OLD = """\
INFO 05-23 09:31:22 [loader.py:458] Loading weights took 38.52 seconds
ERROR 05-23 09:31:47 [core.py:396] EngineCore failed to start.
ERROR 05-23 09:31:47 [core.py:396] Traceback (most recent call last):
ERROR 05-23 09:31:47 [core.py:396] File "vllm/v1/engine/core.py", line 387, in run_engine_core
ERROR 05-23 09:31:47 [core.py:396] engine_core = EngineCoreProc(*args, **kwargs)
ERROR 05-23 09:31:47 [core.py:396] ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
ERROR 05-23 09:31:47 [core.py:396] File "vllm/v1/engine/core.py", line 71, in init
ERROR 05-23 09:31:47 [core.py:396] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB.
Process EngineCore_0:
Traceback (most recent call last):
  File "multiprocessing/process.py", line 314, in _bootstrap
    self.run()
torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB.
Traceback (most recent call last):
  File "bin/vllm", line 8, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_0': 1}
"""
VLLM_DIES_WHILE_ASKED = """\
(APIServer pid=1) INFO:     127.0.0.1:51134 - "POST /v1/completions HTTP/1.1" 200 OK
(EngineCore_DP0 pid=96) ERROR 11-30 12:03:00 [core.py:940] EngineCore encountered a fatal error.
(EngineCore_DP0 pid=96) ERROR 11-30 12:03:00 [core.py:940] Traceback (most recent call last):
(EngineCore_DP0 pid=96) ERROR 11-30 12:03:00 [core.py:940]   File "v1/core.py", line 931, in run_engine_core
(EngineCore_DP0 pid=96) ERROR 11-30 12:03:00 [core.py:940] ValueError: Head dimension 96 is not supported by MLA
(APIServer pid=1) ERROR 11-30 12:03:00 [async_llm.py:540] AsyncLLM output_handler failed.
(APIServer pid=1) ERROR 11-30 12:03:00 [async_llm.py:540] Traceback (most recent call last):
(APIServer pid=1) ERROR 11-30 12:03:00 [async_llm.py:540] vllm.v1.engine.exceptions.EngineDeadError: EngineCore \
encountered an issue. See stack trace (above) for the root cause.
(APIServer pid=1) INFO:     Shutting down
"""
VLLM_CONFIG = """\
(APIServer pid=1) Traceback (most recent call last):
(APIServer pid=1)   File "bin/vllm", line 10, in <module>
(APIServer pid=1)     sys.exit(main())
(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
(APIServer pid=1)   Value error, Quantization method in the model config (auto-round) does not match [type=value_error]
(APIServer pid=1)     For further information visit the documentation
"""
SGLANG = """\
[2026-11-30 12:00:00] server_args=ServerArgs(model_path='/model', log_level='error', on_exception='Traceback')
[2026-11-30 12:00:05 TP0] Load weight begin. avail mem=138.11 GB
[2026-11-30 12:00:08 TP1] Scheduler hit an exception: Traceback (most recent call last):
  File "sglang/srt/managers/scheduler.py", line 3985, in run_scheduler_process
    scheduler = Scheduler(
                ^^^^^^^^^^
  File "sglang/srt/layers/quantization/compressed_tensors.py", line 512, in get_scheme
    raise NotImplementedError(
NotImplementedError: Current platform does not support w4a4 nvfp4 quantization.

[2026-11-30 12:00:08] Received sigquit from a child process. It usually means the child failed.
[2026-11-30 12:00:09] Rank 0 scheduler is dead. Please check if there are relevant logs.
[2026-11-30 12:00:09] Exit code: -9
Traceback (most recent call last):
  File "sglang/launch_server.py", line 29, in <module>
    launch_server(server_args)
  File "multiprocessing/connection.py", line 250, in recv
    buf = self._recv_bytes()
EOFError
"""
SGLANG_TAGGED = """\
[2026-11-30 12:00:08] ERROR:    Traceback (most recent call last):
  File "asyncio/runners.py", line 44, in run
    return loop.run_until_complete(main)
asyncio.exceptions.CancelledError
2026-11-30T12:00:07.810074780Z [2026-11-30 12:00:07.123 DP0 TP0 EP0] Scheduler hit an exception: \
Traceback (most recent call last):
2026-11-30T12:00:07.810074781Z   File "sglang/detokenizer.py", line 124, in init
2026-11-30T12:00:07.810074782Z zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:29236')
2026-11-30T12:00:07.810311167Z [2026-11-30 12:00:07] Received sigquit from a child process. It usually means so.
2026-11-30T12:00:09.784774673Z RuntimeError: sglang subprocess exited with code -9 before reporting ready
"""
TRANSFORMERS = """\
\x1b[33mWARNING\x1b[0m:root:slow path is used: KeyError: 'flash'
Loading weights:   0%|          | 0/95 [00:00<?, ?it/s]\rLoading weights: 100%|##########| 95/95 [00:00<00:00, 9 it/s]
Traceback (most recent call last):
  File "transformers/models/auto/configuration_auto.py", line 1170, in from_pretrained
    config_class = CONFIG_MAPPING[config_dict["model_type"]]
KeyError: 'qwen9'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "bin/transformers", line 8, in <module>
    sys.exit(main())
ValueError: The checkpoint has model type `qwen9` but Transformers does not recognize this architecture.
"""
UVICORN = """\
INFO:     Started server process [77]
INFO:     Waiting for application startup.
ERROR:    Traceback (most recent call last):
  File "starlette/routing.py", line 694, in lifespan
    async with self.lifespan_context(app) as maybe_state:
OSError: release does not appear to have a file named config.json.

ERROR:    Application startup failed. Exiting.
"""
GROUP = """\
  + Exception Group Traceback (most recent call last):
  |   File "asyncio/runners.py", line 118, in run
  |     return self._loop.run_until_complete(task)
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "engine.py", line 4, in start
    | PermissionError: [Errno 13] Permission denied: '/cache'
    +------------------------------------
"""
BOX = """\
Usage: transformers serve [OPTIONS] [FORCE_MODEL]
Try 'transformers serve --help' for help.
╭─ Error ──────────────────────────────────────────╮
│ No such option: --no-such-option                 │
╰──────────────────────────────────────────────────╯
"""
WARNED = """\
WARNING:usage:could not be sent
Traceback (most recent call last):
  File "usage.py", line 3, in send
requests.exceptions.ConnectionError: no network
INFO:serve:loading
Traceback (most recent call last):
  File "serve.py", line 9, in load
RuntimeError: shape mismatch at layers.3.mlp.experts.w13_weight_packed
"""
NCCL = """\
(Worker_TP1 pid=2) ERROR 11-30 12:00:30 [x.py:1] RuntimeError: NCCL error: remote process exited or there was a \
network error
[rank0]: Traceback (most recent call last):
[rank0]:   File "x.py", line 1, in <module>
[rank0]:     load()
[rank0]: safetensors_rust.SafetensorError: Error while deserializing header: invalid header length
"""
CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 1, in <module>
AttributeError: 'ReplicatedLinear' object has no attribute 'weight'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 1, in <module>
RuntimeError: Engine process failed to start. See stack trace for the root cause.
"""


@pytest.mark.parametrize(
    ("log", "error"),
    {
        "vLLM, workers": (VLLM_WORKERS, "ValueError: only supports int4 and int8 now"),
        "vLLM, no process named": (
            VLLM_OLD,
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 50.00 MiB.",
        ),
        "vLLM, while asked": (VLLM_DIES_WHILE_ASKED, "ValueError: Head dimension 96 is not supported by MLA"),
        "vLLM, config": (
            VLLM_CONFIG,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig Value error, "
            "Quantization method in the model config (auto-round) does not match [type=value_error]",
        ),
        "vLLM, arguments": (
            "usage: vllm serve [model_tag] [options]\nvllm serve: error: unrecognized arguments: --no-such\n",
            "vllm serve: error: unrecognized arguments: --no-such",
        ),
        "sglang": (SGLANG, "NotImplementedError: Current platform does not support w4a4 nvfp4 quantization."),
        "sglang, all stamps": (
            SGLANG_TAGGED,
            "zmq.error.ZMQError: Address already in use (addr='tcp://127.0.0.1:29236')",
        ),
        "sglang, arguments": (
            "launch_server.py: error: argument --tp-size: invalid int value: 'x'",
            "launch_server.py: error: argument --tp-size: invalid int value: 'x'",
        ),
        "transformers": (
            TRANSFORMERS,
            "KeyError: 'qwen9'; then ValueError: The checkpoint has model type `qwen9` but Transformers does not "
            "recognize this architecture.",
        ),
        "transformers, arguments": (BOX, "No such option: --no-such-option"),
        "uvicorn": (UVICORN, "OSError: release does not appear to have a file named config.json."),
        "an exception group": (GROUP, "PermissionError: [Errno 13] Permission denied: '/cache'"),
        "a cause and its wrapper": (CHAINED, "AttributeError: 'ReplicatedLinear' object has no attribute 'weight'"),
        "a traceback that is only a warning": (
            WARNED,
            "RuntimeError: shape mismatch at layers.3.mlp.experts.w13_weight_packed",
        ),
        "another rank's end": (
            NCCL,
            "safetensors_rust.SafetensorError: Error while deserializing header: invalid header length",
        ),
        "no module": (
            "Traceback (most recent call last):\n  File \"x\", line 1\nModuleNotFoundError: No module named 'vllm'",
            "ModuleNotFoundError: No module named 'vllm'",
        ),
        "an assertion": (
            'Traceback (most recent call last):\n  File "a.py", line 3, in split\n    assert heads % size == 0\n'
            "           ^^^^^^^^^^^^^^^^^\nAssertionError\n",
            "AssertionError (assert heads % size == 0)",
        ),
        "a compiler": (
            'Traceback (most recent call last):\n  File "jit.py", line 9, in build\n    run()\n'
            "RuntimeError: Ninja build failed. Ninja output:\nninja: error: '/x/a.cu' missing\n",
            "RuntimeError: Ninja build failed. Ninja output: ninja: error: '/x/a.cu' missing",
        ),
        "Ray": (
            "(RayWorkerWrapper pid=616, ip=127.0.0.1) Traceback (most recent call last):\n"
            '(RayWorkerWrapper pid=616, ip=127.0.0.1)   File "w.py", line 1, in load\n'
            "(RayWorkerWrapper pid=616, ip=127.0.0.1) KeyError: 'layers.0.mlp.experts.w2_weight_scale'\n"
            "ray.exceptions.RayTaskError(KeyError): ray::worker()\n",
            "KeyError: 'layers.0.mlp.experts.w2_weight_scale'",
        ),
        "a port": (
            "INFO:     Started server process [7]\n"
            "ERROR:    [Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address in use\n",
            "[Errno 98] error while attempting to bind on address ('127.0.0.1', 8000): address in use",
        ),
        "sglang, kernels that are compiled for too long": (
            """\
[2026-12-01 03:43:21] INFO:     Uvicorn running on http://127.0.0.1:35173 (Press CTRL+C to quit)
[2026-12-01 03:50:51] Pyspy failed (py-spy dump --native --pid 9078). Error: /bin/sh: 1: py-spy: not found

[2026-12-01 03:50:51] All pyspy dump attempts failed for PID 9078.
[2026-12-01 03:50:51] Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)
[2026-12-01 03:50:56] SIGQUIT received. signum=None, frame=None. It usually means one child failed.
""",
            "Scheduler watchdog timeout (self.watchdog_timeout=300, self.soft=False)",
        ),
        "no such module": ("/usr/bin/python3: No module named sglang", "/usr/bin/python3: No module named sglang"),
        "no such program": ("bash: /x/vllm: No such file or directory", "bash: /x/vllm: No such file or directory"),
        "another architecture": ("exec /x/python3: exec format error", "exec /x/python3: exec format error"),
        "no traceback": ("loading\nOSError: config.json has no model_type\n", "OSError: config.json has no model_type"),
        "a shell": ("/bin/sh: 1: vllm: not found\n", "/bin/sh: 1: vllm: not found"),
        "another shell": ("bash: line 1: vllm: command not found\n", "bash: line 1: vllm: command not found"),
        "the kernel": ("loading shard 1\nloading shard 2\nKilled\n", "Killed"),
        "a library": (
            "python3: error while loading shared libraries: libcuda.so.1: cannot open shared object file",
            "python3: error while loading shared libraries: libcuda.so.1: cannot open shared object file",
        ),
        "Docker": (
            "docker: Error response from daemon: could not select device driver\n",
            "docker: Error response from daemon: could not select device driver",
        ),
        "C++": (
            "terminate called after throwing 'c10::Error'\n  what():  CUDA error: unknown error\nAborted\n",
            "what(): CUDA error: unknown error",
        ),
        "a level alone": (
            "(APIServer pid=1) ERROR 11-30 12:00:00 [utils.py:1] Port 8000 is in use\n",
            "Port 8000 is in use",
        ),
        "nothing but a pointer": (
            "RuntimeError: Engine core initialization failed. See root cause above.\n",
            "RuntimeError: Engine core initialization failed. See root cause above.",
        ),
    }.values(),
)
def test_the_first_real_error_is_found(log, error):
    assert first_error(log) == error


@pytest.mark.parametrize(
    "log",
    [
        "",
        "INFO 11-30 12:00:00 [loader.py:1] Loading weights took 3 s\nloading shard 1 of 9\n",
        "(EngineCore_DP0 pid=9) WARNING 11-30 12:00:00 [nvfp4.py:1] Error: none\nno RuntimeError: at all\n",
        "WARNING:root:KeyError: 'flash'\n",
        'INFO:     127.0.0.1:1 - "GET /health HTTP/1.1" 503 Service Unavailable\n',
        "[2026-11-30 12:00:00] server_args=ServerArgs(log_level='error')\n",
        'Exception ignored in: <function Pool.__del__>\nTraceback (most recent call last):\n  File "p.py", line 1\n'
        "ResourceWarning: unclosed\n",
    ],
)
def test_a_log_without_an_error_has_none(log):
    assert first_error(log) is None


def test_without_an_error_the_last_lines_are_told(tmp_path):
    log = tmp_path / "log"
    assert told(log) == "it wrote nothing"
    log.write_bytes(b"one\n\n\x1b[32mtwo\x1b[0m\n0%\r50%\r100%\nthree\nfour\n\xff five\n")
    assert told(log) == "two | 100% | three | four | \ufffd five"
    assert last_lines("one\ntwo\n", 1) == "two"
    assert told(log, "was ended by SIGKILL").endswith("five; the system ends a process so where memory runs out")
    log.write_text(SGLANG)
    assert told(log).startswith("NotImplementedError: ")
    assert told(log, "was ended by SIGKILL") == told(log), "sglang ends its own processes so"


def test_a_long_error_is_cut_and_stays_one_line():
    found = first_error("RuntimeError: " + "x" * 1000 + "\x00\n")
    assert len(found) == engine_log.SHOWN + 1 and "\n" not in found and found.endswith("…")
