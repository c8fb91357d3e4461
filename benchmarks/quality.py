"""Whole releases of the embedded model, tuned in several ways, several seeds each: KL and scores.

    python benchmarks/quality.py [engines | inputs] [--seeds 42 43 44] [--schemes NVFP4 W3A16]
                                 [--directory build/quality] [--out FOLDER]

Builds, up to the benchmarks, a release for each way, seed and scheme in a directory of its own. engines: AutoRound,
`fused` and `fused` with AutoRound's way to choose, 12 minutes a seed on 2 cores, most of it AutoRound's. inputs: blocks
tuned on the quantized blocks before them, on the source's, and in chains of 3 and of 2 blocks. A build that was stopped
goes on; what earlier calls built in the directory is in the results too.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
SCHEMES = ("NVFP4", "W3A16")
WAYS = {
    "engines": {
        "AutoRound": {"engine": "auto_round"},
        "fused": {"engine": "fused", "judge": "samples"},
        "fused, minibatch": {"engine": "fused", "judge": "minibatch"},
    },
    "inputs": {
        "quantized": {},
        "chains of 3": {"segment": 3},
        "chains of 2": {"segment": 2},
        "reference": {"inputs": "reference"},
    },
}
MEASURES = ("kl_divergence", "top1_agreement", "perplexity", "exact_match", "bits_per_byte")


def releases(ways: dict, seeds: list[int], schemes: list[str]) -> dict[tuple[str, str, int], str]:
    """(scheme, tuning, seed) -> name of the release."""
    return {
        (scheme, tuning, seed): f"{prefix(scheme, tuning)}{seed}"
        for tuning in ways
        for scheme in schemes
        for seed in seeds
    }


def prefix(scheme: str, tuning: str) -> str:
    """The name of a release without its seed."""
    return "-".join([scheme, *tuning.replace(",", "").split(), ""]).lower()


def built(ways: dict, results: Path) -> dict[tuple[str, str, int], str]:
    """The releases in `results` that were measured, as `releases` has them."""
    found = {}
    for scheme in SCHEMES:
        for tuning in ways:
            start = prefix(scheme, tuning)
            folders = (path.parent.name for path in sorted(results.glob(f"{start}*/benchmark.json")))
            seeds = (name.removeprefix(start) for name in folders)
            found |= {(scheme, tuning, int(seed)): f"{start}{seed}" for seed in seeds if seed.isdigit()}
    return found


def build(ways: dict, names: dict, directory: Path) -> None:
    """Builds the evaluation and the benchmark of every release."""
    of_release = {"model": "demo-moe", "calibration": "demo", "benchmark": "demo"}
    config = {
        name: of_release | {"scheme": scheme, "tuning": ways[tuning] | {"seed": seed}}
        for (scheme, tuning, seed), name in names.items()
    }
    directory.mkdir(parents=True, exist_ok=True)
    file = directory.absolute() / "quality.yaml"
    file.write_text(yaml.safe_dump({"releases": config}))
    targets = [f"results/{name}/{kind}.json" for name in names.values() for kind in ("evaluate", "benchmark")]
    command = ["snakemake", "--snakefile", ROOT / "Snakefile", "--directory", directory, "--configfile", file]
    subprocess.run([*command, "--cores", "all", "--", *targets], check=True)


def measured(results: Path, name: str) -> dict[str, float]:
    """What the build measured of a release."""
    evaluated = json.loads((results / name / "evaluate.json").read_text())
    scores = json.loads((results / name / "benchmark.json").read_text())["scores"]
    of_metric = {score["metric"]: score["value"] for score in scores}
    values = evaluated["quantized"] | of_metric
    return {measure: values[measure] for measure in MEASURES} | {
        "kl_divergence_stderr": evaluated["quantized"]["kl_divergence_stderr"],
        "rounded_kl_divergence": evaluated["rounded"]["kl_divergence"],
    }


def main() -> None:
    """Builds, prints means and standard deviations over the seeds, and writes every figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=WAYS, default="engines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--directory", type=Path, default=ROOT / "build" / "quality")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    arguments = parser.parse_args()
    if len(set(arguments.seeds)) < 2:
        sys.exit("--seeds: one seed has no spread; give two or more")
    ways = WAYS[arguments.what]
    build(ways, releases(ways, arguments.seeds, arguments.schemes), arguments.directory)
    results = arguments.directory / "results"
    rows = [
        {"scheme": scheme, "tuning": tuning, "seed": seed} | measured(results, name)
        for (scheme, tuning, seed), name in built(ways, results).items()
    ]
    arguments.out.mkdir(parents=True, exist_ok=True)
    name = "quality.json" if arguments.what == "engines" else f"quality_{arguments.what}.json"
    (arguments.out / name).write_text(json.dumps(rows, indent=1) + "\n")
    print("scheme, tuning:", ", ".join(MEASURES), "(mean ± standard deviation)")
    for scheme in SCHEMES:
        for tuning in ways:
            ours = [row for row in rows if (row["scheme"], row["tuning"]) == (scheme, tuning)]
            columns = [[row[measure] for row in ours] for measure in MEASURES]
            if len(ours) < 2:
                continue
            print(
                f"{scheme}, {tuning}, {len(ours)} seeds:",
                ", ".join(f"{statistics.mean(c):.4f} ± {statistics.stdev(c):.4f}" for c in columns),
            )


if __name__ == "__main__":
    main()
