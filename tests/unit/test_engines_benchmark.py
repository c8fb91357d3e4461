"""benchmarks/engines.py: every family has a case, what logs say of kernels is read, and a row is written once."""

import sys
from importlib.metadata import version
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import engines
import serving

from requant.architecture import FAMILIES
from requant.config import Target
from requant.engine_keeps import KEEPS
from requant.engine_runs import TABLE

LOG = """\
(EngineCore pid=7) INFO 11-30 20:45 [cuda.py:4] Using FLASH_ATTN_MLA attention backend out of potential backends: ['X']
(EngineCore pid=7) INFO 11-30 20:45 [mla.py:4] Using FLASH_ATTN MLA prefill backend.
(EngineCore pid=7) INFO 11-30 20:45 [nvfp4.py:4] Using MarlinNvFp4LinearKernel for NVFP4 GEMM
(EngineCore pid=7) INFO 11-30 20:45 [fp4.py:4] Using 'MARLIN' NvFp4 MoE backend out of potential backends: ['X', 'Y']
(EngineCore pid=7) INFO 11-30 20:45 [wna16.py:4] Using MacheteLinearKernel for CompressedTensorsWNA16
(EngineCore pid=7) INFO 11-30 20:45 [moe.py:4] Using CompressedTensorsWNA16MarlinMoEMethod
(EngineCore pid=7) INFO 11-30 20:45 [sampler.py:4] Using FlashInfer for top-p & top-k sampling.
[2026-12-01 00:12:59] server_args=ServerArgs(model_path='model', attention_backend='triton', sampling_backend='pytorch')
"""

ENDED = "engine.log: the engine ended with status 1 before it served: ValueError: no; expected an answer to /health"


def test_every_family_has_a_case_and_those_of_engine_keeps_have_true_widths():
    assert {case.family for case in engines.CASES.values()} == FAMILIES.keys()
    for family in {family for keep in KEEPS for family in keep.families}:
        sizes = engines.CASES[family].sizes
        widths = ("kv_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")
        assert [sizes[width] for width in widths] == [512, 64, 128, 128]


def test_kernels_are_read_from_logs():
    assert engines.kernels_in(LOG) == [
        "CompressedTensorsWNA16MarlinMoEMethod",
        "FLASH_ATTN MLA prefill backend",
        "FLASH_ATTN_MLA attention backend",
        "MARLIN NvFp4 MoE backend",
        "MacheteLinearKernel for CompressedTensorsWNA16",
        "MarlinNvFp4LinearKernel for NVFP4 GEMM",
        "attention_backend='triton'",
    ]


def test_a_cell_has_one_row_and_is_not_measured_again(tmp_path):
    out = tmp_path / "rows.json"
    target = Target()
    cells = [engines.Cell(case, scheme, target, False) for case in ("llama", "qwen3") for scheme in ("NVFP4", "BF16")]
    assert engines.without_rows(cells, out) == cells
    engines.put(out, cells[0].key | {"served": False})
    engines.put(out, cells[3].key | {"served": True})
    assert engines.without_rows(cells, out) == cells[1:3]
    engines.put(out, cells[0].key | {"served": True})
    rows = engines.rows_in(out)
    assert [(row["case"], row["scheme"], row["served"]) for row in rows] == [
        ("llama", "NVFP4", True),
        ("qwen3", "BF16", True),
    ]
    assert rows[0]["engine_version"] == version("transformers")
    assert not list(tmp_path.glob("*.part"))


def test_the_table_that_planning_reads_is_that_of_the_rows(tmp_path):
    engines.write_table(engines.rows_in(engines.OUT), tmp_path / "table.csv")
    assert (tmp_path / "table.csv").read_text() == TABLE.read_text(), "run: python benchmarks/engines.py --table"


@pytest.mark.parametrize(
    ("row", "outcome", "told"),
    [
        ({"served": False, "error": ENDED, "engine_error": "ValueError: no"}, "refused", "ValueError: no"),
        ({"served": True, "verdict": "passed", "checks": {"greedy": "passed: 1.0"}}, "served", ""),
        ({"served": True, "verdict": "failed", "checks": {"greedy": "failed: 0.1", "a": "passed:"}}, "wrong", "greedy"),
        ({"served": True, "verdict": "failed", "checks": {"log_probabilities": "failed: 9.3 times as far off as"}},
         "wrong", "log_probabilities"),
    ],
)  # fmt: skip
def test_a_row_is_a_line_of_the_table(row, outcome, told):
    cell = {"engine": "vllm", "engine_version": "1", "gpu": None, "devices": 1, "case": "llama", "scheme": "NVFP4"}
    found = engines.run_of(cell | {"all_packed": True, "kernels": ["a", "b"]} | row)
    assert (found.outcome, found.told, found.gpu, found.packed, found.kernels) == (outcome, told, "cpu", "all", "a; b")
    assert found.off == ("9.3" if told == "log_probabilities" else "")


@pytest.mark.parametrize(
    "row",
    [
        {
            "served": False,
            "error": "no answer to /health after 900 s",
            "engine_error": "ValueError",
        },
        {"served": False, "error": ENDED, "engine_error": None},
        {"served": False, "error": ENDED, "engine_error": "Scheduler watchdog timeout (self.watchdog_timeout=300)"},
        {"served": True, "verdict": "failed", "checks": {"greedy": "passed: 1.0"}},
    ],
)
def test_a_row_that_says_nothing_of_the_release_is_no_line(row):
    cell = {"engine": "vllm", "engine_version": "1", "gpu": "sm90", "devices": 1, "case": "llama", "scheme": "NVFP4"}
    assert engines.run_of(cell | {"all_packed": False, "kernels": []} | row) is None


@pytest.mark.parametrize("benchmark", [engines, serving])
def test_an_engine_that_is_not_installed_is_named(capsys, monkeypatch, benchmark):
    monkeypatch.setattr(sys, "argv", [benchmark.__name__, "vllm"])
    with pytest.raises(SystemExit):
        benchmark.main()
    assert "vllm: not a package of" in capsys.readouterr().err
