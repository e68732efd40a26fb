"""Tests of the policy and value models: logprobs and gradients in every form, what is accepted, saving and
restoring.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.tiny import FAMILIES, model_input, random_prompts, shared_policy, tiny_policy, tiny_transformer
from verl.data.batch import ModelInput
from verl.engines.hf import attention
from verl.engines.hf.attention import attention_forward, use_attention
from verl.engines.hf.models import Backbone, PolicyModel
from verl.engines.hf.pretrained import load_language_model, make_tiny_model, save_model, value_model
from verl.engines.hf.row_layouts import AttentionSpan, RowLayout, use_layout
from verl.rollout.vllm.options import check_context
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import CHARACTERS, TextCodec

PROMPTS = random_prompts([3, 9, 1, 6])
RESPONSES = random_prompts([8, 2, 13, 5], seed=1)
WEIGHTS = torch.linspace(-1, 2, sum(map(len, RESPONSES)))  # no two tokens count alike in the losses below
ROW_WEIGHTS = WEIGHTS.split([len(r) for r in RESPONSES])
FORMS = [model_input(PROMPTS, RESPONSES), model_input(PROMPTS, RESPONSES, packed=False)]


def logprobs_and_entropies(policy: PolicyModel, inputs: ModelInput, **options: Any) -> tuple[Tensor, Tensor]:
    with policy.forward_mode():
        return policy.token_logprobs(inputs, **{"temperature": 1.0, "chunk": 1000, **options})


def gradient(model: Backbone) -> Tensor:
    """All gradients in one line; clears them."""
    flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return flat


def loss_gradient(policy: PolicyModel, inputs: ModelInput, **options: Any) -> Tensor:
    """Gradient of a loss over logprobs, and entropies that have a gradient.

    Backward runs outside `forward_mode`, as in training.
    """
    logprobs, entropies = logprobs_and_entropies(policy, inputs, **options)
    (logprobs * WEIGHTS + entropies * WEIGHTS.flip(0)).sum().backward()
    return gradient(policy)


def assert_same_gradient(ours: Tensor, expected: Tensor, rtol: float = 1e-6) -> None:
    assert expected.norm() > 1
    assert (ours - expected).norm() <= rtol * expected.norm()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("inputs", FORMS, ids=["packed", "padded"])
def test_logprobs_and_entropies_are_those_of_the_models_own_logits(inputs, temperature):
    policy = shared_policy("qwen3")
    logprobs, entropies = logprobs_and_entropies(policy, inputs, temperature=temperature)
    expected = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        logits = policy.transformer(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        expected.append(torch.distributions.Categorical(logits=logits / temperature))
    own = torch.cat([d.log_prob(torch.tensor(r)) for d, r in zip(expected, RESPONSES, strict=True)])
    torch.testing.assert_close(logprobs, own, atol=1e-5, rtol=0)
    torch.testing.assert_close(entropies, torch.cat([d.entropy() for d in expected]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("family", ["qwen2", "mistral", "gemma2", "deepseek_v3"])
def test_packed_and_padded_rows_have_the_gradient_of_the_rows_one_by_one(family, recompute):
    policy = tiny_policy(family)
    for prompt, response, weights in zip(PROMPTS, RESPONSES, ROW_WEIGHTS, strict=True):
        (logprobs_and_entropies(policy, model_input([prompt], [response]))[0] * weights).sum().backward()
    expected = gradient(policy)
    if recompute:
        policy.enable_gradient_checkpointing()
        policy.train()
    for inputs in FORMS:
        assert_same_gradient(loss_gradient(policy, inputs), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_gradient_is_that_of_the_models_own_forward(family):
    policy = tiny_policy(family)
    for prompt, response, weights in zip(PROMPTS, RESPONSES, ROW_WEIGHTS, strict=True):
        with use_attention(policy.transformer, "eager"):
            logits = policy.transformer(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
        own = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        (own * weights).sum().backward()
    expected = gradient(policy)
    assert_same_gradient(loss_gradient(policy, FORMS[0]), expected, rtol=1e-5)


@pytest.mark.parametrize("entropy_grad", [False, True])
def test_logits_in_chunks_give_the_same_values_and_gradient(entropy_grad):
    policy = tiny_policy("gemma2")
    whole = logprobs_and_entropies(policy, FORMS[0], temperature=0.8)
    expected = loss_gradient(policy, FORMS[0], temperature=0.8, entropy_grad=entropy_grad)
    for chunk in (1, 5, 27, 28):
        parts = logprobs_and_entropies(policy, FORMS[0], temperature=0.8, chunk=chunk)
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-6)
        assert_same_gradient(
            loss_gradient(policy, FORMS[0], temperature=0.8, chunk=chunk, entropy_grad=entropy_grad), expected
        )


def test_entropies_have_a_gradient_only_if_asked():
    policy = tiny_policy()
    assert not logprobs_and_entropies(policy, FORMS[0])[1].requires_grad
    logprobs_and_entropies(policy, FORMS[0], entropy_grad=True)[1].sum().backward()
    assert gradient(policy).norm() > 1


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.03), ("fp16", 0.004)])
def test_a_lower_precision_computes_close_to_fp32_and_leaves_the_weights(precision, error):
    policy = tiny_policy("qwen3", precision)
    difference = (
        logprobs_and_entropies(policy, FORMS[0])[0]
        - logprobs_and_entropies(shared_policy("qwen3"), FORMS[0])[0]
    ).abs()
    assert 1e-5 < difference.mean() < error
    assert logprobs_and_entropies(policy, FORMS[0])[0].dtype == torch.float32
    assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert loss_gradient(policy, FORMS[0]).isfinite().all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_check_accepts_families_that_attend_through_the_interface(family):
    shared_policy(family).check_forward()


@pytest.mark.parametrize(
    ("family", "sizes", "why"),
    [
        ("bloom", {}, "logits differ .*its attention does not use"),
        ("falcon", {}, "TypeError"),  # its code breaks without its own mask
        ("rwkv", {"attention_hidden_size": 32}, "logits differ"),  # a state runs on from row to row
        ("diffllama", {}, "logits differ by .* in decoding"),
        # Longer than the rows that are compared:
        ("phimoe", {"num_local_experts": 4, "sliding_window": 64}, "logits differ"),
        ("llama4_text", {"floor_scale": 8192, "no_rope_layers": [1, 0]}, "temperature depends on the place"),
    ],
)
def test_the_check_rejects_families_that_do_not(family, sizes, why):
    policy = PolicyModel(tiny_transformer(family, **sizes), "fp32")
    with pytest.raises(ValueError, match=f"family '{family}' cannot be run by rows: .*{why}.*; use a family"):
        policy.check_forward()


def test_dropout_is_off_even_in_training():
    policy = tiny_policy("gpt2", n_embd=32, n_head=4, n_layer=2)
    policy.train()
    assert policy.transformer.config.resid_pdrop == policy.transformer.config.attn_pdrop == 0
    torch.testing.assert_close(
        logprobs_and_entropies(policy, FORMS[0]), logprobs_and_entropies(policy, FORMS[0]), atol=0, rtol=0
    )


@pytest.mark.parametrize("window", [64, 3])
def test_the_check_compares_windows_that_are_longer_than_its_rows(window, monkeypatch):
    policy = tiny_policy("mistral", sliding_window=window)
    policy.check_forward()
    assert policy.transformer.config.sliding_window == window
    monkeypatch.setattr(attention, "span_of", lambda module, layer, window: AttentionSpan(None))
    with pytest.raises(ValueError, match="logits differ"):
        policy.check_forward()


def test_no_noise_of_training_mode_is_left_when_activations_are_recomputed():
    policy = tiny_policy("mixtral", num_local_experts=4, router_jitter_noise=0.5)
    expected = loss_gradient(policy, FORMS[0])
    policy.enable_gradient_checkpointing()
    policy.train()
    assert policy.training
    assert_same_gradient(loss_gradient(policy, FORMS[0]), expected)
    opt = tiny_policy("opt", ffn_dim=64, word_embed_proj_dim=32, dropout=0.5, layerdrop=0.5)
    expected = loss_gradient(opt, FORMS[0])
    opt.enable_gradient_checkpointing()
    opt.train()
    assert_same_gradient(loss_gradient(opt, FORMS[0]), expected)


def test_a_rope_that_depends_on_the_length_of_the_sequence_bounds_the_rows():
    factors = [1.0, 1.5, 2.0, 2.5]
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "short_factor": factors,
        "long_factor": [2 * factor for factor in factors],
    }
    policy = tiny_policy("phi3", rope_parameters=rope, original_max_position_embeddings=64)
    policy.check_forward()
    assert (policy.context, tiny_policy("phi3").context) == (64, 256)
    check_context(policy.transformer.config, {"max_model_len": 64})
    check_context(tiny_transformer("phi3").config, {})
    with pytest.raises(ValueError, match="need .*max_model_len of at most 64 .*, got 256"):
        check_context(policy.transformer.config, {})


def test_a_mask_or_an_option_that_rows_do_not_have_is_refused():
    query = torch.zeros(1, 2, 3, 4)
    with use_layout(RowLayout([3], True, query.device)):
        for options in ({"attention_mask": torch.zeros(3, 3)}, {"position_bias": torch.zeros(3, 3)}):
            with pytest.raises(ValueError, match="its attention has (a mask of its own|position_bias)"):
                attention_forward(torch.nn.Module(), query, query, query, **options)


def test_values_start_at_zero_with_one_per_response_token():
    critic = value_model(tiny_transformer(), "bf16")
    with critic.forward_mode():
        values = critic.token_values(FORMS[0])
    assert values.dtype == torch.float32
    assert torch.equal(values, torch.zeros(len(WEIGHTS)))
    values.sum().backward()
    assert critic.head.weight.grad is not None and critic.head.weight.grad.norm() > 0


def test_a_value_is_of_the_state_before_its_token():
    critic = value_model(tiny_transformer(), "fp32")
    torch.nn.init.normal_(critic.head.weight)
    row = PROMPTS[0] + RESPONSES[0]
    with critic.forward_mode():
        values = [critic.token_values(inputs)[: len(RESPONSES[0])] for inputs in FORMS]
    states = critic.transformer(torch.tensor([row])).last_hidden_state[0, len(PROMPTS[0]) - 1 : -1]
    for ours in values:
        torch.testing.assert_close(ours, critic.head(states).squeeze(1), atol=1e-5, rtol=0)


def test_a_saved_model_is_an_ordinary_one_for_transformers(tmp_path):
    policy = tiny_policy("gemma2")
    save_model(policy, tmp_path)
    loaded = load_language_model(str(tmp_path))
    assert loaded.dtype == torch.float32 and loaded.config._attn_implementation != "verl_rows"
    assert torch.equal(loaded.get_input_embeddings().weight, policy.transformer.get_input_embeddings().weight)


def test_a_path_without_a_model_is_named():
    with pytest.raises(ValueError, match="cannot load a causal language model from '/nowhere'"):
        load_language_model("/nowhere")


def test_a_tiny_model_is_seeded_and_leaves_the_random_state(tmp_path):
    state = torch.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        make_tiny_model(tmp_path / name, hidden=32, seed=seed)
    assert torch.equal(torch.get_rng_state(), state)
    a, b, c = (load_language_model(str(tmp_path / name)).get_input_embeddings().weight for name in "abc")
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_a_tiny_model_reads_and_writes_every_character(tmp_path):
    make_tiny_model(tmp_path, hidden=32)
    codec = TextCodec.load(str(tmp_path))
    assert codec.decode(codec.encode_prompt(Prompt(CHARACTERS))) == CHARACTERS
    assert codec.stop_ids == (1,)


@pytest.mark.parametrize(("hidden", "layers"), [(48, 2), (0, 2), (32, 0)])
def test_a_tiny_model_of_an_impossible_size_is_an_error(hidden, layers, tmp_path):
    with pytest.raises(ValueError, match="need hidden as a multiple of 32 and at least one layer"):
        make_tiny_model(tmp_path, hidden=hidden, layers=layers)
