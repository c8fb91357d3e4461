"""What a script computes with is found by parsing, all of it and nothing else."""

import re
import sys
from importlib.metadata import distribution
from pathlib import Path

import pytest

from requant import distributions, imports
from requant.imports import code_of, libraries_of, modules_of

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
NUMERIC = {"numpy", "torch", "numba", "triton", "transformers", "safetensors", "auto_round", "lm_eval", "pandas"}


@pytest.fixture(autouse=True)
def forget() -> None:
    """Nothing that an earlier test found is remembered: files and distributions change within one process here."""
    forget_all()


def forget_all() -> None:
    for module in (imports, distributions):
        for name in dir(module):
            if hasattr(getattr(module, name), "cache_clear"):
                getattr(module, name).cache_clear()


def lay_out(root: Path, script: str, **modules: str) -> Path:
    """A script, and a package `requant` of these modules beside it."""
    package = root / "requant"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text("COMPUTES = False\n")
    for name, code in modules.items():
        (package / f"{name}.py").write_text(code)
    (root / "script.py").write_text(script)
    return root / "script.py"


def names(paths: list[str]) -> list[str]:
    return [Path(path).name for path in paths]


def test_every_module_behind_a_script_is_found(tmp_path):
    script = lay_out(
        tmp_path,
        "from requant.a import f\n",
        a="def f():\n    from requant import b\n",
        b="from requant.c import x\nimport torch\nfrom . import d\ncommand = ['-m', 'requant.e']\n",
        c="x = 1\n",
        d="",
        e="",
        unused="",
    )
    assert names(modules_of(script, tmp_path)) == ["a.py", "b.py", "c.py", "d.py", "e.py"]


def test_a_module_that_says_that_it_computes_nothing_is_left_out_with_what_it_imports(tmp_path):
    script = lay_out(
        tmp_path,
        "from requant.schema import Field\n",
        schema="from requant.shapes import Shape\nimport pydantic\nCOMPUTES = False  # a schema\n",
        shapes="",
    )
    assert modules_of(script, tmp_path) == []
    assert [line.partition("==")[0] for line in libraries_of(script, tmp_path)] == ["python"]


def test_imports_for_type_checkers_do_not_count(tmp_path):
    script = lay_out(
        tmp_path,
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\nelse:\n    import requant.a\n",
        a="",
    )
    assert names(modules_of(script, tmp_path)) == ["a.py"]
    assert len(libraries_of(script, tmp_path)) == 1


def test_files_that_a_module_names_are_found(tmp_path):
    script = lay_out(tmp_path, "import requant.a\n", a="loader('templates', 'schema.json', 'unnamed')\n")
    (tmp_path / "requant/templates").mkdir()
    for name in ("schema.json", "other.json", "templates/card.j2"):
        (tmp_path / "requant" / name).write_text("one")
    assert names(modules_of(script, tmp_path)) == ["a.py", "schema.json", "card.j2"]
    before = code_of(script, tmp_path)
    forget_all()
    (tmp_path / "requant/templates/card.j2").write_text("two")
    changed = [line.split()[0] for line in set(code_of(script, tmp_path)) - set(before)]
    assert changed == ["requant/templates/card.j2"]


CODE = '"""About."""\nfrom math import sqrt\n\n\ndef root(x):\n    """Of x."""\n    return sqrt(x)  # why\n'


@pytest.mark.parametrize(
    ("code", "same"),
    [
        (CODE.replace("# why", "# because"), True),
        (CODE.replace("Of x.", "The root of x.").replace('"""About."""\n', ""), True),
        (CODE.replace("(x)  # why", "(\n        x\n    )"), True),
        (CODE.replace("sqrt(x)", "sqrt(x + 1)"), False),
        (CODE.replace("    return", "    'a string that is no docstring' * x\n    return"), False),
    ],
)
def test_comments_docstrings_layout_and_place_change_no_digest(tmp_path, code, same):
    for name, text in (("one", CODE), ("two", code)):
        (tmp_path / name / "scripts").mkdir(parents=True)
        lay_out(tmp_path / name, "", a=text)
        (tmp_path / name / "scripts/job.py").write_text("import requant.a\n")
    one, two = (code_of(tmp_path / name / "scripts/job.py", tmp_path / name) for name in ("one", "two"))
    assert one[0] == two[0] and re.fullmatch(r"scripts/job\.py [0-9a-f]{12}", one[0])
    assert (one[1] == two[1]) is same


def install(folder: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """A distribution of one module, as pip would leave it in `folder`."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    (info / "top_level.txt").write_text(f"{name}_module\n")
    (info / "RECORD").write_text(f"{name}_module.py,,\n")
    (folder / f"{name}_module.py").write_text("")


def test_libraries_come_with_what_they_require_by_extra_and_marker(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    required = ("required[more]", "elsewhere; sys_platform == 'nowhere'", "extra; extra == 'wanted'", "absent")
    install(tmp_path / "site", "direct", "1.0", required)
    install(tmp_path / "site", "required", "2.0", ("optional; extra == 'more'", "direct"))
    for name in ("elsewhere", "extra", "optional", "unused"):
        install(tmp_path / "site", name, "3.0")
    script = lay_out(tmp_path, "import requant.a\n", a="def f():\n    import direct_module.part, json, never_there\n")
    monkeypatch.setenv("REQUANT_ENVIRONMENT", "the path of an environment")
    python = ".".join(map(str, sys.version_info[:3]))
    assert libraries_of(script, tmp_path) == [
        f"python=={python}",
        "direct==1.0",
        "never-there==none",
        "optional==3.0",
        "required==2.0",
        "environment==the path of an environment",
    ]


def test_the_distribution_that_is_imported_is_the_one_that_counts(tmp_path, monkeypatch):
    script = lay_out(tmp_path, "import safetensors\n")
    assert f"safetensors=={distribution('safetensors').version}" in libraries_of(script, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    install(tmp_path / "site", "safetensors", "99.1")
    forget_all()
    (tmp_path / "site/safetensors").mkdir()
    assert "safetensors==99.1" in libraries_of(script, tmp_path)


def test_plots_run_on_matplotlib_and_tuning_does_not():
    def libraries(script):
        return {line.partition("==")[0] for line in libraries_of(ROOT / f"scripts/{script}.py", SOURCE)}

    assert "matplotlib" in libraries("plot_release") and "torch" not in libraries("plot_release")
    assert "matplotlib" not in libraries("quantize") and {"torch", "auto-round", "numba"} <= libraries("quantize")
    assert not {"torch", "matplotlib"} & libraries("release_card")
    assert not any("snakemake" in libraries(path.stem) for path in SCRIPTS)


def modules_that(computes: bool) -> list[Path]:
    paths = sorted((SOURCE / "requant").glob("*.py"))
    return [path for path in paths if imports._said(path, SOURCE).computes == computes]


def test_modules_that_compute_nothing_handle_no_numbers():
    """Their own word is not enough: none of them imports a library of numbers."""
    found = modules_that(computes=False)
    assert {"config", "records", "jobs"} <= {path.stem for path in found}
    for path in found:
        imported = {name.partition(".")[0] for name in imports._said(path, SOURCE).imports}
        assert not imported & NUMERIC, path
        assert re.search(r"^COMPUTES = False  # \w.{10,}$", path.read_text(), re.MULTILINE), f"{path}: no reason"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_rule_names_what_its_script_computes_with(path):
    rules = "".join(file.read_text() for file in sorted((ROOT / "rules").glob("*.smk")))
    block = re.search(rf"^rule {path.stem}:\n(.*?)(?=^rule |\Z)", rules, re.MULTILINE | re.DOTALL).group(1)
    assert "    output:" not in block or f'*code_and_libraries("{path.stem}")' in block
