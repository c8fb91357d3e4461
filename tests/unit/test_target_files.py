"""Targets as files: each is whole and says why not, and entries of a config start from them."""

from pathlib import Path

import pytest
import yaml

from requant.config import Target, parse
from requant.errors import RequantError
from requant.standalone import standalone
from requant.target_files import FOLDER, read_targets, target_named, with_targets

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["cpu-docker", "cpu-transformers", "sm100-sglang", "sm100-vllm", "sm120-sglang", "sm90-sglang", "sm90-vllm"]
RELEASE = {
    "models": {"m": {"path": "m"}},
    "releases": {"r": {"model": "m", "scheme": "NVFP4", "deploy": {"target": "sm120-sglang"}}},
    "build": ["r"],
}


def folder(tmp_path: Path, **files: dict) -> Path:
    for name, data in files.items():
        (tmp_path / f"{name}.yaml").write_text(data if isinstance(data, str) else yaml.safe_dump(data))
    return tmp_path


def test_the_files_are_targets_each_with_its_limits_and_what_was_run():
    found = {name: target_named(name, None, ROOT / FOLDER) for name in read_targets(ROOT / FOLDER)}
    assert list(found) == NAMES
    for name, target in found.items():
        assert target.description and target.limits and target.tested, name
        assert target.device == "cpu" or (target.image and target.memory_gb and target.kv_cache), name
        assert name.split("-")[0] == (target.gpu or "cpu"), name
        assert ("Not run here" in target.tested) == (target.device == "cuda"), name


def test_the_default_target_is_the_file_of_its_name():
    told = {"description", "limits", "tested"}
    assert target_named("cpu-transformers", None, ROOT / FOLDER).model_dump(exclude=told) == Target().model_dump(
        exclude=told
    )


def test_a_release_names_a_file_and_its_config_has_the_whole_of_it(tmp_path):
    config = parse(with_targets(RELEASE, ROOT / FOLDER))
    assert sorted(config.targets) == NAMES
    alone = yaml.safe_load(yaml.safe_dump(standalone(config, "r")))
    assert parse(alone).targets["sm120-sglang"] == config.targets["sm120-sglang"], "without a file"
    changed = folder(tmp_path, **{"sm120-sglang": {"engine": "transformers"}})
    again = parse(with_targets(alone, changed)).targets["sm120-sglang"]
    assert again == config.targets["sm120-sglang"], "the file of another checkout says nothing of it"


def test_directories_of_a_container_are_cut_in_what_is_published():
    mounts = [{"source": "/data/hidden/cache", "target": "/cache"}]
    data = RELEASE | {"targets": {"sm120-sglang": {"like": "sm120-sglang", "container": {"mounts": mounts}}}}
    alone = standalone(parse(with_targets(data, ROOT / FOLDER)), "r")
    assert alone["targets"]["sm120-sglang"]["container"]["mounts"][0]["source"] == "cache"


def test_an_entry_starts_from_another(tmp_path):
    base = {"engine": "vllm", "device": "cuda", "gpu": "sm90", "arguments": ["--enforce-eager"]}
    base |= {"environment": {"VLLM_A": "1", "VLLM_B": "1"}, "container": {"ipc": "host", "shm_size": "8g"}}
    own = {"like": "base", "devices": 4, "arguments": ["--enable-dbo"]}
    own |= {"environment": {"VLLM_B": "2"}, "container": {"shm_size": "1g"}}
    targets = {"mine": own, "next": {"like": "mine", "devices": 2}, "base": {"like": "base", "devices": 9}}
    data = RELEASE | {"releases": {"r": {"model": "m", "scheme": "W4A16"}}, "targets": targets}
    found = parse(with_targets(data, folder(tmp_path, base=base)))
    mine = found.targets["mine"]
    assert (mine.gpu, mine.devices, mine.arguments) == ("sm90", 4, ["--enable-dbo"])
    assert mine.environment == {"VLLM_A": "1", "VLLM_B": "2"}
    assert (mine.container.ipc, mine.container.shm_size) == ("host", "1g")
    assert found.targets["next"] == mine.model_copy(update={"devices": 2})
    assert found.targets["base"].devices == 9, "an entry may start from the file that it stands for"


@pytest.mark.parametrize(
    ("targets", "line"),
    [
        ({"a": {"like": "b"}}, "config: targets.a.like: 'b'; expected one of a, file"),
        ({"a": {"like": ["b"]}}, "config: targets.a.like: ['b']; expected one of a, file"),
        ({"a": {"like": "b"}, "b": {"like": "a"}}, "config: targets.b.like: 'a' leads back to 'b'; expected another"),
        ({"a": {"like": "a"}}, "config: targets.a.like: 'a' leads back to 'a'; expected another target"),
        ({"a": {"like": "file", "gup": 1}}, "config: targets.a.gup: unknown key (value 1); expected: one of arguments"),
        ({"a": {"like": "file", "devices": 0}}, "config: targets.a.devices: 0; expected: greater than or equal to 1"),
        ([1], "config: targets: [1]; expected: a valid dictionary"),
        ({"a": 3}, "config: targets.a: 3; expected: "),
        ({"a": {"like": "b"}, "b": 3}, "config: targets.a: 3; expected: "),
    ],
)
def test_each_mistake_in_an_entry_is_one_line(targets, line, tmp_path):
    release = {"releases": {"r": {"model": "m", "scheme": "BF16"}}}
    with pytest.raises(RequantError) as raised:
        parse(with_targets(RELEASE | release | {"targets": targets}, folder(tmp_path, file={})))
    assert str(raised.value).split("\n")[0].startswith(line)


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("engine: tgi", "x.yaml: engine: 'tgi'; expected: 'transformers', 'vllm' or 'sglang'"),
        ("nonsense: 1", "x.yaml: nonsense: unknown key (value 1); expected: one of arguments, concurrency, container"),
        ("container: {root: 1}", "x.yaml: container.root: unknown key (value 1); expected: one of capabilities, cpus"),
        ("limits: [{what: a}]", "x.yaml: limits.0.why: missing; expected: the reason"),
        ("[1]", "x.yaml: [1]; expected keys of a target"),
        ("a: [", "x.yaml: while parsing"),
        ("engine: sglang", "x.yaml: device: 'cpu': engine sglang is planned for on GPUs only; expected cuda"),
        ("arguments: [--port=1]", "x.yaml: arguments: '--port=1': requant chooses where the engine listens; expected"),
        (
            "arguments: [-q, fp8]",
            "x.yaml: arguments: '-q': it follows from the checkpoint, or from `quant",
        ),
        (
            "arguments: [--trust-remote-code]",
            "x.yaml: arguments: '--trust-remote-code': no code of a checkpoint is",
        ),
        ("environment: {HF_TOKEN: a}", "x.yaml: environment: HF_TOKEN: a credential by its name; expected none: what"),
    ],
)
def test_each_mistake_in_a_file_is_one_line_that_names_it(text, line, tmp_path):
    with pytest.raises(RequantError) as raised:
        read_targets(folder(tmp_path, x=text))
    assert str(raised.value).startswith(f"{tmp_path}/{line}") and "\n" not in str(raised.value)


def test_a_target_is_looked_for_in_the_configfile_and_then_among_the_files(tmp_path):
    configfile = tmp_path / "mine.yaml"
    configfile.write_text("targets: {mine: {like: sm90-vllm, devices: 1}, plain: }\nmodels: nothing to do with it\n")
    assert target_named("mine", configfile, ROOT / FOLDER).devices == 1
    assert target_named("plain", configfile, ROOT / FOLDER) == Target()
    assert target_named("sm90-vllm", configfile, ROOT / FOLDER).devices == 8
    with pytest.raises(RequantError, match="^--target nine: no such target; expected one of cpu-docker, .*, mine, pl"):
        target_named("nine", configfile, ROOT / FOLDER)
    with pytest.raises(RequantError, match="none.yaml: not there; expected a YAML file"):
        target_named("mine", tmp_path / "none.yaml", ROOT / FOLDER)
