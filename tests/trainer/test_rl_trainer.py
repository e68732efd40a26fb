"""The step of every recipe: which roles exist, what each setting moves, and the two ways to hold the loop."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import tiny_transformer
from tests.training import engine_of, toy_trainer, weights
from verl.algorithms.advantages import ADVANTAGES
from verl.config import RECIPES, make_trainer_config
from verl.data.buffer import SharedMemoryBuffer
from verl.trainer.ppo import PPOTrainer
from verl.trainer.rl_trainer import Trainer
from verl.utils.rollout import BaseRolloutWorker

QUESTIONS = ["abc=", "bad=", "cab=", "dab=", "fed=", "egg=", "had=", "gab="]


def columns_of(trainer, data):
    """The columns that the roles add to collected rows."""
    before = set(data.rows.names)
    trainer.roles.write_columns(data.rows)
    return set(data.rows.names) - before


@pytest.mark.parametrize(
    ("recipe", "overrides", "written"),
    [
        ("ppo", [], {"values", "ref_logprobs"}),
        ("ppo", ["algorithm.kl.where=off", "algorithm.correction=recompute"], {"values", "trainer_logprobs"}),
        ("grpo", [], {"ref_logprobs"}),
        ("grpo", ["algorithm.correction=token_tis"], {"ref_logprobs", "trainer_logprobs"}),
        ("dapo", [], set()),
    ],
)
def test_a_role_exists_if_and_only_if_its_column_is_read(recipe, overrides, written, letters, tmp_path):
    trainer = toy_trainer(recipe, letters, tmp_path, *overrides)
    assert (trainer.groups.critic is not None) == ("values" in written) == ("critic" in trainer.models.saves)
    assert (trainer.groups.reference is not None) == ("ref_logprobs" in written)
    assert columns_of(trainer, trainer.collect_data(trainer.loader.take(4))) == written


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in ("quickstart", "distillation")])
def test_a_step_learns_and_its_metrics_are_finite(recipe, letters, tmp_path):
    trainer = toy_trainer(recipe, letters, tmp_path)
    before = weights(engine_of(trainer))
    metrics = trainer.step()
    assert trainer.version == trainer.rollout.version == 1
    # Means over the rows that are left, where those without an advantage are not computed.
    part = "learned/" if trainer.config.algorithm.skip_zero_advantages else ""
    of_rows = {f"{part}entropy", f"{part}kl_sampler"}
    assert {"reward", "loss", "grad_norm", "response_tokens", "failed_share"} | of_rows <= metrics.keys()
    assert [name for name, value in metrics.items() if not math.isfinite(value)] == []
    assert metrics["skipped_updates"] == 0
    assert not torch.equal(weights(engine_of(trainer)), before)
    assert ("critic/loss" in metrics) == (recipe in ("ppo", "vapo", "prime"))
    assert ("explained_variance" in metrics) == (recipe in ("ppo", "vapo"))


def test_a_policy_comes_nearer_to_its_teacher_without_any_reward(letters, tmp_path):
    teacher = tmp_path / "teacher"
    tiny_transformer(
        seed=3, vocab_size=AutoModelForCausalLM.from_pretrained(letters).config.vocab_size
    ).save_pretrained(teacher)
    trainer = toy_trainer(
        "distillation",
        letters,
        tmp_path,
        f"teacher.path={teacher}",
        "rewards.functions=[]",
        "policy.optimizer.lr=3e-3",
    )
    history = [trainer.step() for _ in range(20)]
    assert trainer.rewards is None and "reward" not in history[0]
    assert history[-1]["kl_teacher"] < 0.7 * history[0]["kl_teacher"]


def test_the_teachers_most_likely_tokens_are_kept_only_if_they_are_read_and_within_the_vocabulary(
    letters, tmp_path
):
    trainer = toy_trainer("distillation", letters, tmp_path)
    assert columns_of(trainer, trainer.collect_data(trainer.loader.take(2))) == {"teacher_logprobs"}
    top = "algorithm.policy_loss=forward_kl_topk"
    trainer = toy_trainer("distillation", letters, tmp_path, top, "teacher.top_k=3")
    assert columns_of(trainer, trainer.collect_data(trainer.loader.take(2))) == {
        "teacher_logprobs",
        "teacher_top_logprobs",
        "teacher_top_ids",
    }
    with pytest.raises(
        ValueError, match=r"need teacher.top_k within the vocabulary of \d+ tokens, got 999; lower it"
    ):
        toy_trainer("distillation", letters, tmp_path, top, "teacher.top_k=999")


@pytest.mark.parametrize(
    "setting",
    [
        "likelihood_coef=0.1",
        "length_penalty=kimi_length",
        "overlong_buffer_tokens=3",
        "dynamic_sampling=true",
    ],
)
def test_what_acts_on_rewards_needs_a_reward_before_the_first_step(setting, letters, tmp_path):
    with pytest.raises(ValueError, match="need at least one reward function, got none"):
        toy_trainer("distillation", letters, tmp_path, "rewards.functions=[]", f"algorithm.{setting}")


@pytest.mark.parametrize(
    ("penalty", "message"),
    [
        ("{name: kimi_length, weight: -1.0}", "kimi_length: need weight >= 0, got -1.0"),
        ("kimi_lenght", "did you mean 'kimi_length'"),
        ("{weight: 0.5}", "off takes no options, got weight; name one of kimi_length, relative_length"),
        (f"{__name__}:by_text", "reads 'text', which is no column; the columns are num_tokens, rewards"),
    ],
)
def test_a_wrong_length_penalty_is_found_at_the_start(penalty, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy_trainer("grpo", letters, tmp_path, f"algorithm.length_penalty={penalty}")


def by_text(text):
    return text


@pytest.mark.parametrize(
    ("recipe", "role"),
    [
        ("distillation", "teacher.path"),
        ("grpo", "reference"),
        ("prime", "critic.path"),
        ("ppo", "critic.path"),
    ],
)
def test_a_second_model_whose_family_cannot_be_run_by_rows_is_refused(recipe, role, letters, tmp_path):
    size = AutoModelForCausalLM.from_pretrained(letters).config.vocab_size
    tiny_transformer("bloom", vocab_size=size).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ValueError, match="model family 'bloom' cannot be run by rows"):
        toy_trainer(recipe, letters, tmp_path, f"{role}={tmp_path / 'bloom'}")


def test_a_critic_from_the_policys_own_model_does_not_share_its_weights(letters, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(letters)
    trainer = toy_trainer("prime", letters, tmp_path, actor_model=model, critic_model=model)
    assert engine_of(trainer).model.transformer is model
    assert not {p.data_ptr() for p in model.parameters()} & {
        p.data_ptr() for p in engine_of(trainer, "critic").model.parameters()
    }


def test_a_made_up_advantage_is_one_function_and_one_row(letters, tmp_path, monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "best_only", best_only)
    for name in ("best_only", f"{__name__}:best_only"):
        trainer = toy_trainer(
            "grpo", letters, tmp_path, f"algorithm.advantage={{name: '{name}', share: 0.5}}"
        )
        assert trainer.step()["grad_norm"] > 0
    with pytest.raises(
        ValueError, match="best_only takes the options share.*got 'shar'; did you mean 'share'"
    ):
        toy_trainer("grpo", letters, tmp_path, "algorithm.advantage={name: best_only, shar: 0.5}")
    with pytest.raises(ValueError, match="got 'best_onyl'; did you mean 'best_only'"):
        toy_trainer("grpo", letters, tmp_path, "algorithm.advantage=best_onyl")


def best_only(rewards, group_ids, *, share: float = 1.0):
    """An advantage that nobody has published."""
    best = torch.stack([rewards[group_ids == group].max() for group in group_ids])
    return share * (rewards == best).to(rewards.dtype)


@pytest.mark.parametrize("family", ["mistral", "gemma2", "mixtral"])
def test_a_model_whose_limit_is_not_known_trains_all_the_same(family, letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "steps=1", actor_model=tiny_transformer(family))
    (metrics,) = trainer.fit()
    assert "limit_share" not in metrics
    assert metrics["skipped_updates"] == 0


def test_without_a_kl_no_coefficient_is_shown_and_without_siblings_no_dead_groups(letters, tmp_path):
    assert "kl_coef" not in toy_trainer("dapo", letters, tmp_path).step()
    assert "dead_groups_share" not in toy_trainer("ppo", letters, tmp_path).step()
    assert {"kl_coef", "dead_groups_share"} <= toy_trainer("grpo", letters, tmp_path).step().keys()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_embedded_sampler_and_the_trainer_are_one_policy(precision, letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, f"policy.precision={precision}")
    for _ in range(3):
        assert trainer.step()["kl_sampler"] < {"fp32": 1e-9, "bf16": 1e-4}[precision]


@pytest.mark.parametrize(("recipe", "updates"), [("grpo", 2 * 1), ("ppo", 2 * 4)])
def test_a_step_makes_epochs_times_minibatches_updates(recipe, updates, letters, tmp_path):
    trainer = toy_trainer(recipe, letters, tmp_path, "algorithm.epochs=2")
    trainer.step()
    for role in trainer.models.saves:
        assert {float(state["step"]) for state in engine_of(trainer, role)._optimizer.state.values()} == {
            float(updates)
        }


def test_two_trainers_of_one_seed_take_the_same_way_and_of_another_seed_not(letters, tmp_path):
    runs = [
        toy_trainer("grpo", letters, tmp_path / str(i), f"seed={seed}") for i, seed in enumerate((0, 0, 1))
    ]
    rewards = [[trainer.step()["reward"] for _ in range(3)] for trainer in runs]
    assert rewards[0] == rewards[1] != rewards[2]
    assert torch.equal(weights(engine_of(runs[0])), weights(engine_of(runs[1])))


def test_a_policy_that_cannot_move_has_no_kl_and_one_that_moves_has_some(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "policy.optimizer.lr=0.01")
    kls = [trainer.step()["kl"] for _ in range(3)]
    assert kls[0] == pytest.approx(0, abs=1e-8)
    assert kls[2] > 1e-4


def test_kl_in_the_loss_pulls_the_policy_back(letters, tmp_path):
    def final_kl(coef):
        settings = ["seed=1", "policy.optimizer.lr=0.01", f"algorithm.kl.coef={coef}"]
        trainer = toy_trainer("grpo", letters, tmp_path / str(coef), *settings)
        return [trainer.step()["kl"] for _ in range(6)][-1]

    assert final_kl(10) < final_kl(0) / 3


def test_kl_in_the_reward_is_taken_from_what_the_critic_learns(letters, tmp_path):
    # With lam 1 the first return is the sum of all that is paid for the answer.
    settings = ["algorithm.kl.coef=2.0", "algorithm.advantage.lam=1.0", "policy.optimizer.lr=0.01"]
    trainer = toy_trainer("ppo", letters, tmp_path, *settings)
    trainer.step()
    data = trainer.collect_data(trainer.loader.take(8))
    metrics = trainer.update_policy(data)
    kl = (data.rows["old_logprobs"] - data.rows["ref_logprobs"]).sum(1)
    assert kl.abs().min() > 1e-3
    torch.testing.assert_close(
        data.rows["returns"][:, 0], data.rows["rewards"] - 2 * kl, rtol=1e-4, atol=1e-4
    )
    assert metrics["kl"] == pytest.approx(float(kl.sum() / data.rows["mask"].sum()), rel=1e-4)


def test_the_kl_coefficient_follows_its_schedule(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "algorithm.kl.coef={start: 0.4, end: 0.0, steps: 4}")
    assert [trainer.step()["kl_coef"] for _ in range(6)] == pytest.approx([0.4, 0.3, 0.2, 0.1, 0.0, 0.0])


def test_the_adaptive_kl_coefficient_falls_below_its_target_and_rises_above(letters, tmp_path):
    trainer = toy_trainer(
        "grpo", letters, tmp_path, "algorithm.kl.coef={initial: 0.5, target: 0.1, horizon: 160}"
    )
    assert trainer.step()["kl_coef"] == 0.5
    low = trainer.kl.coef
    assert low == pytest.approx(0.5 * (1 - 0.2 * 16 / 160))  # no KL yet: the largest step down
    assert trainer.kl.update({"kl": 0.11}, version=1, num_trajectories=16) == {"kl_coef": low}
    assert trainer.kl.coef == pytest.approx(low * (1 + 0.1 * 16 / 160))


def test_in_the_critics_warm_up_the_policy_stays(letters, tmp_path):
    trainer = toy_trainer("ppo", letters, tmp_path, "critic.warmup_steps=2")
    before = weights(engine_of(trainer))
    early = [trainer.step() for _ in range(2)]
    assert torch.equal(weights(engine_of(trainer)), before)
    assert all("critic/loss" in metrics and "loss" not in metrics for metrics in early)
    assert "loss" in trainer.step()
    assert not torch.equal(weights(engine_of(trainer)), before)


@pytest.mark.parametrize("recipe", ["grpo", "ppo"])
def test_a_policy_learns_to_earn(recipe, letters, tmp_path):
    def share_of_a(prompt, response):
        return response.count("a") / 9

    settings = ["policy.optimizer.lr=0.01", "sampling.max_tokens=8"]
    size = ["prompts_per_step=8"] if recipe == "grpo" else ["prompts_per_step=32"]
    trainer = toy_trainer(recipe, letters, tmp_path, *settings, *size, reward_fn=share_of_a)
    rewards = [trainer.step()["score/share_of_a"] for _ in range(15)]
    assert rewards[-1] > 2 * rewards[0]


def test_the_loop_may_be_the_users(letters, tmp_path):
    config = make_trainer_config("ppo", rollouts_per_device=8, max_tokens=6, device="cpu")
    actor, critic = (AutoModelForCausalLM.from_pretrained(letters) for _ in range(2))
    trainer = Trainer(
        config, actor_model=actor, critic_model=critic, reward_fn=lambda prompt, response: len(response)
    )
    data = trainer.collect_data(QUESTIONS)
    assert [t.reward for t in data.trajectories] == [len(t.text) for t in data.trajectories]
    metrics = trainer.update_policy(data)
    assert metrics["reward"] == pytest.approx(sum(len(t.text) for t in data.trajectories) / 8)
    assert all(map(math.isfinite, metrics.values()))


class Echo(BaseRolloutWorker):
    """Answers with the prompt's letters."""

    def generate(self, prompts, max_tokens=128):
        return [prompt.rstrip("=")[:max_tokens] for prompt in prompts]


class AsyncEcho(BaseRolloutWorker):
    """The same as a coroutine."""

    async def generate(self, prompts, max_tokens=128):
        return [prompt.rstrip("=")[:max_tokens] for prompt in prompts]


@pytest.mark.parametrize("worker", [Echo, AsyncEcho])
def test_a_worker_that_answers_in_text_trains_the_policy(worker, letters, tmp_path):
    recompute = "algorithm.correction=recompute"
    trainer = toy_trainer("ppo", letters, tmp_path, recompute, "policy.optimizer.lr=0.01", rollout=worker())
    first, *_, last = [trainer.step() for _ in range(4)]
    assert first["reward"] == 1
    assert "kl_sampler" not in first
    assert first["response_tokens"] == 4  # three letters and the end
    assert all(map(math.isfinite, last.values()))


def test_a_worker_that_answers_in_text_cannot_bypass_the_trainers_logprobs(letters, tmp_path):
    with pytest.raises(
        ValueError,
        match="gives no logprobs, but .* reads rollout_logprobs; set algorithm.correction=recompute",
    ):
        toy_trainer("ppo", letters, tmp_path, rollout=Echo())


def test_a_worker_that_answers_in_text_has_no_greedy_answers(letters, tmp_path):
    with pytest.raises(ValueError, match="is not told a temperature, so it has no greedy answers"):
        toy_trainer("remax", letters, tmp_path, "algorithm.correction=recompute", rollout=Echo())


def test_records_of_text_train_through_the_buffer(letters):
    buffer = SharedMemoryBuffer(capacity=100)
    trainer = PPOTrainer(model_name=str(letters), lr=0.01, kl_coef=0.1, clip_range=0.2)
    before = weights(engine_of(trainer.trainer))
    for prompt, response, reward in (("abc=", "abc", 1.0), ("bad=", "dab", 0.5), ("cab=", "", 0.0)):
        buffer.push({"prompt": prompt, "response": response, "reward": reward})
    metrics = trainer.update(buffer.sample(batch_size=3))
    assert metrics["reward"] == pytest.approx(0.5)
    assert all(map(math.isfinite, metrics.values()))
    assert not torch.equal(weights(engine_of(trainer.trainer)), before)
    assert (
        trainer.update([{"prompt": [{"role": "user", "content": "abc"}], "response": "abc", "reward": 1}])[
            "reward"
        ]
        == 1
    )


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([], "need at least one record"),
        ([{"prompt": "abc=", "reward": 1.0}], "record 0 has no response"),
        (
            [{"prompt": "abc=", "response": "a", "reward": math.nan}],
            "need a finite reward in each record, got nan in record 0",
        ),
    ],
)
def test_records_that_cannot_be_learned_from_are_refused(records, message, letters):
    with pytest.raises(ValueError, match=message):
        PPOTrainer(model_name=str(letters)).update(records)


def test_the_text_trainer_takes_further_settings_and_saves_its_model(letters, tmp_path):
    trainer = PPOTrainer(model_name=str(letters), kl_coef=0, seed=3, overrides=["algorithm.minibatches=2"])
    assert (
        trainer.trainer.groups.reference,
        trainer.trainer.config.seed,
        trainer.trainer.config.algorithm.minibatches,
    ) == (None, 3, 2)
    trainer.save_model(tmp_path / "model")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").config.hidden_size == 32


def test_an_engine_that_is_not_known_is_refused_at_the_start(letters, tmp_path):
    with pytest.raises(
        ValueError,
        match="need rollout.engine as one of embedded, vllm, sglang, served, http, or .* got 'vlm'",
    ):
        toy_trainer("grpo", letters, tmp_path, "rollout.engine=vlm")
    with pytest.raises(ValueError, match="cannot load rollout.engine no.module:Engine"):
        toy_trainer("grpo", letters, tmp_path, "rollout={engine: 'no.module:Engine', servers: 1}")


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is in this environment")
def test_an_engine_that_is_not_installed_is_refused_at_the_start(letters, tmp_path):
    with pytest.raises(
        ValueError, match="need vllm in this environment, or rollout.servers and rollout.python of another"
    ):
        toy_trainer("grpo", letters, tmp_path, use_vllm=True)


def test_models_may_be_given_as_folders(letters, tmp_path):
    given = {"actor_model": str(letters), "critic_model": str(letters)}
    overrides = ("policy.path=null", "rewards.functions=[]")
    trainer = toy_trainer(
        "ppo", letters, tmp_path, *overrides, reward_fn=lambda prompt, response: len(response), **given
    )
    data = trainer.collect_data(["abc=", "bca="] * 4)
    assert torch.isfinite(torch.tensor(trainer.update_policy(data)["loss"]))


def test_pairs_meet_in_one_update_also_where_answers_failed(letters, tmp_path):
    failed = []

    def some_fail(prompt, response):
        if prompt == "aac=" and not failed:
            failed.append(prompt)
            raise ValueError("no judgement")
        return sum(map(ord, response))

    overrides = [
        "rewards.functions=[]",
        "algorithm.minibatches=2",
        "pipeline.retries.reward=0",
        "data.shuffle=false",
    ]
    trainer = toy_trainer("online_dpo", letters, tmp_path, *overrides, reward_fn=some_fail)
    metrics = trainer.step()
    assert metrics["outcome/reward_error"] == 1 and len(trainer.last) == 15
    assert metrics["pair_share"] > 0.9  # the last pairs but for ties


def test_records_of_text_cannot_be_shaped_where_nothing_is_sampled(letters):
    with pytest.raises(ValueError, match="need records that are learned from as they are"):
        PPOTrainer(str(letters), max_tokens=6, overrides=["algorithm.mask_truncated=true"])


def test_a_reward_that_needs_a_column_that_no_prompt_has_is_refused_before_the_first_step(letters, tmp_path):
    def by_level(prompt, response, level):
        return level

    with pytest.raises(
        ValueError,
        match="'by_level': need a column of the data for the parameter level, got the columns answer;",
    ):
        toy_trainer("grpo", letters, tmp_path, reward_fn=by_level)
