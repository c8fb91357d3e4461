"""The rates that plans reckon hours with, fitted to measured blocks: benchmarks/results/rates.json.

    python benchmarks/rates.py

An iteration is taken for a + b x operations of its matrix products + c x weights. On the GPU, blocks of DeepSeek-V3.2's
shape on an H100 (`real_block.py`), which all have much the same operations, so a is left out; on the CPU, random blocks
of many shapes (`tuner.py growth`). Passes of blocks: on the CPU at the rate of its matrix products; on the GPU as the
block of most samples passed there when it was run as shipped. What else a quantize job of that block took, without
files, is its start. What the graph takes for a job is that of `coordination.py` on one core, and a process before its
job begins that of `timeline.py check`; both were measured on a CPU.
"""

import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks"), str(ROOT / "tests")]


def features(config: dict, block: int, tokens: int, length: int) -> list[float]:
    """[1, operations of an iteration, weights] of a block of the model with that config.json."""
    from requant.duration import WITH_BACKWARD
    from requant.shapes import pass_work
    from requant.structure import from_config

    kind = next(kind for kind in from_config(config).kinds if block in kind.blocks)
    weights = sum(rows * columns for rows, columns in kind.linear_shapes.values())
    return [1.0, WITH_BACKWARD * pass_work(kind, config, tokens, length), float(weights)]


def fit(rows: list[list[float]], seconds: list[float], used: list[int]) -> tuple[list[float], float]:
    """(coefficients of the columns `used`, 0 for others; largest relative error), least squares of relative errors."""
    known, wanted = np.array(rows), np.array(seconds)
    scale = known.max(axis=0)
    relative = known[:, used] / scale[used] / wanted[:, None]
    found, *_ = np.linalg.lstsq(relative, np.ones(len(wanted)), rcond=None)
    assert (found >= 0).all(), f"negative rates {found}: the model does not describe these blocks"
    coefficients = np.zeros(known.shape[1])
    coefficients[used] = found / scale[used]
    return coefficients.tolist(), float(np.abs(known @ coefficients / wanted - 1).max())


def gpu_cases() -> list[dict]:
    cases = json.loads((RESULTS / "real_block_h100.json").read_text())
    return [case for case in cases if case["engine"] == "fused" and "error" not in case]


def of_gpu() -> tuple[list[list[float]], list[float], str]:
    from real_block import shape_of

    rows, seconds = [], []
    for case in gpu_cases():
        tokens = case["tokens_per_step"]
        rows.append(features(shape_of(case["experts"]), 3 if case["experts"] else 0, tokens, tokens // 8))
        seconds.append(case["seconds_per_iteration"])
    return rows, seconds, gpu_cases()[0]["device"]


def passes_on_gpu(operation: float, weight: float) -> tuple[float, float]:
    """(seconds an operation of a pass, seconds that a job takes beside iterations and passes) on the GPU."""
    from real_block import shape_of

    from requant.duration import PASSES, WITH_BACKWARD

    case = max(gpu_cases(), key=lambda case: case["samples"])
    tokens, batches = case["tokens_per_step"], case["samples"] / 8
    _, work, weights = features(shape_of(case["experts"]), 3, tokens, tokens // 8)
    passed = case["seconds"]["run what is shipped"]
    judged = 2 * batches * (work / WITH_BACKWARD * operation + weights * weight)
    known = case["iterations"] * case["seconds_per_iteration"] + judged + PASSES["quantized"] * passed
    return passed / (batches * work / WITH_BACKWARD), case["job_seconds"] - known


def of_cpu() -> tuple[list[list[float]], list[float], dict]:
    import tiny

    measured = json.loads((RESULTS / "tuner_growth.json").read_text())
    rows, seconds = [], []
    for case in measured["results"]:
        if case["engine"] != "fused":
            continue
        experts, tokens, width = (case["random"][key] for key in ("experts", "tokens", "width"))
        config = tiny.FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3", "n_routed_experts": experts}
        config |= {"num_experts_per_tok": 4, "hidden_size": width, "num_hidden_layers": 2}
        config |= {"moe_intermediate_size": max(128, width // 2), "intermediate_size": 2 * width}
        rows.append(features(config, 1, 8 * tokens, tokens))
        seconds.append(case["seconds_per_iteration"])
    return rows, seconds, measured["machine"]


def of_graph() -> dict[str, float]:
    """Seconds of the graph for a job, and of a process before its job begins."""
    builds = json.loads((RESULTS / "coordination.json").read_text())
    (graph,) = (run for run in builds if run["cores"] == 1 and run["scheduler"] == "ilp")
    runs = json.loads((RESULTS / "timeline_check.json").read_text())["results"]
    starts = [run["job_start"] for run in runs if run["cores"] == 1]
    return {"coordination": graph["outside_a_job"], "job_start": sum(starts) / len(starts)}


def main() -> None:
    rows, seconds, machine = of_cpu()
    a_pass = 1 / machine["matrix_flops"]
    on_cpu = f"{machine['cpu']}, one thread, {machine['matrix_flops'] / 1e12:.2f} TFLOP/s"
    results = {}
    for name, title, source, found, used in (
        ("cpu", f"{machine['cpu']}, one thread", "tuner_growth.json", (rows, seconds), [0, 1, 2]),
        ("gpu", "", "real_block_h100.json", None, [1, 2]),
    ):
        if found is None:
            *found, title = of_gpu()
        (iteration, operation, weight), error = fit(*found, used)
        pass_operation, pass_machine, start = a_pass, on_cpu, 0.0
        if name == "gpu":
            (pass_operation, start), pass_machine = passes_on_gpu(operation, weight), title
        rates = f"{iteration * 1e3:.1f} ms, {1 / operation / 1e12:.3g} TFLOP/s, {weight * 1e12:.3g} ps a weight"
        print(f"{title}: {rates}; largest error {error:.0%}")
        results[name] = {
            "machine": title,
            "source": f"benchmarks/results/{source}, within {error:.0%}",
            "iteration": iteration,
            "operation": operation,
            "weight": weight,
            "pass_operation": pass_operation,
            "pass_machine": pass_machine,
            "start": start,
            **of_graph(),
        }
    (RESULTS / "rates.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
