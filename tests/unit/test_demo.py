"""The embedded model: its text, its tokenizer, its training and the committed checkpoint."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from itertools import permutations
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV3ForCausalLM

DEMO = Path(__file__).parents[2] / "demo"
MODEL = DEMO / "model"
sys.path.append(str(DEMO))
generate = import_module("generate")
measure = import_module("measure")
train = import_module("train")


def content(row: dict[str, str]) -> str:
    """What decides the split: the question of an exercise, the text of a story; case and space set aside."""
    return " ".join(row.get("question", row["text"]).lower().split())


def contents(split: str, kind: str, count: int, seeds: range) -> set[str]:
    return {content(row) for seed in seeds for row in generate.documents(split, kind, count, seed)}


def in_all_splits(kind: str, count: int, seeds: range) -> list[set[str]]:
    return [contents(split, kind, count, seeds) for split in generate.SPLITS]


# Text.


@pytest.mark.parametrize("kind", generate.KINDS)
def test_no_document_is_in_two_splits(kind: str) -> None:
    training, calibration, test = in_all_splits(kind, 3000, range(3))
    assert not training & calibration
    assert not training & test
    assert not calibration & test


def test_without_the_partition_documents_would_be_in_two_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for split in generate.SPLITS:
        monkeypatch.setattr(generate, "split_of", lambda _, split=split: split)
        found.append(contents(split, "exercises", 3000, range(3)))
    assert found[0] & found[1] and found[0] & found[2] and found[1] & found[2]


def test_a_document_says_itself_which_split_it_is_in() -> None:
    for split in generate.SPLITS:
        for story in generate.documents(split, "stories", 300, seed=5):
            assert generate.split_of(story["text"]) == split
        for exercise in generate.documents(split, "exercises", 300, seed=5):
            question = exercise["question"].removesuffix(generate.ANSWER_CUE)
            assert generate.split_of(exercise["question"]) == split
            assert generate.split_of(exercise["question"].upper().replace(" ", "\n ")) == split
            assert question.strip()


@pytest.mark.parametrize("kind", generate.KINDS)
def test_the_same_arguments_give_the_same_bytes_in_any_process(kind: str, tmp_path: Path) -> None:
    written = []
    for hash_seed in ("0", "1", "random"):
        out = tmp_path / hash_seed / "rows.jsonl"
        arguments = f"--split calibration --kind {kind} --documents 300 --seed 7 --out {out}".split()
        subprocess.run(
            [sys.executable, str(DEMO / "generate.py"), *arguments],
            check=True,
            env=os.environ | {"PYTHONHASHSEED": hash_seed},
        )
        assert [path.name for path in out.parent.iterdir()] == ["rows.jsonl"]
        written.append(out.read_bytes())
    assert written[0] == written[1] == written[2]
    rows = [json.loads(line) for line in written[0].decode().splitlines()]
    assert rows == list(generate.documents("calibration", kind, 300, seed=7))


def test_seeds_give_different_documents() -> None:
    first, second = (list(generate.documents("train", "stories", 80, seed)) for seed in (0, 1))
    assert len({content(row) for row in first + second}) > 150


def test_a_failed_write_leaves_no_file(tmp_path: Path) -> None:
    def rows() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        generate.write_jsonl(rows(), tmp_path / "rows.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_split_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'validation'.*calibration"):
        next(generate.documents("validation", "stories", 1, seed=0))


def listed(question: str) -> list[str]:
    """The words between the first colon and the end of its sentence."""
    return re.search(r": ([^.?]+)[.?]", question)[1].split()


def solve_where(question: str) -> str:
    thing = re.search(r"Where is the (\w+)", question)[1]
    return re.findall(rf"the {thing} to the (\w+)\.", question)[-1]


def solve_holder(question: str) -> str:
    thing = re.search(r"Who has the (\w+)", question)[1]
    found = re.findall(rf"(\w+) takes the {thing}\.|gives the {thing} to (\w+)\.", question)
    return "".join(found[-1])


def solve_age(question: str) -> str:
    """Try every order from old to young, and keep the one that contradicts nothing."""
    facts = re.findall(r"(\w+) is (older|younger) than (\w+)\.", question)
    older = [(first, second) if word == "older" else (second, first) for first, word, second in facts]
    people = sorted({person for pair in older for person in pair})
    (order,) = (order for order in permutations(people) if all(order.index(a) < order.index(b) for a, b in older))
    return order[0] if "oldest" in question else order[-1]


def solve_weekday(question: str) -> str:
    week = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
    today, days = re.search(r"Today is (\w+)\..* in (\d+) day", question).groups()
    return (week * 2)[week.index(today) + int(days)]


def solve_following(question: str) -> str:
    words = listed(question)
    return " ".join(words[words.index(re.search(r"after (\w+)\?", question)[1]) + 1 :])


def numbers(question: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", question)]


SOLVERS = {
    "where": solve_where,
    "holder": solve_holder,
    "age": solve_age,
    "addition": lambda question: str(sum(numbers(question))),
    "subtraction": lambda question: str(numbers(question)[0] - numbers(question)[1]),
    "copying": lambda question: " ".join(listed(question)),
    "reversing": lambda question: " ".join(listed(question)[::-1]),
    "sorting": lambda question: " ".join(sorted(listed(question))),
    "counting": lambda question: str(listed(question).count(re.search(r"times (\w+)", question)[1])),
    "weekday": solve_weekday,
    "following": solve_following,
    "largest": lambda question: str(max(numbers(question))),
    "category": lambda question: " ".join(
        word
        for word in listed(question)
        if word in generate.CATEGORIES[re.search(r"Which one is ([\w ]+)\?", question)[1]]
    ),
}


def test_every_answer_is_what_another_solver_finds() -> None:
    assert set(SOLVERS) == set(generate.EXERCISES)
    for row in generate.documents("test", "exercises", 200 * len(SOLVERS), seed=11):
        assert SOLVERS[row["kind"]](row["question"]) == row["answer"], row["question"]


def test_an_exercise_is_its_question_its_answer_and_a_full_stop() -> None:
    for row in generate.documents("train", "exercises", 500, seed=2):
        assert row["text"] == f"{row['question']} {row['answer']}."
        assert row["question"].endswith("Answer:")
        assert "." not in row["answer"]


# Tokenizer.


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.mark.parametrize("text", ["plain words", "  two  spaces\n\ttab ", "naïve 日本語 🦊 \x00\x7f", "x²≤½"])
def test_any_text_survives_the_tokenizer(tokenizer, text: str) -> None:
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids) == text


def test_the_tokenizer_is_small_and_has_its_special_tokens(tokenizer) -> None:
    assert len(tokenizer) <= 2048
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<|bos|>", "<|eos|>", "<|pad|>")
    assert tokenizer("Look").input_ids[0] == tokenizer.bos_token_id
    assert [tokenizer.decode(token) for token in tokenizer("1904", add_special_tokens=False).input_ids] == [*"1904"]


def test_question_and_answer_tokenize_alike_apart_and_together(tokenizer) -> None:
    for row in generate.documents("test", "exercises", 260, seed=3):
        answer = tokenizer(f" {row['answer']}.", add_special_tokens=False).input_ids
        assert tokenizer(row["question"]).input_ids + answer == tokenizer(row["text"]).input_ids


def test_the_committed_tokenizer_is_the_one_that_train_makes(tokenizer) -> None:
    again = train.train_tokenizer(train.Recipe.seed, train.MAX_LENGTH)
    assert again.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


# Training.

SHORT = train.Recipe(tokens=4 * 2 * 64, rows=2, row_length=64)


def new_model(tokenizer) -> DeepseekV3ForCausalLM:
    torch.manual_seed(0)
    return DeepseekV3ForCausalLM(train.configuration(tokenizer, SHORT))


def test_the_quick_forward_computes_what_transformers_computes(tokenizer) -> None:
    model = new_model(tokenizer).eval()
    ids, _ = next(train.batches(tokenizer, SHORT))
    with torch.no_grad():
        expected = model(ids).logits
        train.quicken(model)
        found = model(ids).logits
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_the_quick_backward_is_that_of_transformers(tokenizer) -> None:
    ids, weights = next(train.batches(tokenizer, SHORT))
    gradients = []
    for prepare in (lambda model: None, train.quicken):
        model = new_model(tokenizer)
        prepare(model)
        train.weighted_loss(model(ids[:, :-1]).logits, ids[:, 1:], weights[:, 1:]).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-6, rtol=1e-3, msg=name)


def test_the_same_seed_trains_the_same_weights(tokenizer) -> None:
    runs = []
    for _ in range(2):
        model = new_model(tokenizer)
        losses = train.train(model, tokenizer, SHORT, lambda step, loss, seconds: None)
        runs.append((losses, train.published(model)))
    assert len(runs[0][0]) == SHORT.steps
    assert runs[0][0] == runs[1][0]
    assert all(torch.equal(tensor, runs[1][1][name]) for name, tensor in runs[0][1].items())


def test_balancing_raises_the_bias_of_the_idle_and_lowers_that_of_the_busy(tokenizer) -> None:
    model = new_model(tokenizer)
    experts = train.quicken(model)
    for expert in experts:
        expert.load = torch.tensor([9, 1] + [5] * 14)
    train.balance(model, experts, rate=0.25)
    for layer in model.model.layers[1:]:
        assert layer.mlp.gate.e_score_correction_bias.tolist() == [-0.25, 0.25] + [0.0] * 14


def test_a_written_checkpoint_reads_back_as_the_same_model(tokenizer, tmp_path: Path) -> None:
    model = new_model(tokenizer).to(torch.bfloat16)
    train.write_release(model, tokenizer, {}, tmp_path)
    again = DeepseekV3ForCausalLM.from_pretrained(tmp_path, dtype="auto")
    expected = model.state_dict()
    assert again.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())


# The committed checkpoint.


@pytest.fixture(scope="module")
def config() -> dict:
    return json.loads((MODEL / "config.json").read_text())


@pytest.fixture(scope="module")
def weight_map() -> dict[str, str]:
    return json.loads((MODEL / "model.safetensors.index.json").read_text())["weight_map"]


def test_the_folder_stays_under_16_megabytes() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 16_000_000


def test_the_index_names_every_tensor_of_several_shards(weight_map: dict[str, str]) -> None:
    shards = sorted(path.name for path in MODEL.glob("*.safetensors"))
    assert len(shards) >= 2
    found = {}
    for shard in shards:
        with safe_open(MODEL / shard, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= dict.fromkeys(file.keys(), shard)
    assert found == weight_map


def expected_names(config: dict) -> set[str]:
    names = {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    attention = ["q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj"]
    projections = [f"{name}_proj.weight" for name in ("gate", "up", "down")]
    for number in range(config["num_hidden_layers"]):
        block = f"model.layers.{number}"
        names |= {f"{block}.self_attn.{name}.weight" for name in attention}
        names |= {f"{block}.{name}_layernorm.weight" for name in ("input", "post_attention")}
        if number < config["first_k_dense_replace"]:
            names |= {f"{block}.mlp.{projection}" for projection in projections}
            continue
        names |= {f"{block}.mlp.gate.weight", f"{block}.mlp.gate.e_score_correction_bias"}
        names |= {f"{block}.mlp.shared_experts.{projection}" for projection in projections}
        for expert in range(config["n_routed_experts"]):
            names |= {f"{block}.mlp.experts.{expert}.{projection}" for projection in projections}
    return names


def test_tensors_have_the_published_names_dtypes_and_shapes(config: dict, weight_map: dict[str, str]) -> None:
    assert set(weight_map) == expected_names(config)
    for shard in sorted(set(weight_map.values())):
        with safe_open(MODEL / shard, "pt") as file:
            for name in file.keys():  # noqa: SIM118 - a safetensors file is not iterable
                tensor = file.get_tensor(name)
                assert tensor.isfinite().all(), name
                kept = name.endswith("e_score_correction_bias")
                assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name
                if tensor.ndim == 2 and "_proj" in name:
                    assert tensor.shape[1] % 128 == 0 and tensor.shape[0] % 32 == 0, name


def test_the_config_is_that_of_a_small_deepseek_v3(config: dict) -> None:
    expected = {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "dtype": "bfloat16",
        "first_k_dense_replace": 1,
        "num_hidden_layers": 6,
        "n_routed_experts": 16,
        "n_shared_experts": 1,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
        "moe_layer_freq": 1,
        "ep_size": 1,
        "num_nextn_predict_layers": 0,
        "tie_word_embeddings": False,
    }
    assert {name: config[name] for name in expected} == expected
    assert config["hidden_size"] % 128 == 0 and config["moe_intermediate_size"] % 128 == 0


def test_transformers_loads_it_whole() -> None:
    _, loading = AutoModelForCausalLM.from_pretrained(MODEL, dtype="auto", output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.fixture(scope="module")
def skill() -> dict:
    return measure.measure(MODEL, per_kind=12, story_count=12, seed=1)


def test_it_answers_held_out_exercises(skill: dict) -> None:
    assert skill["exercises"]["accuracy"] >= 0.85
    assert min(skill["exercises"]["by_kind"].values()) >= 0.4


def test_it_models_held_out_stories(skill: dict) -> None:
    assert skill["stories"]["perplexity"] < 2.5


def test_every_expert_of_every_block_is_used(skill: dict, config: dict) -> None:
    shares = skill["expert_share_by_block"]
    assert list(shares) == [str(n) for n in range(config["first_k_dense_replace"], config["num_hidden_layers"])]
    assert all(share["least"] >= 0.01 for share in shares.values())


def test_the_measured_skill_is_over_the_bar_and_is_what_the_readme_says() -> None:
    recorded = json.loads((MODEL / "skill.json").read_text())
    training = json.loads((MODEL / "training.json").read_text())
    readme = (DEMO / "README.md").read_text()
    assert recorded["exercises"]["accuracy"] >= 0.85
    assert all(share["least"] >= 0.01 for share in recorded["expert_share_by_block"].values())
    assert measure.between_markers(readme, measure.tables(recorded, training)) == readme


def test_greedy_generation_writes_the_answers_that_the_measurement_counts(tokenizer) -> None:
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for row in generate.documents("test", "exercises", 26, seed=4):
        answer = tokenizer(f" {row['answer']}.", add_special_tokens=False).input_ids
        asked = tokenizer(row["question"], return_tensors="pt").input_ids
        sequence = measure.Sequence(asked[0].tolist() + answer, len(answer))
        (prediction,) = measure.predictions(model, [sequence])
        written = greedy(model, asked, len(answer))
        assert (written == answer) == bool(prediction.likeliest.all()), row["question"]


def greedy(model, ids: torch.Tensor, count: int) -> list[int]:
    start = ids.shape[1]
    with torch.inference_mode():
        for _ in range(count):
            following = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat((ids, following), dim=1)
    return ids[0, start:].tolist()
