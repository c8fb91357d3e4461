"""Quantizing a block: the tuner's result is what is written, and nothing is left to chance."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import tiny
import torch
from safetensors.torch import load_file

from requant import autoround, fused, nvfp4
from requant.chain import embed, run_reference_block
from requant.checkpoint import Checkpoint
from requant.config import Tuning
from requant.encoding import plain_rounding
from requant.errors import RequantError
from requant.hashing import file_entry
from requant.packed import decode_parts
from requant.quantize import BlockJob, block_seed, choose_linears, input_peaks, quantize_block
from requant.records import BlockRecord, read_json
from requant.safetensors_io import save
from requant.schemes import SCHEMES
from requant.streamed import StreamedModel


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A MoE checkpoint and its reference chain over 16 samples of 24 tokens."""
    folder = tmp_path_factory.mktemp("chain")
    source = tiny.write_checkpoint(folder / "moe", "deepseek_v3", num_hidden_layers=2)
    tokens = torch.randint(3, 320, (20, 24), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    sets = {"calibration": tokens[:16].clone(), "heldout": tokens[16:].clone()}
    masks = {f"{part}_mask": torch.ones_like(rows, dtype=torch.uint8) for part, rows in sets.items()}
    save(folder / "tokens.safetensors", sets | masks)
    embed(source, folder / "tokens.safetensors", folder / "embedded.safetensors")
    before = folder / "embedded.safetensors"
    for block in range(2):
        after = folder / f"hidden_{block}.safetensors"
        run_reference_block(
            source,
            folder / "tokens.safetensors",
            before,
            block,
            after,
            folder / f"routing_{block}.json",
            folder / f"saliency_{block}.csv",
            "moe",
            "c",
        )
        before = after
    return SimpleNamespace(folder=folder, source=source)


def job(chain, scheme="NVFP4", block=1, **changes):
    tuning = Tuning(**({"iters": 3, "batch_size": 4} | changes.pop("tuning", {})))
    before = "embedded" if block == 0 else f"hidden_{block - 1}"
    fields = {"keep": [], "release": "r", "tokens": chain.folder / "tokens.safetensors"} | changes
    return BlockJob(
        source=chain.source,
        model="moe",
        block=block,
        scheme=scheme,
        tuning=tuning,
        hidden=chain.folder / f"{before}.safetensors",
        targets=chain.folder / f"hidden_{block}.safetensors",
        **fields,
    )


def run(job, folder):
    return quantize_block(job, folder / "b.safetensors", folder / "b.json", folder / "h.safetensors")


@pytest.mark.parametrize("engine", ["fused", "auto_round"])
@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_iteration_0_is_plain_rounding(chain, scheme, engine, tmp_path):
    """Both engines after one iteration, which no step preceded, and plain rounding write the same bytes."""
    samples = {"tuning": {"iters": 1, "batch_size": 16, "engine": engine}}
    tuned = run(job(chain, scheme, **samples), tmp_path)
    digest = file_entry(tmp_path / "b.safetensors").sha256
    rounded = run(job(chain, scheme, tuning={"iters": 0}), tmp_path)
    assert rounded.engine == "plain rounding" and tuned.engine == engine
    assert tuned.loss_initial == pytest.approx(rounded.loss_initial, rel=0.02)
    assert file_entry(tmp_path / "b.safetensors").sha256 == digest


def test_progress_names_the_block_as_its_files_do(chain, tmp_path, capsys):
    run(job(chain, tuning={"iters": 1}), tmp_path)
    lines = [line for line in capsys.readouterr().err.splitlines() if " r block " in line]
    assert lines and all(" r block 1 (of 2): " in line for line in lines)


@pytest.mark.parametrize("engine", [fused, autoround])
def test_tuned_weights_are_what_the_file_decodes_to(chain, engine, tmp_path, monkeypatch):
    seen = {}
    tune = engine.tune

    def keep(*arguments):
        found = tune(*arguments)
        seen.update(found.weights)
        return found

    monkeypatch.setattr(engine, "tune", keep)
    record = run(job(chain, tuning={"engine": "fused" if engine is fused else "auto_round"}), tmp_path)
    tensors = load_file(tmp_path / "b.safetensors")
    assert len(seen) == len(record.quantized) == 5 + 3 * 9
    for name, quantized in seen.items():
        module = f"model.layers.1.{name}"
        parts = {key.removeprefix(f"{module}."): t for key, t in tensors.items() if key.startswith(f"{module}.")}
        decoded = torch.from_numpy(decode_parts(parts, SCHEMES["NVFP4"]))
        error = (decoded - quantized.weight.float()).abs()
        assert (error <= decoded.abs() * 2**-8).all(), f"{name}: further off than BF16 rounding"


def test_a_block_does_not_depend_on_what_ran_before_it(chain, tmp_path):
    first = run(job(chain), tmp_path)
    digest = file_entry(tmp_path / "b.safetensors").sha256
    torch.rand(1000)
    again = run(job(chain), tmp_path)
    assert file_entry(tmp_path / "b.safetensors").sha256 == digest
    assert again.losses == first.losses
    other = run(job(chain, release="another"), tmp_path)
    assert other.seed != first.seed and other.losses != first.losses


def test_the_record_tells_the_losses_of_the_run(chain, tmp_path):
    record = run(job(chain, tuning={"iters": 8}), tmp_path)
    assert len(record.losses) == record.iterations == 8
    assert record.loss_initial == record.losses[0]
    assert record.loss_best == min(record.losses) == record.losses[record.best_iteration]
    assert record.settings["lr"] == 1 / 8 and record.settings["minmax_lr"] == 1 / 8
    assert record.tokens_per_expert and sum(record.tokens_per_expert) == 16 * 24 * 2


def test_losses_of_all_samples_are_recorded_and_told(chain, tmp_path, capsys):
    """Of plain rounding and of what was kept: comparable, and those of the file's own block."""
    record = run(job(chain, tuning={"iters": 8}), tmp_path)
    assert {0, record.best_iteration} <= record.judged.keys() <= {0, record.best_iteration, 7, *range(8)}
    assert record.compared == (record.judged[0], min(record.judged.values()))
    shipped = load_file(tmp_path / "h.safetensors")["calibration"].float()
    target = load_file(chain.folder / "hidden_1.safetensors")["calibration"].float()
    assert record.compared[1] == pytest.approx(float((shipped - target).square().mean()), rel=0.02)
    rounded = run(job(chain, tuning={"iters": 0}), tmp_path)
    assert rounded.judged == {0: rounded.loss_best} and rounded.loss_best == pytest.approx(record.judged[0], rel=0.02)
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"loss {rounded.loss_best:.3e} -> {rounded.loss_best:.3e} over all samples, of iteration 0" in last
    by_minibatch = run(job(chain, tuning={"iters": 8, "judge": "minibatch"}), tmp_path)
    assert by_minibatch.judged == {} and by_minibatch.compared == (by_minibatch.losses[0], min(by_minibatch.losses))
    assert "of minibatches, of iteration" in capsys.readouterr().err.splitlines()[-1]


def test_a_record_from_before_all_samples_were_judged_still_reads(chain, tmp_path):
    run(job(chain, tuning={"iters": 2}), tmp_path)
    old = json.loads((tmp_path / "b.json").read_text())
    for key in ("judged", "zero_inputs", "xxh3_64"):
        del old[key]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert read_json(tmp_path / "old.json", BlockRecord).compared == (old["loss_initial"], old["loss_best"])


@pytest.mark.parametrize("scheme", ["NVFP4", "W3A16"])
def test_the_next_block_is_fed_what_is_shipped(chain, scheme, tmp_path):
    run(job(chain, scheme, block=0), tmp_path)
    hidden = load_file(tmp_path / "h.safetensors")["calibration"]
    target = load_file(chain.folder / "hidden_0.safetensors")["calibration"]
    error = (hidden.float() - target.float()).square().mean()
    assert 0 < error < target.float().square().mean() * 0.5


def test_padding_takes_no_part(chain, tmp_path):
    tokens = load_file(chain.folder / "tokens.safetensors")
    tokens["calibration_mask"][:, 16:] = 0
    save(tmp_path / "tokens.safetensors", tokens)
    padded = run(job(chain, tokens=tmp_path / "tokens.safetensors"), tmp_path)
    assert padded.tokens == 16 * 16
    assert sum(padded.tokens_per_expert) == 16 * 16 * 2
    hidden = load_file(tmp_path / "h.safetensors")["calibration"]
    assert not hidden[:, 16:].any() and hidden[:, :16].any()
    rounded = run(job(chain, tokens=tmp_path / "tokens.safetensors", tuning={"iters": 0}), tmp_path)
    assert padded.loss_initial == pytest.approx(rounded.loss_initial, rel=0.5), "loss a token that counts"


def test_fused_projections_share_one_global_scale(chain, tmp_path):
    record = run(job(chain), tmp_path)
    tensors = load_file(tmp_path / "b.safetensors")
    names = [
        [weight.removesuffix("weight") + "weight_global_scale" for weight in g] for g in record.shared_global_scale
    ]
    assert len(names) == 1 + 9, "MLA's two first projections, and gate and up of 8 experts and the shared one"
    for group in names:
        assert len({float(tensors[name]) for name in group}) == 1
    source = Checkpoint(chain.source)
    for group in record.shared_global_scale:
        peaks = [float(weight.abs().amax()) for weight in source.read(group).values()]
        scale = float(tensors[group[0].removesuffix("weight") + "weight_global_scale"])
        assert scale == pytest.approx(2688 / max(peaks), rel=1e-6)


def test_experts_that_no_token_reached_are_named_and_get_their_peers_range(chain, tmp_path):
    """Tokens all alike reach few experts; the others are rounded with the largest input of those."""
    tokens = load_file(chain.folder / "tokens.safetensors")
    tokens = {name: torch.full_like(rows, 7) if "mask" not in name else rows for name, rows in tokens.items()}
    save(tmp_path / "tokens.safetensors", tokens)
    embed(chain.source, tmp_path / "tokens.safetensors", tmp_path / "embedded.safetensors")
    source = tmp_path / "embedded.safetensors"
    for block in range(2):
        run_reference_block(
            chain.source,
            tmp_path / "tokens.safetensors",
            source,
            block,
            tmp_path / f"hidden_{block}.safetensors",
            tmp_path / "routing.json",
            tmp_path / "saliency.csv",
            "moe",
            "c",
        )
        source = tmp_path / f"hidden_{block}.safetensors"
    changed = dataclasses.replace(
        job(chain),
        tokens=tmp_path / "tokens.safetensors",
        hidden=tmp_path / "hidden_0.safetensors",
        targets=tmp_path / "hidden_1.safetensors",
    )
    record = run(changed, tmp_path)
    assert record.never_reached == [e for e, hits in enumerate(record.tokens_per_expert) if hits == 0] != []
    tensors = load_file(tmp_path / "b.safetensors")
    scales = {e: float(tensors[f"model.layers.1.mlp.experts.{e}.down_proj.input_global_scale"]) for e in range(8)}
    reached = [scales[e] for e in range(8) if e not in record.never_reached]
    assert all(scales[e] == min(reached) for e in record.never_reached)


def test_no_peer_at_all_is_an_error():
    with pytest.raises(RequantError, match="no calibration token reached it or any of its peers"):
        input_peaks(["model.layers.0.mlp.experts.0.up_proj"], "model.layers.0.", {})
    with pytest.raises(RequantError, match=r"self_attn\.o_proj: no calibration token reached it"):
        input_peaks(["self_attn.o_proj", "mlp.experts.0.o_proj"], "", {"mlp.experts.0.o_proj": torch.ones(1)})


def test_peaks_of_inputs():
    """Zeros count as not reached; peers are other experts' Linears of that name, whoever was reached."""
    downs = [f"mlp.experts.{number}.down_proj" for number in range(4)]
    others = ["mlp.experts.1.up_proj", "mlp.shared_experts.down_proj", "self_attn.o_proj"]
    seen = {downs[1]: 0.0, downs[2]: 3.0, downs[3]: 1e-42, others[0]: 9.0, others[1]: 0.0, others[2]: 5.0}
    found = input_peaks(downs + others, "", {name: torch.tensor([peak]) for name, peak in seen.items()})
    assert [float(found[name]) for name in downs[:3]] == [3.0, 3.0, 3.0]
    assert float(found[downs[3]]) == pytest.approx(nvfp4.SMALLEST_PEAK)
    assert [float(found[name]) for name in others] == [9.0, 2688.0, 5.0]
    assert float(nvfp4.global_scale(found[others[1]])) == 1.0
    for peak in (math.inf, math.nan):
        with pytest.raises(RequantError, match=rf"^x: its largest input is {peak}; expected a finite number"):
            input_peaks(["x"], "", {"x": torch.tensor([peak])})


def test_kept_linears_stay_as_they_are_and_say_why(chain, tmp_path):
    record = run(job(chain, keep=[r"kv_b_proj$", r"shared_experts"]), tmp_path)
    assert record.kept["model.layers.1.self_attn.kv_b_proj"] == "config: keep kv_b_proj$"
    assert len(record.kept) == 4
    tensors = load_file(tmp_path / "b.safetensors")
    name = "model.layers.1.self_attn.kv_b_proj.weight"
    assert torch.equal(tensors[name], Checkpoint(chain.source).read([name])[name])
    assert "model.layers.1.mlp.gate.weight" in tensors, "the router is never quantized"


def test_a_width_that_does_not_fit_the_group_is_kept_with_the_reason(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "llama", "llama", intermediate_size=320)
    model = StreamedModel(Checkpoint(source))
    chosen, kept = choose_linears(model.block(0), "model.layers.0.", SCHEMES["W3A16"], [])
    assert kept == {"model.layers.0.mlp.down_proj": "width 320 is no multiple of the group of 128"}
    assert "model.layers.0.mlp.down_proj" not in chosen
    assert not choose_linears(model.block(0), "model.layers.0.", SCHEMES["NVFP4"], [])[1]


def test_biases_are_kept_beside_packed_weights(tmp_path):
    source = tiny.write_checkpoint(tmp_path / "llama", "llama", attention_bias=True, num_hidden_layers=1)
    tokens = torch.randint(3, 320, (8, 16), dtype=torch.int32)
    ones = torch.ones(8, 16, dtype=torch.uint8)
    sets = {"calibration": tokens, "heldout": tokens.clone(), "calibration_mask": ones, "heldout_mask": ones.clone()}
    save(tmp_path / "tokens.safetensors", sets)
    folder = SimpleNamespace(folder=tmp_path, source=source)
    embed(source, tmp_path / "tokens.safetensors", tmp_path / "embedded.safetensors")
    hidden, routing = tmp_path / "hidden_0.safetensors", tmp_path / "routing.json"
    run_reference_block(
        source,
        tmp_path / "tokens.safetensors",
        tmp_path / "embedded.safetensors",
        0,
        hidden,
        routing,
        tmp_path / "saliency.csv",
        "m",
        "c",
    )
    run(job(folder, block=0), tmp_path)
    name = "model.layers.0.self_attn.q_proj.bias"
    assert torch.equal(load_file(tmp_path / "b.safetensors")[name], Checkpoint(source).read([name])[name])


@pytest.mark.parametrize("engine", ["fused", "auto_round"])
def test_an_indexer_is_rounded_and_the_record_says_so(engine, tmp_path):
    """What chooses keys gives the output no gradient: its wq_b is rounded to nearest, wk and weights_proj are kept."""
    source = tiny.write_checkpoint(tmp_path / "v32", "deepseek_v32", num_hidden_layers=1, first_k_dense_replace=1)
    tokens = torch.randint(3, 320, (8, 16), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    ones = torch.ones(8, 16, dtype=torch.uint8)
    sets = {"calibration": tokens, "heldout": tokens.clone(), "calibration_mask": ones, "heldout_mask": ones.clone()}
    save(tmp_path / "tokens.safetensors", sets)
    embed(source, tmp_path / "tokens.safetensors", tmp_path / "embedded.safetensors")
    before, after = tmp_path / "embedded.safetensors", tmp_path / "hidden_0.safetensors"
    run_reference_block(
        source,
        tmp_path / "tokens.safetensors",
        before,
        0,
        after,
        tmp_path / "routing.json",
        tmp_path / "saliency.csv",
        "m",
        "c",
    )
    folder = SimpleNamespace(folder=tmp_path, source=source)
    found = {}
    for iters in (3, 0):
        record = run(job(folder, block=0, tuning={"iters": iters, "engine": engine, "best_mse": False}), tmp_path)
        found[iters] = load_file(tmp_path / "b.safetensors")
        assert record.never_tuned == ["model.layers.0.self_attn.indexer.wq_b.weight"]
        kept = {name.rpartition(".")[2] for name in record.kept}
        assert kept == {"wk", "weights_proj"}
    codes = {name for name in found[3] if name.endswith("weight_packed")}
    same = {name for name in codes if torch.equal(found[3][name], found[0][name])}
    assert same == {"model.layers.0.self_attn.indexer.wq_b.weight_packed"}


def test_seeds_differ_by_release_and_block():
    seeds = {block_seed(42, release, block) for release in ("a", "b") for block in range(50)}
    assert len(seeds) == 100
    assert block_seed(42, "a", 0) == block_seed(42, "a", 0) != block_seed(43, "a", 0)


def test_plain_rounding_needs_no_search():
    weight = torch.randn(8, 128).to(torch.bfloat16)
    scheme = SCHEMES["W4A16"]
    rounded = plain_rounding(weight, None, scheme)
    step = rounded.scales.float().abs().repeat_interleave(128, -1)
    assert ((rounded.weight.float() - weight.float()).abs() <= step * 1.01).all()
