"""Plans: real models against published figures, whole layouts to the byte, presets from a bare config.json."""

import gzip
import json
from pathlib import Path

import pytest
import tiny
import yaml

from requant.config import parse
from requant.engine_keeps import KEEPS
from requant.errors import RequantError
from requant.locks import elements, make_lock, tensors_of
from requant.naming import released_name
from requant.plan import Subject, plan, plan_build, source_of
from requant.records import BlockRecord, PlanRecord, TensorEntry, read_json, write_json
from requant.schemes import SCHEMES
from requant.sizes import Shaped
from requant.structure import drafting_if_stored, from_config, from_tensors
from requant.target_files import FOLDER, with_targets
from requant.tuned import settings

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "data"
RATES = ROOT / "benchmarks" / "results" / "rates.json"
V32 = "deepseek-ai--DeepSeek-V3.2"


def real_config(name: str, **changes) -> dict:
    """The config.json of a real model."""
    path = SHARED / "model-configs" / name / "config.json"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return json.loads(path.read_text()) | changes


def layout(name: str) -> dict:
    """Each shard of a real checkpoint."""
    path = SHARED / name / "shards.jsonl.gz"
    if not path.exists():
        pytest.skip(f"needs {path}")
    return [json.loads(line) for line in gzip.open(path, "rt")]


def config_of(**changes) -> dict:
    data = yaml.safe_load((ROOT / "config.yaml").read_text())
    return data | changes


def subject(data: dict, release: str, directory: Path, lock: Path | None = None) -> Subject:
    config = parse(with_targets(data, ROOT / FOLDER))
    found = config.releases[release]
    calibration, target = config.calibrations[found.calibration], config.targets[found.deploy.target]
    model = config.models[found.model]
    pruning = {}
    if model.prune:
        observed = config.calibrations[model.prune.calibration]
        pruning = {"pruned_from": model.source_model, "prune": model.prune, "observed": observed}
    source = (str(directory), lock and str(lock))
    kept = {"keep_hidden_states": config.keep_hidden_states}
    return Subject(release, found, calibration, target, *source, device=config.device, **kept, **pruning)


@pytest.fixture(scope="module")
def tiny_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in tiny.FAMILIES:
        tiny.write_checkpoint(folder / family, family)
    return folder


# Real models


@pytest.mark.parametrize(
    "name,total,active",
    [
        ("deepseek-ai--DeepSeek-V3", 671.0, 37.55),
        ("Qwen--Qwen3-235B-A22B", 235.1, 22.19),
        ("Qwen--Qwen3-30B-A3B", 30.53, 3.35),
        ("moonshotai--Kimi-K2-Instruct", 1026.4, 32.9),
        ("mistralai--Mixtral-8x7B-v0.1", 46.7, 12.9),
    ],
)
def test_parameters_are_the_published_ones(name, total, active):
    """671 and 37, 235 and 22, 30.5 and 3.3, 1000 and 32, 46.7 and 12.9 billion."""
    structure = from_config(real_config(name))
    assert structure.parameters / 1e9 == pytest.approx(total, rel=5e-4)
    assert structure.activated / 1e9 == pytest.approx(active, rel=5e-3)


@pytest.mark.parametrize("experts,scheme,size", [(192, "NVFP4", 288), (128, "W3A16", 138)])
def test_the_public_releases_have_their_published_size(experts, scheme, size):
    structure = from_config(real_config(V32, n_routed_experts=experts))
    release = structure.release_size(SCHEMES[scheme], [])
    assert int(release.files / 1e9 + (0.5 if size == 138 else 0)) == size
    assert {192: 508.4, 128: 344.9}[experts] == round(structure.parameters / 1e9, 1)
    assert 0 < release.files - release.tensors < 30e6, "headers"


def test_a_real_fp8_checkpoint_is_counted_to_the_byte_from_its_tensors_and_from_config_alone():
    shards = layout("deepseek-v3-layout")
    config = real_config("deepseek-ai--DeepSeek-V3")
    tensors = {
        name: TensorEntry(dtype=dtype, shape=shape, shard=shard["file"], offset=0)
        for shard in shards
        for name, dtype, shape in shard["tensors"]
    }
    assert sum(elements(entry) for entry in tensors.values()) == 684_531_386_000
    stored = sum(shard["bytes"] for shard in shards)
    known, guessed = from_tensors(config, tensors, stored, "lock"), from_config(config)
    scales = sum(elements(entry) for name, entry in tensors.items() if name.endswith("_scale_inv"))
    assert known.parameters == 684_531_386_000 - scales
    assert known.stored == 688_586_727_753
    assert known.drafting == known.parameters - guessed.parameters == drafting_if_stored(guessed)
    assert known.activated == guessed.activated
    without = {name: entry for name, entry in tensors.items() if not name.startswith("model.layers.61.")}
    assert guessed.stored == sum(Shaped(entry.dtype, tuple(entry.shape)).bytes for entry in without.values())
    release, smaller = (model.release_size(SCHEMES["NVFP4"], []) for model in (known, guessed))
    assert release.blocks == smaller.blocks
    assert release.tensors - smaller.tensors == 2 * known.drafting + 2 * 256, "BF16, but for 256 biases in float32"


def test_a_real_layout_has_the_names_and_bytes_that_its_config_gives():
    names = {name for shard in layout("qwen3-30b-a3b-index") for name in shard_names(shard)}
    structure = from_config(real_config("Qwen--Qwen3-30B-A3B"))
    predicted = {name for kind in structure.kinds for block in kind.blocks for name in kind.named(block)}
    assert predicted | structure.outside.keys() == names
    assert structure.stored == 61_064_245_248


def test_the_names_of_a_mixtral_are_found_in_its_files():
    folder = SHARED / "mixtral-8x22b-index"
    if not folder.exists():
        pytest.skip(f"needs {folder}")
    config = json.loads((folder / "config.json").read_text())
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    structure = from_config(config)
    inside = {name for kind in structure.kinds for block in kind.blocks for name in kind.named(block)}
    predicted = {released_name(name, config) for name in inside | structure.outside.keys()}
    assert predicted == index["weight_map"].keys()
    assert structure.stored == index["metadata"]["total_size"]


def shard_names(shard: dict) -> list[str]:
    return [tensor if isinstance(tensor, str) else tensor[0] for tensor in shard["tensors"]]


# Presets


def preset(path: Path) -> dict:
    """config.yaml extended by a preset, as Snakemake merges them."""
    data, found = config_of(), yaml.safe_load(path.read_text())
    for section, entries in found.items():
        data[section] = {**data[section], **entries} if isinstance(data.get(section), dict) else entries
    return data


PRESETS = sorted((ROOT / "config").glob("*.yaml"))


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_presets_pass_the_schema(path):
    config = parse(with_targets(preset(path), ROOT / FOLDER))
    assert all(release not in ("demo-nvfp4", "demo-w3a16") for release in config.build)
    for name in config.build:
        assert config.calibrations[config.releases[name].calibration].nsamples == 512
    assert f"--configfile config/{path.name}" in path.read_text()


KEPT = {"508b-nvfp4": [KEEPS[0].pattern], "345b-w3a16": []}  # for sglang; for vLLM, which gets decoded weights


@pytest.mark.parametrize("stem,experts,size", [("508b-nvfp4", 192, 295.0), ("345b-w3a16", 128, 137.8)])
def test_presets_plan_offline_from_a_bare_config(tmp_path, stem, experts, size):
    data = preset(ROOT / "config" / f"deepseek-v3.2-{stem}.yaml")
    (name,) = data["build"]
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(real_config(V32)))
    records, table = plan_build([subject(data, name, folder)], RATES, tmp_path / "results")
    record = read_json(tmp_path / "results" / name / "plan.json", PlanRecord)
    assert record == records[0] and record.basis == "config"
    assert record.schemes[record.scheme].file_bytes / 1e9 == pytest.approx(size, abs=0.2)
    by_hand = from_config(real_config(V32, n_routed_experts=experts)).release_size(SCHEMES[record.scheme], KEPT[stem])
    assert record.schemes[record.scheme].file_bytes == by_hand.files
    assert record.target.problem is None and record.target.fits
    assert 60e9 < record.gpu_bytes < 80e9 if experts == 192 else 45e9 < record.gpu_bytes < 60e9
    assert record.disk.reference == pytest.approx(2 * 62 * (512 + 64) * 2048 * 7168 * 2, rel=1e-6), "two chains"
    stages = {stage.stage: stage for stage in record.stages}
    assert stages["quantize"].jobs == stages["reference"].jobs == stages["observe"].jobs == 61
    assert stages["observe"].seconds == pytest.approx(stages["reference"].seconds), "as many experts a token"
    assert (record.pruned_from, record.experts_before, record.routed_experts) == ("deepseek-v3.2", 256, experts)
    assert record.source_bytes == from_config(real_config(V32)).stored and "from deepseek-v3.2" in table
    assert record.jobs["load_test"] == stages["load_test"].jobs == 1
    if stem == "508b-nvfp4":
        assert record.disk.load_test == by_hand.rest, "embeddings, norm and head; the blocks are links"
        assert record.disk.served == 0
    else:
        cut = from_config(real_config(V32, n_routed_experts=experts)).first(4)
        assert record.disk.served == 2 * record.parameters, "in BF16"
        assert record.disk.load_test == by_hand.rest + 2 * cut.parameters, "and the cut in BF16"
    assert record.disk.peak == sum(getattr(record.disk, part) for part in DISK) + max(
        record.disk.load_test, record.disk.served
    )
    assert "H100" in next(stage.basis for stage in record.stages if stage.stage == "quantize")
    found = {(timeline.devices, timeline.inputs): timeline for timeline in record.timelines}
    assert sorted(found) == [(count, inputs) for count in (1, 8, 64) for inputs in ("quantized", "reference")]
    blocks = sum(stages[stage].seconds for stage in ("observe", "reference", "quantize"))
    assert blocks < found[1, "reference"].seconds < blocks + 3600, "and the start of each process"
    assert found[1, "quantized"].seconds == found[1, "reference"].seconds
    assert found[8, "reference"].states_bytes < found[8, "quantized"].states_bytes < record.disk.reference
    assert "to quantize, 64 devices, reference" in table
    assert "config alone" not in table and "config.json alone" in table and "chosen" in table
    assert record.download_bytes == record.source_bytes > 0 and not record.source_files_known


DISK = ("source", "tokens", "reference", "chain", "shards")


def test_states_that_go_when_they_were_read_are_planned_by_those_at_a_time(tmp_path):
    found = {}
    for kept in (True, False):
        data = config_of(keep_hidden_states=kept)
        data["releases"] = dict(
            data["releases"], apart=data["releases"]["demo-nvfp4"] | {"tuning": {"inputs": "reference"}}
        )
        for name in ("demo-nvfp4", "apart"):
            records, _ = plan_build([subject(data, name, ROOT / "demo/model")], RATES, tmp_path / "results")
            found[name, kept] = (records[0].disk, records[0].jobs)
    a_file = found["demo-nvfp4", False][0].chain
    assert a_file > 2 * 128 * 128 * 128 and found["demo-nvfp4", True][0].chain == 6 * a_file
    assert found["apart", True][0].chain == found["apart", False][0].chain == 0
    fewer = found["apart", True][0].reference - found["apart", False][0].reference
    assert fewer == 5 * a_file, "two of seven; those of held-out tokens stay"
    assert found["apart", True][1]["quantize_apart"] == 6 and "quantize" not in found["apart", True][1]


def test_the_load_test_is_planned_where_there_is_one(tiny_models):
    """With a copy in BF16 of what is served; none where it would be all blocks, or is switched off."""
    source = source_of(str(tiny_models / "deepseek_v3"), None)

    def planned(**deploy) -> PlanRecord:
        release = {"model": "demo-moe", "scheme": "NVFP4", "calibration": "demo", "deploy": deploy}
        found = subject(config_of(releases={"r": release}, build=["r"]), "r", tiny_models / "deepseek_v3")
        return plan(found, source, RATES, Path("no"))

    dense, moe = source.structure.kinds
    outside = sum(tensor.elements for tensor in source.structure.outside.values())
    with_two, with_one = planned(), planned(load_test_blocks=1)
    assert with_two.disk.load_test - with_one.disk.load_test == 2 * moe.elements
    rest = source.structure.release_size(SCHEMES["NVFP4"], []).rest
    assert with_one.disk.load_test == rest + 2 * (dense.elements + outside)
    assert (
        with_two.disk.served > with_two.disk.load_test and with_two.disk.peak == planned(load_test_blocks=0).disk.peak
    )
    for blocks in (0, 3):
        without = planned(load_test_blocks=blocks)
        assert without.disk.load_test == 0 and "load_test" not in without.jobs
        assert "load_test" not in {stage.stage for stage in without.stages}
    assert with_two.jobs["load_test"] == 1


BARE = tiny.FAMILIES["deepseek_v3"] | {"model_type": "deepseek_v3"}
FAMILY_OF = {"kimi-k2": "deepseek_v3", "glm-4-moe": "glm4_moe", "mixtral": "mixtral", "qwen3-moe": "qwen3_moe"}


@pytest.mark.parametrize("stem", [path.stem for path in PRESETS if not path.stem.startswith("deepseek")])
def test_templates_plan_from_a_bare_config_of_their_family(tmp_path, stem):
    data = preset(ROOT / "config" / f"{stem}.yaml")
    (name,) = data["build"]
    config = {"model_type": FAMILY_OF.get(stem, "qwen3"), "max_position_embeddings": 32768}
    (tmp_path / "config.json").write_text(json.dumps(tiny.FAMILIES[config["model_type"]] | config))
    records, table = plan_build([subject(data, name, tmp_path)], RATES, tmp_path / "results")
    assert records[0].target.problem is None and records[0].target.fits and records[0].gpu_bytes > 0
    assert records[0].schemes[records[0].scheme].quantized_parameters > 0 and name in table


# Tiny models


@pytest.mark.parametrize("family", list(tiny.FAMILIES))
def test_lock_headers_and_bare_config_give_the_same_release(tiny_models, tmp_path, family):
    folder, bare = tiny_models / family, tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((folder / "config.json").read_bytes())
    write_json(tmp_path / "m.json", make_lock("m", folder))
    found = [source_of(str(folder), str(tmp_path / "m.json")), source_of(str(folder), None), source_of(str(bare), None)]
    assert [source.structure.basis for source in found] == ["lock", "headers", "config"]
    assert [source.missing for source in found[:2]] == [0, 0] and found[2].missing == found[2].structure.stored
    assert found[0].files == found[1].files and found[2].files is None
    for scheme in SCHEMES.values():
        sizes = [source.structure.release_size(scheme, [r"\.0\..*o_proj$"]) for source in found]
        assert sizes[0] == sizes[1] == sizes[2]
        assert any("keep" in reason for reason in sizes[0].kept.values()) == scheme.quantizes
    assert len({source.structure.parameters for source in found}) == 1
    counted = sum(elements(entry) for entry in tensors_of(str(folder)).values())
    assert found[2].structure.parameters == counted


def test_a_lock_tells_what_is_still_to_be_downloaded(tiny_models, tmp_path):
    write_json(tmp_path / "m.json", make_lock("m", tiny_models / "qwen3"))
    source = source_of(str(tmp_path / "nowhere"), str(tmp_path / "m.json"))
    assert source.missing == sum(path.stat().st_size for path in (tiny_models / "qwen3").iterdir())


def test_a_checkpoint_that_does_not_fit_its_config_is_named(tiny_models, tmp_path):
    folder = tmp_path / "other"
    folder.mkdir()
    for path in (tiny_models / "qwen3").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 512}))
    with pytest.raises(RequantError, match=r"layers\.0\.mlp\.down_proj\.weight: \[128, 256\] found; config.json gives"):
        source_of(str(folder), None)
    shard = sorted(folder.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(RequantError, match=f"{shard.name}: not there"):
        source_of(str(folder), None)


def test_neither_lock_nor_config_is_one_line(tmp_path):
    with pytest.raises(RequantError, match="config.json: not there"):
        source_of(str(tmp_path), None)


def test_a_release_that_quantizes_nothing_is_refused(tiny_models):
    data = config_of(releases={"r": {"model": "demo-moe", "scheme": "NVFP4", "keep": ["."]}}, build=["r"])
    with pytest.raises(RequantError, match=r"releases\.r: no Linear of 'demo-moe' would be quantized \(config: keep"):
        plan(subject(data, "r", tiny_models / "qwen3"), source_of(str(tiny_models / "qwen3"), None), RATES, Path("no"))


def test_seconds_come_from_jobs_of_the_same_kind_where_there_are_any(tiny_models, tmp_path):
    data = config_of(releases={"r": {"model": "demo-moe", "scheme": "W3A16", "calibration": "demo"}}, build=["r"])
    found = subject(data, "r", tiny_models / "deepseek_v3")
    source = source_of(found.source, None)
    results = tmp_path / "results"

    def quantize():
        record = plan(found, source, RATES, results)
        return next(stage for stage in record.stages if stage.stage == "quantize")

    modelled = quantize()
    assert modelled.basis.startswith("model: tuning on Intel") and modelled.seconds > 0
    dense, moe = source.structure.kinds
    for block, seconds in ((0, 1000.0), (1, 3000.0), (2, 5000.0)):
        kind = dense if block in dense.blocks else moe
        linears, kept = kind.linears(block, SCHEMES["W3A16"], [])
        shapes = {f"{name}.weight": kind.linear_shapes[name.split(".", 3)[3]] for name in linears}
        write_trace(results / "other" / "blocks" / f"{block}.json", found, block, seconds, shapes)
    measured = quantize()
    assert measured.basis == "measured: 3 such jobs in results/"
    assert measured.seconds == 1000 + 2 * 4000
    (results / "other/blocks/0.json").unlink()
    assert "2 of 3 blocks measured" in quantize().basis and 8000 < quantize().seconds < 9000
    changed = data["releases"]["r"] | {"tuning": {"iters": 100}}
    found = subject(data | {"releases": {"r": changed}}, "r", tiny_models / "deepseek_v3")
    assert quantize().basis.startswith("model: tuning on Intel")
    changed["tuning"] = {"engine": "auto_round"}
    found = subject(data | {"releases": {"r": changed}}, "r", tiny_models / "deepseek_v3")
    assert quantize().seconds is None


def write_trace(path: Path, found: Subject, block: int, seconds: float, shapes: dict) -> None:
    """The record of a tuned block, as far as plans read it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scheme, tuning = SCHEMES[found.settings.scheme], found.settings.tuning
    record = BlockRecord(
        release="other",
        block=block,
        kind="dense" if block == 0 else "moe",
        scheme=scheme.name,
        engine="fused",
        engine_version="0",
        settings=settings(scheme, tuning) | {"seed": tuning.seed},
        seed=1,
        loss_initial=1.0,
        loss_best=0.5,
        best_iteration=1,
        iterations=tuning.iters,
        losses=[1.0, 0.5],
        quantized={name: list(shape) for name, shape in shapes.items()},
        kept={},
        shared_global_scale=[],
        tokens_per_expert=[],
        never_reached=[],
        tokens=found.calibration.nsamples * found.calibration.seqlen,
        seconds=seconds,
        peak_memory_bytes=1,
        threads=tuning.threads,
        device=tuning.device,
        libraries={},
        sha256="0" * 64,
    )
    write_json(path, record)


def test_timelines_count_files_at_the_rates_that_are_asked_for(tiny_models):
    data = config_of(releases={"r": {"model": "demo-moe", "scheme": "W3A16", "calibration": "demo"}}, build=["r"])
    found = subject(data, "r", tiny_models / "deepseek_v3")
    source = source_of(found.source, None)
    files = {"disk": 1e3}
    alone, slow = (plan(found, source, RATES, Path("no"), rates).timelines for rates in ({}, files))
    read = source.structure.stored + 2 * sum(source.structure.source_blocks)
    assert slow[0].seconds - alone[0].seconds > read / 1e3, "checked, walked and tuned"
    assert slow[0].seconds > slow[2].seconds and slow[0].states_bytes == alone[0].states_bytes
    data["releases"]["r"]["scheme"] = "BF16"
    assert plan(subject(data, "r", tiny_models / "deepseek_v3"), source, RATES, Path("no")).timelines == []


# What a build would refuse


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quant_method: 'awq'; expected 'fp8'"),
        ({"hidden_size": "big"}, "config.json: hidden_size: 'big'; expected a number of 1 or more"),
        ({"num_hidden_layers": 0}, "config.json: num_hidden_layers: 0; expected a number of 1 or more"),
        ({"num_experts_per_tok": 9}, "config.json: num_experts_per_tok: 9; expected 8 or less"),
        ({"hidden_act": "wide"}, "config.json: hidden_act: 'wide'; expected one of transformers': "),
    ],
)
def test_a_bare_config_that_no_build_would_take_is_one_line_with_its_directory(tmp_path, changes, line):
    (tmp_path / "config.json").write_text(json.dumps(BARE | changes))
    with pytest.raises(RequantError) as error:
        source_of(str(tmp_path), None)
    assert str(error.value).startswith(str(tmp_path)) and line in str(error.value) and "\n" not in str(error.value)


def test_a_list_for_a_config_json_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(RequantError, match="config.json: a list found; expected a Hugging Face checkpoint"):
        source_of(str(tmp_path), None)


def test_a_plan_says_what_its_target_leaves_open(tiny_models, tmp_path):
    data = preset(ROOT / "config" / "kimi-k2.yaml")
    (tmp_path / "config.json").write_text(json.dumps(BARE | {"max_position_embeddings": 32768}))
    name = "kimi-k2-nvfp4"
    _, table = plan_build([subject(data, name, tmp_path)], RATES, tmp_path / "results")
    assert f"{name}: b200-x8: vllm/vllm-openai:v0.31.0 is a tag, which may come to name another image" in table
    data["targets"]["b200-x8"] |= {"image": f"vllm/vllm-openai@sha256:{'0' * 64}", "memory_gb": 0.1}
    (record,), table = plan_build([subject(data, name, tmp_path)], RATES, tmp_path / "results")
    assert "is a tag" not in table and not record.target.fits
    assert record.target.shortage in table and "85.00 MB are there (0.1 GB x 0.85)" in table
    data["targets"]["b200-x8"] |= {"image": "vllm/vllm-openai:v0.6.5"}
    (record,), _ = plan_build([subject(data, name, tmp_path)], RATES, tmp_path / "results")
    assert record.target.problem == "vllm knows deepseek_v3 from 0.6.6 on, found image vllm/vllm-openai:v0.6.5"
