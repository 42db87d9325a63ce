"""Packed forward passes against Hugging Face's own eager attention, one sequence at a time."""

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from areal.models.attention import AttentionSpec, PackedContext, areal_attention
from areal.models.heads import packed_logprobs
from areal.models.loading import create_model, empty_model, load_model, meta_template, save_model
from areal.models.packed import _scored_attention
from areal.models.prefix import find_shared_prompts

torch.set_num_threads(1)

SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48,
    "vocab_size": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 512,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32, "rope_theta": 10000.0}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
          "rope_theta": 10000.0}  # fmt: skip
ARCHITECTURES = {
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1},
    "llama": {"rope_parameters": LLAMA3},
    "llama-yarn": {"rope_parameters": YARN},
    "mistral": {"sliding_window": 9},
    "gemma": {},
    "gemma2": {"sliding_window": 9, "final_logit_softcapping": 5.0, "attn_logit_softcapping": 4.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 9, "query_pre_attn_scalar": 8},
    "phi": {"partial_rotary_factor": 0.5},
    "phi3": {},
    "olmo2": {},
    "granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7, "embedding_multiplier": 1.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 9},
    "smollm3": {},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 9},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"rotary_pct": 0.5},
}


def small_config(name):
    model_type = name.partition("-")[0]
    keys = {**SMALL, **ARCHITECTURES[name]}
    if model_type in ("gpt2",):
        keys = {k: v for k, v in keys.items() if k not in ("num_key_value_heads", "head_dim")}
    return {"model_type": model_type, **keys}


def small_model(name, seed=0, scale=4.0):
    """Weights several times larger than usual: with tiny ones, attention and heads hardly matter and no mistake shows."""
    model = create_model(small_config(name), seed=seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.mul_(scale)
            else:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def eager_twin(model):
    config = AutoConfig.for_model(model.config.model_type, **{k: v for k, v in model.config.to_dict().items() if k != "model_type"})
    twin = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    twin.load_state_dict(model.state_dict())
    return twin


def packed_inputs(lengths, seed=0, vocabulary=40):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, vocabulary, (sum(lengths),), generator=generator)
    return ids, torch.cat([torch.arange(n) for n in lengths])


def eager_logprobs(model, ids, lengths, temperature):
    logprobs, entropies = [], []
    for sequence in ids.split(lengths):
        log_p = torch.log_softmax(model(input_ids=sequence[None], use_cache=False).logits[0].float() / temperature, -1)
        zero = torch.zeros(1)
        logprobs.append(torch.cat([zero, log_p[:-1].gather(1, sequence[1:, None])[:, 0]]))
        entropies.append(torch.cat([zero, -(log_p.exp() * log_p).sum(-1)[:-1]]))
    return torch.cat(logprobs), torch.cat(entropies)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_equals_eager(name):
    model = small_model(name)
    lengths = [40, 1, 23, 40, 7, 12]
    ids, positions = packed_inputs(lengths)
    logprobs, entropy = packed_logprobs(model, ids, positions, lengths, 0.7)
    with torch.no_grad():
        expected, expected_entropy = eager_logprobs(eager_twin(model), ids, lengths, 0.7)
    assert expected.std() > 0.3, "the test must not be about uniform distributions"
    torch.testing.assert_close(logprobs.detach(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, expected_entropy, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss"])
def test_gradients_equal_eager(name):
    model = small_model(name, scale=2.0)
    twin = eager_twin(model)
    lengths = [30, 1, 17, 30]
    ids, positions = packed_inputs(lengths)
    weight = torch.randn(len(ids), generator=torch.Generator().manual_seed(1))
    (packed_logprobs(model, ids, positions, lengths)[0] * weight).sum().backward()
    (eager_logprobs(twin, ids, lengths, 1.0)[0] * weight).sum().backward()
    for (parameter_name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
        scale = other.grad.norm().clamp(min=1e-3)
        assert (parameter.grad - other.grad).norm() / scale < 1e-4, parameter_name


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1], [300, 200, 130, 129, 3, 3], list(range(1, 60))])
@pytest.mark.parametrize("spec", [{}, {"sliding_window": 4}, {"softcap": 3.0}, {"sinks": True}], ids=str)
def test_packed_attention(lengths, spec):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), heads, d, generator=generator, dtype=torch.float64) for heads, d in ((6, 4), (2, 4), (2, 5)))
    if spec.get("sinks"):
        spec = {"sinks": torch.randn(6, generator=generator, dtype=torch.float64)}
    for x in (q, k, v):
        x.requires_grad_()
    spec = AttentionSpec(0.4, **spec)
    out = PackedContext(lengths).attend(0, q, k, v, spec)

    expected = []
    for q1, k1, v1 in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        n = len(q1)
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)
        if spec.sliding_window:
            hidden |= torch.ones(n, n, dtype=torch.bool).tril(-spec.sliding_window)
        for head in range(6):
            scores = q1[:, head] @ k1[:, head // 3].T * spec.scaling
            if spec.softcap:
                scores = (scores / spec.softcap).tanh() * spec.softcap
            exp = scores.masked_fill(hidden, -torch.inf).exp()
            total = exp.sum(-1, keepdim=True) + (spec.sinks[head].exp() if spec.sinks is not None else 0)
            expected.append((exp / total) @ v1[:, head // 3])
    shaped = torch.cat([torch.stack(expected[i * 6 : i * 6 + 6], 1) for i in range(len(lengths))])
    torch.testing.assert_close(out, shaped)
    g = torch.randn(out.shape, generator=generator, dtype=torch.float64)
    for got, want in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(shaped, (q, k, v), g), strict=True):
        torch.testing.assert_close(got, want)


def test_padding_places_get_no_gradient_of_their_own():
    """A NaN in one sequence stays in that sequence, though others share its dense call."""
    lengths = [9, 8, 7]
    q = torch.randn(24, 2, 4)
    q[3] = float("nan")
    out = PackedContext(lengths).attend(0, q, torch.randn(24, 2, 4), torch.randn(24, 2, 4), AttentionSpec(1.0))
    assert out[9:].isfinite().all()


def test_scored_attention_is_split_when_large(monkeypatch):
    from areal.models import packed

    q = torch.randn(60, 2, 4)
    whole = PackedContext([20] * 3).attend(0, q, q, q, AttentionSpec(1.0, softcap=2.0))
    calls = []
    monkeypatch.setattr(packed, "_SCORES", 2 * 20 * 20)
    monkeypatch.setattr(packed, "_scored_attention", lambda *a: calls.append(1) or _scored_attention(*a))
    split = PackedContext([20] * 3).attend(0, q, q, q, AttentionSpec(1.0, softcap=2.0))
    assert len(calls) == 3
    torch.testing.assert_close(split, whole)


@pytest.mark.parametrize("name", ["qwen2", "gemma2", "gpt_oss", "qwen3_moe"])
def test_shared_prompts_change_nothing(name):
    """Samples of one prompt in any order, a prompt of its own, a sequence without loss tokens, and a prompt that begins another one."""
    model = small_model(name, scale=2.0)
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(3, 40, (n,), generator=generator) for n in (11, 20, 5)]
    prompts.append(prompts[1][:8])
    parts = [(prompts[i], n) for i, n in ((0, 4), (1, 30), (0, 9), (2, 3), (1, 1), (3, 6), (0, 4), (2, 0))]
    sequences = [torch.cat([p, torch.randint(3, 40, (n,), generator=generator)]) for p, n in parts]
    mask = torch.cat([torch.arange(len(p) + n) >= len(p) for p, n in parts])
    lengths = [len(s) for s in sequences]
    ids, positions = torch.cat(sequences), torch.cat([torch.arange(n) for n in lengths])
    cu_seqlens = np.cumsum([0, *lengths]).astype(np.int32)
    shared = find_shared_prompts(ids.numpy(), cu_seqlens, mask.numpy(), torch.device("cpu"))
    assert len(shared.computed) == len(ids) - 11 - 11 - 20
    weight = torch.randn(len(ids), generator=generator)
    results = []
    for sharing in (None, shared):
        model.zero_grad()
        logprobs, entropy = packed_logprobs(model, ids, positions, lengths, 0.9, rows=mask.nonzero()[:, 0], shared=sharing)
        (logprobs * weight).sum().backward()
        results.append((logprobs.detach(), entropy, [p.grad.clone() for p in model.parameters()]))
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=1e-5)
    for plain, got in zip(results[0][2], results[1][2], strict=True):
        assert (got - plain).norm() <= 2e-5 * plain.norm().clamp(min=1e-3)


def test_nothing_shared_is_none():
    ids = np.arange(20)
    assert find_shared_prompts(ids, np.array([0, 10, 20], np.int32), np.tile(np.arange(10) > 4, 2), torch.device("cpu")) is None


def test_rows_and_chunks():
    model = small_model("qwen2")
    lengths = [20, 11, 5]
    ids, positions = packed_inputs(lengths)
    rows = torch.tensor([1, 5, 19, 21, 35])

    def run(**options):
        model.zero_grad()
        logprobs, entropy = packed_logprobs(model, ids, positions, lengths, 1.3, **options)
        logprobs[rows].sum().backward()
        return logprobs.detach(), entropy, [p.grad.clone() for p in model.parameters()]

    whole = run()
    for options in ({"rows": rows}, {"memory_budget": 300}, {"rows": rows, "memory_budget": 1}):
        logprobs, entropy, grads = run(**options)
        torch.testing.assert_close(logprobs[rows], whole[0][rows])
        torch.testing.assert_close(entropy[rows], whole[1][rows])
        if "rows" in options:
            assert logprobs.count_nonzero() == len(rows)
        for grad, expected in zip(grads, whole[2], strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gemma2", "phi", "cohere"])
def test_heads_that_do_more_than_a_product_go_chunk_by_chunk(name):
    model = small_model(name, scale=2.0)
    lengths = [200, 90]
    ids, positions = packed_inputs(lengths)

    def run(memory_budget):
        model.zero_grad()
        logprobs, entropy = packed_logprobs(model, ids, positions, lengths, 1.3, memory_budget=memory_budget)
        logprobs.sum().backward()
        return logprobs.detach(), entropy, {n: p.grad.clone() for n, p in model.named_parameters()}

    whole, cut = run(1 << 30), run(1)
    torch.testing.assert_close(cut[:2], whole[:2])
    for parameter, grad in cut[2].items():
        torch.testing.assert_close(grad, whole[2][parameter], rtol=1e-4, atol=1e-4, msg=parameter)
    with torch.no_grad():
        expected, _ = eager_logprobs(eager_twin(model), ids, lengths, 1.3)
    torch.testing.assert_close(cut[0], expected, rtol=0, atol=2e-5)


def test_no_rows_still_reaches_every_parameter():
    model = small_model("qwen2")
    logprobs, _ = packed_logprobs(model, torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), [1])
    logprobs.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize(
    ("keywords", "sentence"),
    [
        ({"attention_mask": torch.zeros(1, 1, 3, 3)}, "Linear built an attention mask; attention 'areal' takes none"),
        ({"dropout": 0.1}, "attention dropout 0.1 is not supported; set attention_dropout to 0"),
        ({"position_bias": None}, "Linear passes the attention keyword 'position_bias', which attention 'areal' does not know"),
        ({"attention_context": None}, "needs the keyword attention_context"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_what_attention_would_leave_out_is_refused(keywords, sentence):
    module, q = torch.nn.Linear(1, 1), torch.zeros(1, 2, 3, 4)
    module.layer_idx = 0
    known = {"attention_mask": None, "attention_context": PackedContext([3]), "position_ids": None}
    assert areal_attention(module, q, q, q, **known)[0].shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=sentence):
        areal_attention(module, q, q, q, **{**known, **keywords})


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt_oss"])
def test_rotary_frequencies_are_not_rounded_with_the_weights(name, tmp_path):
    model = small_model(name)
    model.save_pretrained(tmp_path)
    exact = {n: b for n, b in model.named_buffers() if n.endswith("inv_freq")}
    assert exact and not any(torch.equal(b, b.bfloat16().float()) for b in exact.values())
    for loaded in (load_model(tmp_path, dtype=torch.bfloat16), empty_model(tmp_path, dtype=torch.bfloat16)):
        assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
        assert all(torch.equal(dict(loaded.named_buffers())[n], b) for n, b in exact.items())


@pytest.mark.parametrize("name", ["qwen2", "qwen3_moe", "gpt_oss"])
def test_save_round_trip(name, tmp_path):
    model = small_model(name)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    save_model(meta_template(model, torch.float32), weights, tmp_path)
    ids, positions = packed_inputs([12])
    again = load_model(tmp_path, dtype=torch.float32)
    assert dict(again.named_parameters()).keys() == weights.keys()
    assert torch.equal(packed_logprobs(again, ids, positions, [12])[0], packed_logprobs(model, ids, positions, [12])[0])
