"""Prompt data sets: order, resumption, malformed rows; on real files."""

import json
import logging
from pathlib import Path

import pytest

from areal.config import ConfigError, DatasetConfig
from areal.data import MalformedRow, PromptDataset, SequenceRows, encode_prompt, load_dataset
from areal.tasks.arithmetic import build_tokenizer

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k_train.jsonl"


def write_jsonl(path, rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbers(tmp_path):
    return write_jsonl(tmp_path / "numbers.jsonl", [{"question": f"q{i}", "answer": str(i), "level": i % 3} for i in range(10)])


def take(dataset, n):
    return [next(dataset) for _ in range(n)]


def test_jsonl_rows_have_messages_answer_columns_and_a_stable_id(numbers):
    row = next(load_dataset(DatasetConfig(path=numbers, shuffle=False)))
    assert row == {
        "prompt_id": "numbers.jsonl:1",
        "messages": [{"role": "user", "content": "q0"}],
        "answer": "0",
        "level": 0,
        "epoch": 0,
    }
    plain = next(load_dataset(DatasetConfig(path=numbers, shuffle=False, chat_template=False)))
    assert plain["prompt"] == "q0" and "messages" not in plain


def test_other_column_names_and_prompt_forms(tmp_path):
    chat = [{"role": "system", "content": "be short"}, {"role": "user", "content": "hi"}]
    rows = [{"problem": "p", "solution": "s", "prompt": "stale"}, {"problem": chat, "solution": "t"}, {"problem": [5, 6], "solution": "u"}]
    path = write_jsonl(tmp_path / "d.jsonl", rows)
    a, b, c = load_dataset(DatasetConfig(path=path, prompt_key="problem", answer_key="solution", chat_template=False)).first(9)
    assert (a["prompt"], a["answer"]) == ("p", "s")
    assert b["messages"] == chat and c["input_ids"] == [5, 6]


def test_epochs_are_permutations_in_different_orders_and_ids_are_stable(numbers):
    dataset = load_dataset(DatasetConfig(path=numbers), seed=3)
    epochs = [[row["prompt_id"] for row in take(dataset, 10)] for _ in range(3)]
    assert len({tuple(sorted(e)) for e in epochs}) == 1 and len(set(map(tuple, epochs))) == 3
    again = load_dataset(DatasetConfig(path=numbers), seed=3)
    assert [row["prompt_id"] for row in take(again, 10)] == epochs[0]
    assert [row["epoch"] for row in take(again, 11)] == [1] * 10 + [2]
    other = load_dataset(DatasetConfig(path=numbers), seed=4)
    assert [row["prompt_id"] for row in take(other, 10)] != epochs[0]


@pytest.mark.parametrize("consumed", [0, 1, 7, 10, 13, 30])
@pytest.mark.parametrize("kind", ["jsonl", "arithmetic", "arithmetic_finite"])
def test_resumes_with_the_very_next_row(numbers, kind, consumed):
    config = {
        "jsonl": DatasetConfig(path=numbers),
        "arithmetic": DatasetConfig(type="arithmetic"),
        "arithmetic_finite": DatasetConfig(type="arithmetic", limit=10),
    }[kind]
    dataset = load_dataset(config, seed=5)
    take(dataset, consumed)
    state = json.loads(json.dumps(dataset.state_dict()))
    resumed = load_dataset(config, seed=5)
    take(resumed, 4)
    resumed.load_state_dict(state)
    assert take(resumed, 25) == take(dataset, 25)


def test_state_of_another_file_is_refused(numbers):
    state = load_dataset(DatasetConfig(path=numbers)).state_dict()
    with pytest.raises(ConfigError, match="had size 10 when its state was saved and has 5 now"):
        load_dataset(DatasetConfig(path=numbers, limit=5)).load_state_dict(state)
    with pytest.raises(ConfigError, match="had seed 0"):
        load_dataset(DatasetConfig(path=numbers), seed=1).load_state_dict(state)


def test_state_of_as_many_other_rows_is_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"question": f"{n}?", "answer": n}) + "\n" for n in range(6)))
    dataset = load_dataset(DatasetConfig(path=str(path)))
    state = dataset.state_dict()
    load_dataset(DatasetConfig(path=str(path))).load_state_dict(state)
    last = take(dataset, 3)[-1]
    state = json.loads(json.dumps(dataset.state_dict()))
    load_dataset(DatasetConfig(path=str(path))).load_state_dict(state)
    path.write_text(path.read_text().replace(last["messages"][0]["content"], "another?"))
    with pytest.raises(ConfigError, match=r"row \d of the data set .* is another one than when its state was saved"):
        load_dataset(DatasetConfig(path=str(path))).load_state_dict(state)


def test_malformed_rows_are_dropped_counted_and_logged_with_file_and_line(tmp_path, caplog):
    bad = ["{not json", '"a string"', json.dumps({"answer": "1"}), json.dumps({"question": 7}), json.dumps({"question": ""})]
    bad += [json.dumps({"question": [{"content": "no role"}]}), json.dumps({"question": [True, 2]})]
    path = write_jsonl(tmp_path / "mixed.jsonl", [{"question": "ok", "answer": "1"}, "", *bad, {"question": "fine", "answer": "2"}])
    dataset = load_dataset(DatasetConfig(path=path, shuffle=False))
    with caplog.at_level(logging.WARNING):
        rows = take(dataset, 4)
    assert [r["prompt_id"] for r in rows] == ["mixed.jsonl:1", "mixed.jsonl:10"] * 2
    assert dataset.dropped == {"malformed_row": 14}
    assert f"{path}:3: not JSON" in caplog.text and f"{path}:5: no key 'question' (it has answer); set prompt_key" in caplog.text
    assert len(caplog.records) == 10


def test_bytes_that_are_not_utf8_are_one_malformed_row(tmp_path):
    (tmp_path / "d.jsonl").write_bytes(b'{"question": "\xff"}\n{"question": "ok"}\n')
    dataset = load_dataset(DatasetConfig(path=str(tmp_path / "d.jsonl"), shuffle=False))
    assert next(dataset)["prompt_id"] == "d.jsonl:2" and dataset.dropped["malformed_row"] == 1


@pytest.mark.parametrize(("content", "message"), [(None, "cannot be read"), ("", "no rows"), ("\n \n", "no rows")])
def test_files_without_rows_are_errors_before_anything_starts(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConfigError, match=rf"valid_dataset\.path=.*{message}"):
        load_dataset(DatasetConfig(path=str(path)), split="valid")


def test_a_file_with_only_malformed_rows_is_an_error_not_a_hang(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", ["{", "{", "["])
    with pytest.raises(ConfigError, match="no usable row"):
        next(load_dataset(DatasetConfig(path=path)))


def test_arithmetic_streams():
    config = DatasetConfig(type="arithmetic", max_terms=5)
    train, valid = load_dataset(config, 1), load_dataset(config, 1, "valid")
    assert train.size is None
    prompts = {row["prompt"] for row in take(train, 300)}
    assert not prompts & {row["prompt"] for row in valid.first(300)}
    assert len(valid.first(300)) == 300 and valid.first(5) == valid.first(300)[:5]
    assert all(row["terms"] <= 5 for row in valid.first(50))
    with pytest.raises(ConfigError, match=r"train_dataset: chains have 1 to 64 terms"):
        load_dataset(DatasetConfig(type="arithmetic", max_terms=65))


def test_validation_rows_keep_their_order(numbers):
    valid = load_dataset(DatasetConfig(path=numbers, limit=8), seed=1, split="valid")
    assert [row["answer"] for row in valid.first(100)] == [str(i) for i in range(8)]


def test_a_users_own_sequence_of_rows():
    dataset = PromptDataset([{"prompt": "a", "x": 1}, {"messages": []}, {"own": 0}, "text"], shuffle=False, name="mine")
    assert take(dataset, 4) == [
        {"prompt_id": "mine/0", "prompt": "a", "x": 1, "epoch": 0},
        {"prompt_id": "mine/1", "messages": [], "epoch": 0},
        {"prompt_id": "mine/2", "own": 0, "epoch": 0},
        {"prompt_id": "mine/0", "prompt": "a", "x": 1, "epoch": 1},
    ]
    with pytest.raises(ConfigError, match="mine has no rows"):
        PromptDataset([], name="mine")
    with pytest.raises(ConfigError, match="mine is a set"):
        PromptDataset({1}, name="mine")


def test_rows_given_in_place_of_those_of_the_config():
    config = DatasetConfig(type="given", prompt_key="q", shuffle=False)
    rows = load_dataset(config, given=[{"q": "a", "answer": "1"}, {"q": 7}, {"prompt": "b", "q": "c"}]).first(3)
    assert rows[0]["messages"] == [{"role": "user", "content": "a"}] and rows[0]["q"] == "a"
    assert rows[1] == {"prompt_id": "train_dataset/1", "q": 7, "epoch": 0}
    assert rows[2]["prompt"] == "b" and "messages" not in rows[2]
    with pytest.raises(ConfigError, match="no rows were given"):
        load_dataset(config)


def test_huggingface_datasets(tmp_path):
    datasets = pytest.importorskip("datasets", reason="the extra 'datasets' is not installed")
    rows = datasets.Dataset.from_dict({"question": ["p", "q", "r"], "answer": ["1", "2", "3"]})
    rows.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": rows}).save_to_disk(tmp_path / "splits")
    for folder in ("plain", "splits"):
        dataset = load_dataset(DatasetConfig(type="huggingface", path=str(tmp_path / folder)), split="valid")
        assert [(r["messages"][0]["content"], r["answer"]) for r in dataset.first(9)] == [("p", "1"), ("q", "2"), ("r", "3")]
    with pytest.raises(ConfigError, match="split 'test'"):
        load_dataset(DatasetConfig(type="huggingface", path=str(tmp_path / "splits"), split="test"))


def test_encode_prompt():
    tokenizer = build_tokenizer()
    assert encode_prompt({"input_ids": [3, 4]}, tokenizer) == [3, 4]
    text = encode_prompt({"prompt": "a7b*8="}, tokenizer)
    assert tokenizer.decode(text) == "a7b*8="
    assert encode_prompt({"messages": [{"role": "user", "content": "a7b*8="}]}, tokenizer) == text  # there is no template
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}#{% endif %}"
    assert tokenizer.decode(encode_prompt({"messages": [{"role": "user", "content": "a7="}]}, tokenizer)) == "a7=#"
    with pytest.raises(MalformedRow, match="numbers:3"):
        encode_prompt({"prompt": "a b", "prompt_id": "numbers:3"}, tokenizer)


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"{GSM8K} is not there")
def test_gsm8k_file():
    dataset = load_dataset(DatasetConfig(path=str(GSM8K)), seed=0)
    rows = take(dataset, 7473)
    assert len({row["prompt_id"] for row in rows}) == 7473 and not dataset.dropped
    assert all("####" in row["answer"] for row in rows)


def test_sequence_limit():
    assert SequenceRows([{"prompt": "x"}] * 5, "five", limit=2).size == 2
