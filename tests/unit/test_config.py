"""The closed config: every wrong key or value is one line that names it and says what is allowed."""

import copy

import pytest

from requant.config import parse, verify_limits
from requant.errors import RequantError

FIVE_LINES = {
    "models": {"mine": {"path": "/data/my-checkpoint"}},
    "releases": {"mine-nvfp4": {"model": "mine", "scheme": "NVFP4"}},
    "build": ["mine-nvfp4"],
}


def changed(path: str, value) -> dict:
    data = copy.deepcopy(FIVE_LINES)
    *parents, last = path.split("/")
    at = data
    for key in parents:
        at = at.setdefault(key, {})
    at[last] = value
    return data


def test_five_lines_are_a_config_with_the_public_releases_settings():
    config = parse(FIVE_LINES)
    release = config.releases["mine-nvfp4"]
    calibration = config.calibrations[release.calibration]
    assert (release.tuning.iters, release.tuning.batch_size, release.tuning.seed) == (200, 8, 42)
    assert (calibration.nsamples, calibration.seqlen, calibration.pack) == (512, 2048, "concat")
    assert release.tuning.inputs == "quantized"
    assert release.deploy.target in config.targets
    assert release.benchmark in config.benchmarks
    assert verify_limits(release) == (0.985, 0.14)


@pytest.mark.parametrize(
    ("path", "value", "expected"),
    [
        ("modles", {}, "config: modles: unknown key (value {}); expected: one of benchmarks, build, calibrations"),
        ("build", ["other"], "config: build: 'other' is not in `releases`; there: mine-nvfp4"),
        ("build", [], "config: build: []; expected"),
        ("build", ["mine-nvfp4", "mine-nvfp4"], "config: build: 'mine-nvfp4' is listed twice"),
        ("models/mine", {}, "config: models.mine.path, hub, bucket, from: none found; expected one: `path: DIR"),
        (
            "models/mine",
            {"path": "x", "hub": "org/name"},
            "config: models.mine.path, hub, bucket, from: path, hub found; expected one",
        ),
        ("models/mine", {"hub": "name"}, "config: models.mine.hub: 'name'; expected a repository of the hub, ORG/NAME"),
        ("models/mine", {"bucket": "s3://my-bucket//x"}, "config: models.mine.bucket: 's3://my-bucket//x'; expected"),
        ("models/mine", {"path": "x", "revision": "main"}, "config: models.mine.revision: 'main'; expected with `hub`"),
        (
            "models/mine",
            {"path": "x", "directory": "y"},
            "config: models.mine.directory: 'y'; expected with `hub` or `bucket` only",
        ),
        ("models/my model", {"path": "x"}, "config: models.my model: names have letters"),
        (
            "releases/source",
            {"model": "mine", "scheme": "NVFP4"},
            "config: releases.source: results/source/ is the graph's own",
        ),
        ("releases/mine-nvfp4/scheme", "NVFP5", "config: releases.mine-nvfp4.scheme: 'NVFP5'; expected: 'NVFP4'"),
        (
            "releases/mine-nvfp4/model",
            "other",
            "config: releases.mine-nvfp4.model: 'other' is not in `models`; there: mine",
        ),
        (
            "releases/mine-nvfp4/calibration",
            "x",
            "config: releases.mine-nvfp4.calibration: 'x' is not in `calibrations`",
        ),
        ("releases/mine-nvfp4/keep", ["("], "keep: '(' is not a regular expression"),
        (
            "releases/mine-nvfp4/tuning/iters",
            -1,
            "config: releases.mine-nvfp4.tuning.iters: -1; expected: greater than",
        ),
        (
            "releases/mine-nvfp4/tuning/iters",
            "many",
            "config: releases.mine-nvfp4.tuning.iters: 'many'; expected: a valid",
        ),
        ("releases/mine-nvfp4/tuning/iters", 1.5, "config: releases.mine-nvfp4.tuning.iters: 1.5; expected: a valid"),
        ("releases/mine-nvfp4/tuning/lr", 0, "config: releases.mine-nvfp4.tuning.lr: 0; expected: greater than 0"),
        ("releases/mine-nvfp4/tuning/momentum", 0.9, "config: releases.mine-nvfp4.tuning.momentum: 0.9: engine fused"),
        ("releases/mine-nvfp4/tuning/device", "xpu", "config: releases.mine-nvfp4.tuning.device: 'xpu': engine fused"),
        (
            "releases/mine-nvfp4/tuning",
            {"engine": "auto_round", "judge": "samples"},
            "config: releases.mine-nvfp4.tuning.judge: 'samples': engine auto_round",
        ),
        ("releases/mine-nvfp4/tuning/engine", "gptq", "config: releases.mine-nvfp4.tuning.engine: 'gptq'; expected:"),
        ("releases/mine-nvfp4/tuning/inputs", "fp", "config: releases.mine-nvfp4.tuning.inputs: 'fp'; expected:"),
        ("releases/mine-nvfp4/tuning/device", "tpu", "config: releases.mine-nvfp4.tuning.device: 'tpu'"),
        (
            "releases/mine-nvfp4/tuning/itres",
            3,
            "config: releases.mine-nvfp4.tuning.itres: unknown key (value 3); expected: one of",
        ),
        (
            "releases/mine-nvfp4/verify/cosine",
            1.2,
            "config: releases.mine-nvfp4.verify.cosine: 1.2; expected: less than",
        ),
        (
            "releases/mine-nvfp4/deploy/target",
            "x",
            "config: releases.mine-nvfp4.deploy.target: 'x' is not in `targets`",
        ),
        ("releases/mine-nvfp4/benchmark", "x", "config: releases.mine-nvfp4.benchmark: 'x' is not in `benchmarks`"),
        ("calibrations/c/seqlen", 1, "config: calibrations.c.seqlen: 1; expected: greater than or equal to 2"),
        ("calibrations/c/nsamples", 0, "config: calibrations.c.nsamples: 0; expected: greater than or equal to 1"),
        ("calibrations/c/pack", "glue", "config: calibrations.c.pack: 'glue'; expected: 'concat' or 'pad'"),
        ("calibrations/c/sources", [], "config: calibrations.c.sources: []"),
        ("calibrations/c/sources", [{"path": "a.txt"}, {"path": "b/a.txt"}], "two sources are called 'a'"),
        (
            "calibrations/c/sources",
            [{"path": "a.txt", "share": 0}],
            "config: calibrations.c.sources.0.share: 0; expected:",
        ),
        ("benchmarks/b/tasks", [], "config: benchmarks.b.tasks: []"),
        ("targets/t/engine", "tgi", "config: targets.t.engine: 'tgi'; expected: 'transformers', 'vllm' or 'sglang'"),
    ],
)
def test_each_mistake_is_one_line(path, value, expected):
    with pytest.raises(RequantError) as error:
        parse(changed(path, value))
    lines = str(error.value).split("\n")
    assert any(expected in line for line in lines), lines
    assert all(line.startswith("config: ") for line in lines)


def test_several_mistakes_are_all_named():
    data = changed("releases/mine-nvfp4/tuning/iters", -1)
    data["releases"]["mine-nvfp4"]["scheme"] = "FP3"
    with pytest.raises(RequantError) as error:
        parse(data)
    assert len(str(error.value).split("\n")) == 2


def test_no_config_at_all_names_what_is_missing():
    with pytest.raises(RequantError) as error:
        parse({})
    assert "config: models: missing" in str(error.value)
    assert "config: build: missing" in str(error.value)


def test_the_reference_page_is_the_schemas():
    from pathlib import Path

    from requant.config_reference import reference

    page = Path(__file__).resolve().parents[2] / "docs/config.md"
    assert page.read_text() == reference(), "run: python -m requant.config_reference > docs/config.md"


def test_every_key_says_what_it_means():
    from requant.config_reference import reference

    empty = [row for row in reference().splitlines() if row.startswith("| `") and row.endswith("|  |")]
    assert not empty


# Pruned models


def pruning(**keys) -> dict:
    data = changed("models/small", {"from": "mine", "prune": {"ratio": 0.25}} | keys)
    return data | {"releases": {"r": {"model": "small", "scheme": "NVFP4"}}, "build": ["r"]}


def test_a_pruned_model_takes_over_what_it_does_not_say():
    data = pruning()
    data["models"]["mine"] |= {"base_model": "org/name", "license": "mit"}
    model = parse(data).models["small"]
    assert (model.source_model, model.base_model, model.license) == ("mine", "org/name", "mit")
    assert (model.prune.method, model.prune.calibration, model.prune.observe) == ("reap", "default", "oneshot")
    data["models"]["small"]["license"] = "other"
    assert parse(data).models["small"].license == "other"


def test_methods_to_compare_with_are_models_of_their_own():
    data = pruning(prune={"experts": 12, "seed": 7, "compare": ["frequency", "random"]})
    models = parse(data).models
    assert list(models) == ["mine", "small", "small.frequency", "small.random"]
    other = models["small.random"].prune
    assert (other.method, other.experts, other.seed, other.compare) == ("random", 12, 7, [])
    data["releases"]["r"]["model"] = "small.frequency"
    assert parse(data).releases["r"].model == "small.frequency"


def test_multi_token_prediction_of_a_pruned_model_is_dropped():
    data = pruning()
    assert parse(data)
    for mtp in ("drop", "keep"):
        data["releases"]["r"]["mtp"] = mtp
        if mtp == "keep":
            with pytest.raises(RequantError, match=r"^config: releases.r.mtp: 'keep'; expected 'drop' for the pruned"):
                parse(data)
        else:
            assert parse(data).releases["r"].mtp == "drop"


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"prune": {}}, "models.small.prune.ratio, experts: neither found; expected one: `ratio: 0.25`"),
        ({"prune": {"ratio": 0.5, "experts": 3}}, "models.small.prune.ratio, experts: both found"),
        ({"prune": {"ratio": 1}}, "models.small.prune.ratio: 1; expected: less than 1"),
        ({"prune": {"ratio": 0.5, "method": "norm"}}, "models.small.prune.method: 'norm'; expected: 'reap', 'freq"),
        ({"prune": {"ratio": 0.5, "rate": 1}}, "models.small.prune.rate: unknown key (value 1); expected: one of cal"),
        ({"prune": {"ratio": 0.5, "compare": ["reap"]}}, "models.small.prune.compare: 'reap'; expected methods other"),
        ({"prune": {"ratio": 0.5, "calibration": "x"}}, "models.small.prune.calibration: 'x' is not in `calibrations`"),
        ({"prune": None}, "models.small.from: found alone; expected `from` and `prune`"),
        ({"from": None, "path": "x"}, "models.small.prune: found alone; expected `from` and `prune`"),
        ({"path": "x"}, "models.small.path, hub, bucket, from: path, from found; expected one"),
        ({"revision": "main"}, "models.small.revision: 'main'; expected with `hub` only, not with `from`"),
        ({"from": "other"}, "models.small.from: 'other' is not in `models`; there, with `path` or `hub`: mine"),
        ({"from": "small"}, "models.small.from: 'small' is itself pruned; there, with `path` or `hub`: mine"),
        (
            {"form": "mine"},
            "models.small.form: unknown key (value 'mine'); expected: one of base_model, bucket, directory, from",
        ),
    ],
)
def test_each_mistake_in_pruning_is_one_line(keys, expected):
    with pytest.raises(RequantError) as error:
        parse(pruning(**keys))
    assert any(line.startswith(f"config: {expected}") for line in str(error.value).split("\n")), str(error.value)


def test_names_that_pruning_takes_are_refused():
    data = pruning(prune={"ratio": 0.5, "compare": ["random"]})
    data["models"]["small.random"] = {"path": "x"}
    with pytest.raises(RequantError, match=r"^config: models.small.random: found; models.small.prune.compare makes a"):
        parse(data)
    data = pruning()
    data["models"]["reference"] = data["models"]["small"]
    with pytest.raises(RequantError, match=r"^config: models.reference: results/reference/ is the graph's own"):
        parse(data)


def test_the_device_of_the_config_is_that_of_tuning_unless_a_release_says_otherwise():
    config = parse(FIVE_LINES)
    assert (config.device, config.releases["mine-nvfp4"].tuning.device) == ("cpu", "cpu")
    config = parse(FIVE_LINES | {"device": "cuda"})
    assert (config.device, config.releases["mine-nvfp4"].tuning.device) == ("cuda", "cuda")
    config = parse(changed("releases/mine-nvfp4/tuning", {"device": "cpu", "iters": 3}) | {"device": "cuda:1"})
    assert config.device == "cuda:1"
    assert (config.releases["mine-nvfp4"].tuning.device, config.releases["mine-nvfp4"].tuning.iters) == ("cpu", 3)


def test_models_run_on_known_devices_only():
    with pytest.raises(RequantError, match=r"config: device: 'tpu'"):
        parse(FIVE_LINES | {"device": "tpu"})


def served(**entries) -> dict:
    return FIVE_LINES | {"benchmarks": {"default": {"served": entries}}}


def test_benchmarks_of_the_served_model_have_the_conventions_for_defaults():
    entries = parse(served(mmlu={}, mine={"task": "arc_easy", "source": None})).benchmarks["default"].served
    assert (entries["mmlu"].source, entries["mmlu"].limit, entries["mmlu"].repeats) == ("measured", None, 1)
    assert entries["mine"].source is None
    cited = parse(served(gsm8k={"source": {"value": 0.9, "citation": "a report"}})).benchmarks["default"].served
    assert cited["gsm8k"].source.citation == "a report"


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"mmlu": {"expected": [73, 79]}}, ".mmlu.expected: [73.0, 79.0]; expected parts of 1: [0.73, 0.79]"),
        ({"mmlu": {"expected": [0.8, 0.7]}}, ".mmlu.expected: [0.8, 0.7]; expected the lower score first"),
        ({"mmlu": {"task": "mmlu_pro"}}, ".mmlu.task: 'mmlu_pro'; expected none: mmlu has its own"),
        ({"mine": {}}, ".mine.task: missing; expected an lm-eval task, or one of mmlu, gsm8k, math, humaneval, ifeval"),
        ({"mine": {"task": "x", "data": "here"}}, ".mine.data: 'here'; expected none: the task's file names its data"),
        ({"mmlu": {"shots": 5}}, ".mmlu.shots: unknown key (value 5); expected: one of chat, data, expected"),
        ({"mmlu": {"source": "guessed"}}, ".mmlu.source.measured: 'guessed'; expected: 'measured'"),
        ({"mmlu": {"source": {"value": 0.9}}}, ".mmlu.source.cited.citation: missing; expected: where it is published"),
        ({"humaneval": {"chat": True}}, ".humaneval.chat: True; expected false: the model goes on with a program"),
        ({"a.b": {"task": "x"}}, ".a.b: names have letters, digits, '_' and '-' only"),
    ],
)
def test_each_mistake_in_benchmarks_of_the_served_model_is_one_line(entries, expected):
    with pytest.raises(RequantError) as error:
        parse(served(**entries))
    assert str(error.value).startswith(f"config: benchmarks.default.served{expected}"), str(error.value)
    assert "\n" not in str(error.value)
