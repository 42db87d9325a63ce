"""The generated task: problems are right, reproducible and split by hash; the tokenizer is a real Hugging Face one."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from areal.tasks import arithmetic
from areal.tasks.arithmetic import ArithmeticRows, arithmetic_reward, build_tokenizer, is_held_out, make_problem


def evaluate_chain(prompt: str) -> int:
    """Left to right, independent of the generator: label, operation, digit."""
    assert prompt[0] == "a" and prompt[-1] == "="
    value = int(prompt[1])
    for i in range(2, len(prompt) - 1, 3):
        value = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}[prompt[i + 1]](value, int(prompt[i + 2]))
    return value % 10


@given(st.integers(0, 2**40), st.integers(0, 10**9), st.sampled_from(["train", "valid", "demonstrations"]), st.integers(3, 64))
def test_answers_are_right_and_every_step_is_written_out(seed, index, stream, max_terms):
    problem = make_problem(seed, stream, index, max_terms=max_terms)
    assert problem == make_problem(seed, stream, index, max_terms=max_terms)
    assert int(problem.answer) == evaluate_chain(problem.prompt)
    assert problem.direct == f"#{problem.answer}"
    steps, result = problem.thinking.split("#")
    assert result == problem.answer
    assert 3 <= problem.terms == len(steps.split(",")) <= max_terms
    first, *rest = steps.split(",")
    assert first + "".join(step.partition("=")[0] for step in rest) + "=" == problem.prompt
    for i, step in enumerate(rest, 1):
        prefix = problem.prompt[: 2 + 3 * i] + "="
        assert int(step.partition("=")[2]) == evaluate_chain(prefix)


def test_example_of_the_docstring():
    assert evaluate_chain("a7b*8c-3=") == 3
    assert "a7b*8c-3=" in (arithmetic.__doc__ or "") and "a7,b*8=6,c-3=3#3" in (arithmetic.__doc__ or "")


def test_held_out_prompts_are_in_no_training_stream_whatever_the_seed():
    held = {make_problem(seed, "valid", i).prompt for seed in (0, 1) for i in range(500)}
    for stream in ("train", "demonstrations"):
        seen = {make_problem(seed, stream, i).prompt for seed in (0, 1, 2) for i in range(1500)}
        assert not seen & held and not any(map(is_held_out, seen))
    assert all(map(is_held_out, held))
    assert len(held) > 800  # not the same few again and again


def test_streams_and_seeds_differ():
    prompts = [tuple(make_problem(seed, stream, i).prompt for i in range(20)) for seed in (0, 1) for stream in ("train", "demonstrations")]
    assert len(set(prompts)) == 4


def test_lengths_uniform_or_with_a_long_tail():
    uniform = [make_problem(0, "train", i).terms for i in range(3000)]
    assert {n: abs(uniform.count(n) - 500) < 110 for n in range(3, 9)} == dict.fromkeys(range(3, 9), True)
    tail = sorted(make_problem(0, "train", i, max_terms=64, spread="log_uniform").terms for i in range(3000))
    assert tail[0] == 3 and tail[-1] == 64 and 12 <= tail[1500] <= 16


@pytest.mark.parametrize(("low", "high"), [(0, 3), (5, 4), (3, 65)])
def test_impossible_ranges_are_told(low, high):
    with pytest.raises(ValueError, match="min_terms"):
        make_problem(0, "train", 0, min_terms=low, max_terms=high)


def test_a_range_without_held_out_prompts_is_an_error_not_a_hang(monkeypatch):
    monkeypatch.setattr(arithmetic, "is_held_out", lambda prompt: False)
    with pytest.raises(ValueError, match="no 'valid' prompt"):
        make_problem(0, "valid", 0, min_terms=1, max_terms=1)


def test_demonstrations_are_half_thinking_half_direct():
    rows = [ArithmeticRows(0, "demonstrations")[i] for i in range(200)]
    thinking = [row for row in rows if row["completion"].startswith(arithmetic.THINKING_PREFIX)]
    assert len(thinking) == 100
    assert all(row["completion"].endswith(f"#{row['answer']}") for row in rows)
    assert "completion" not in ArithmeticRows(0, "train")[0]
    assert len(list(ArithmeticRows(0, "valid", size=7))) == 7


@pytest.mark.parametrize(
    ("completion", "reward"),
    [
        ("#3", 1.0),
        ("a7,b*8=6,c-3=3#3", 1.0),
        ("#3<eos>", 1.0),
        ("#4", 0.0),
        ("#33", 0.0),
        ("3", 0.0),
        ("", 0.0),
        ("#3#", 0.0),
        ("#4#3", 1.0),
    ],
)
def test_reward(completion, reward):
    assert arithmetic_reward("a7b*8c-3=", completion, [], [], answer="3", terms=3, prompt_id="x") == reward


def test_tokenizer_round_trip_through_its_folder(tmp_path):
    from transformers import AutoTokenizer

    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert len(tokenizer) == 44 and (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
    for index in range(50):
        problem = make_problem(0, "train", index)
        text = problem.prompt + problem.thinking
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text) and tokenizer.decode(ids) == text
        assert tokenizer.decode([*ids, 1], skip_special_tokens=True) == text
    assert tokenizer("#3<eos>")["input_ids"][-1] == tokenizer.eos_token_id


def test_tokenizer_of_long_chains_knows_all_labels_and_keeps_the_short_ids():
    long = build_tokenizer(64)
    assert len(long) == 82
    text = "".join(arithmetic.LABELS) + make_problem(0, "train", 0, min_terms=64, max_terms=64).prompt
    assert long.decode(long(text)["input_ids"]) == text
    assert build_tokenizer()("a7b*8=")["input_ids"] == long("a7b*8=")["input_ids"]


def test_unknown_characters_are_an_error():
    with pytest.raises(Exception, match="WordLevel"):  # tokenizers raises bare Exception
        build_tokenizer()("a7 b")


def test_import_needs_no_torch():
    code = "import sys, areal.tasks.arithmetic; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
