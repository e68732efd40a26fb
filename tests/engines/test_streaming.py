"""A step in portions equals the step over all rows in weights, metrics and skips, or is refused."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.tiny import tiny_transformer
from tests.training import learn, local_engine, one_update, rows_to_learn, weights
from verl.algorithms.advantages import ADVANTAGES
from verl.algorithms.aggregations import AGGREGATIONS
from verl.algorithms.correction import CORRECTIONS
from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.algorithm import AlgorithmConfig, KLConfig
from verl.config.fields import Choice
from verl.config.roles import CriticConfig, OptimizerConfig
from verl.controller.worker_group import LocalPool
from verl.data.batch import Batch
from verl.data.packing import BatchPlan, balance
from verl.engines.base import NotFiniteError, TrainEngine
from verl.engines.hf.pretrained import value_model
from verl.engines.local import LocalEngine
from verl.engines.roles.critic import CriticWorker
from verl.engines.roles.policy import PolicyWorker
from verl.engines.roles.process_reward import ProcessRewardWorker
from verl.engines.roles.role_columns import MODEL_COLUMNS, critic_reads, policy_reads
from verl.engines.streaming import StreamedBatch, StreamedUpdate, concat_portions, streaming_obstacle

NEAR = ("loss", "grad_norm", "lr", "ratio", "entropy", "kl", "skipped_updates")
CPU = torch.device("cpu")
# Of twelve rows.
GROUPS = torch.tensor([0, 1, 0, 1, 2, 2, 3, 4, 3, 4, 5, 5])
KL_IN_LOSS = KLConfig(where="loss", estimator=Choice(name="k3"), coef=0.1)
KL_IN_REWARD = KLConfig(where="reward", estimator=Choice(name="k1"), coef=0.1)
GAE = Choice(name="gae", whiten=False)
DR_GRPO = {
    "advantage": Choice(name="grpo", normalize_std=False),
    "aggregation": Choice(name="seq_mean_token_sum_norm", length=7),
}
GSPO = {
    "policy_loss": Choice(name="gspo", clip_low=0.1, clip_high=0.1),
    "aggregation": Choice(name="seq_mean_token_mean"),
}
PRIME = {"advantage": Choice(name="prime"), "value_loss": Choice(name="outcome_cross_entropy")}
CASES = {
    "ppo": {"advantage": GAE},
    "ppo, kl in reward": {"advantage": GAE, "kl": KL_IN_REWARD, "entropy_coef": 0.01},
    "ppo, recomputed": {"advantage": GAE, "correction": Choice(name="token_tis")},
    "prime": PRIME,
    "dr. grpo": DR_GRPO,
    "gspo": GSPO,
    "gspo, kl": {**GSPO, "kl": KL_IN_LOSS},
    **{
        f"grpo, {name}": {
            "aggregation": Choice(name=name, **({"length": 7} if name.endswith("norm") else {})),
            "kl": KL_IN_LOSS,
        }
        for name in AGGREGATIONS
    },
}


def rows_of_six_prompts() -> Batch:
    """Two rows of each prompt, with all columns; two prompts have an answer without an advantage."""
    batch = Batch.concat([rows_to_learn(), rows_to_learn()])
    batch.write("group_ids", GROUPS)
    batch.write("rewards", torch.tensor([1.0, 0.0, 0.5, 1.0, 0.5, 0.25, 0.0, 3.0, 0.0, 1.0, -1.0, 0.5]))
    return batch


def roles(config, *, epochs=1, **settings):
    """The trained roles of the algorithm: the policy, and a critic or process reward model if any."""
    # The bias of the keys has no gradient but rounding errors; with the usual eps Adam would take them for a
    # direction.
    optimizer = {"lr": 1e-2, "eps": 1e-4, "max_grad_norm": 0.5}
    algorithm, engine = (
        Algorithm.bind(AlgorithmConfig(**config)),
        partial(local_engine, optimizer=optimizer, **settings),
    )
    learners = {"policy": PolicyWorker(engine(), algorithm, temperature=1.0, epochs=epochs, chunk=100)}
    if "values" in algorithm.reads:
        role = CriticConfig(optimizer=OptimizerConfig(**optimizer))
        critic = LocalEngine(value_model(tiny_transformer(), "fp32"), role, device=CPU, total_updates=10)
        learners["critic"] = CriticWorker(critic, algorithm, vf_coef=0.5, epochs=epochs)
    if "prm_logprobs" in algorithm.reads:
        learners["critic"] = ProcessRewardWorker(
            engine(), algorithm, temperature=1.0, epochs=epochs, chunk=100
        )
    return algorithm, learners


def planned(rows: Batch) -> BatchPlan:
    return balance(rows.num_tokens, num_ranks=1, micro_batch_tokens=20)


def prepared(rows, algorithm, learners, kl_coef):
    """Writes what is there before an update, and returns what there is to say of it."""
    for learner in learners.values():
        rows.update(learner.write(rows, planned(rows)))
    return write_advantages(rows, algorithm, kl_coef)


def whole_step(batch, algorithm, learners, kl_coef=0.1):
    metrics = prepared(batch, algorithm, learners, kl_coef)
    for learner in learners.values():
        metrics |= learn(learner, batch, planned(batch), kl_coef)
    return metrics


class Streamed:
    """A step whose groups come in portions, as a trainer makes it."""

    def __init__(self, algorithm, learners, kl_coef=0.1, *, skips=False):
        self.algorithm, self.learners, self.kl_coef = algorithm, learners, kl_coef
        self.portions = StreamedBatch(algorithm, num_groups=6)
        reads = {"policy": policy_reads(algorithm), "critic": critic_reads(algorithm)}
        self.updates = {
            name: StreamedUpdate(
                LocalPool().start(name, lambda learner=learner: learner),
                planned,
                reads={*MODEL_COLUMNS, *reads[name]},
                kl_coef=kl_coef,
                skips_zero_advantages=skips and name == "policy",
            )
            for name, learner in learners.items()
        }

    def add(self, rows):
        prepared(rows, self.algorithm, self.learners, self.kl_coef)
        first_row = self.portions.add(rows)
        for update in self.updates.values():
            update.add(rows, first_row)

    def finish(self):
        scales = {"policy": self.portions.policy_scale, "critic": self.portions.critic_scale}
        rows = concat_portions(self.portions.batches)
        metrics = write_advantages(rows, self.algorithm, self.kl_coef, version=0)
        self.portions.check(rows)
        for name, update in self.updates.items():
            metrics |= update.finish(scales[name]).result()
        return metrics


def in_portions(batch, seed):
    """The groups of a batch in any order, one or more at a time."""
    generator = torch.Generator().manual_seed(seed)
    ids = batch["group_ids"].unique()
    cuts = torch.randint(1, 4, (len(ids),), generator=generator).cumsum(0)
    for chosen in ids[torch.randperm(len(ids), generator=generator)].tensor_split(
        cuts[cuts < len(ids)].tolist()
    ):
        yield batch.select(torch.isin(batch["group_ids"], chosen).nonzero().squeeze(1))


def streamed_step(batch, algorithm, learners, kl_coef=0.1, *, seed=0, skips=False):
    step = Streamed(algorithm, learners, kl_coef, skips=skips)
    for rows in in_portions(batch, seed):
        step.add(rows)
    return step.finish()


def distance(one, other):
    """Of the weights of two engines, relative."""
    one, other = weights(one.engine), weights(other.engine)
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", range(2))
def test_steps_in_any_portions_are_those_over_all_rows(case, seed):
    (algorithm, whole), (_, parts) = roles(CASES[case]), roles(CASES[case])
    for step in range(3):
        expected = whole_step(rows_of_six_prompts(), algorithm, whole)
        metrics = streamed_step(rows_of_six_prompts(), algorithm, parts, seed=10 * seed + step)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
    start = roles(CASES[case])[1]
    for name, learner in whole.items():
        assert distance(parts[name], learner) < 1e-6
        assert distance(learner, start[name]) > 1e-3


@pytest.mark.parametrize(
    "settings",
    [{"precision": "bf16"}, {"precision": "fp16"}, {"packing": False, "gradient_checkpointing": True}],
)
def test_so_they_are_in_each_precision_and_form(settings):
    (algorithm, whole), (_, parts) = (
        roles(CASES["gspo, kl"], **settings),
        roles(CASES["gspo, kl"], **settings),
    )
    for seed in range(3):
        expected = whole_step(rows_of_six_prompts(), algorithm, whole)
        metrics = streamed_step(rows_of_six_prompts(), algorithm, parts, seed=seed)
        # In 16 bits logprobs differ with the rows beside them, in whole steps as well.
        assert {n: metrics[n] for n in NEAR} == pytest.approx({n: expected[n] for n in NEAR}, rel=0.05)
    # Which is how far two splits of a whole step are apart in bf16; the policy has moved by 0.16.
    assert distance(parts["policy"], whole["policy"]) < 5e-3
    assert parts["policy"].engine._scale.value == whole["policy"].engine._scale.value


def test_one_portion_of_all_rows_is_the_step_itself_bit_by_bit():
    engines, batch = [local_engine(), local_engine()], rows_to_learn()
    objective = [partial(likely, engine) for engine in engines]
    for _ in range(2):
        whole = engines[0].update(batch, [[0, 1], [2, 3], [4, 5]], objective[0])
        for micro in ([0, 1], [2, 3], [4, 5]):
            engines[1].accumulate(batch, [micro], objective[1])
        assert engines[1].finish() == whole
    assert torch.equal(weights(engines[0]), weights(engines[1]))


def likely(engine, rows, inputs):
    """Minus the logprobs of all tokens, and two monitors."""
    logprobs = engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    return -logprobs.sum(), {
        "tokens": torch.tensor(float(len(logprobs))),
        "longest_max": rows["mask"].sum(1).max(),
    }


def test_the_scale_is_of_the_loss_and_its_gradient_and_not_of_sums():
    engines, batch = [local_engine(optimizer={"max_grad_norm": 1.0}) for _ in range(2)], rows_to_learn()
    metrics = []
    for engine, scale in zip(engines, (1.0, 0.25), strict=True):
        for micro in ([0, 1], [2], [3, 4, 5]):
            engine.accumulate(batch, [micro], partial(likely, engine))
        metrics.append(engine.finish(scale))
    assert metrics[1]["grad_norm"] == pytest.approx(0.25 * metrics[0]["grad_norm"], rel=1e-6)
    assert metrics[1]["loss"] == pytest.approx(0.25 * metrics[0]["loss"], rel=1e-6)
    assert metrics[1]["tokens"] == metrics[0]["tokens"] == 22
    assert metrics[1]["longest_max"] == metrics[0]["longest_max"] == 5


def test_a_loss_that_is_not_finite_in_a_portion_skips_the_whole_update():
    algorithm, learners = roles({})
    clean, before = rows_of_six_prompts(), weights(learners["policy"].engine)
    step = Streamed(algorithm, learners)
    portions = list(in_portions(clean, seed=1))
    portions[1].write("rewards", torch.full((portions[1].num_rows,), torch.nan))
    assert len(portions) > 2
    for rows in portions:
        step.add(rows)
    metrics = step.finish()
    assert metrics["skipped_updates"] == 1 and "loss" not in metrics
    assert torch.equal(weights(learners["policy"].engine), before)
    assert streamed_step(clean, algorithm, learners)["skipped_updates"] == 0


@pytest.mark.parametrize(("bad", "named"), [(3, "row 4 of the step"), (5, "row 0 of the step")])
def test_the_row_that_it_comes_from_is_named_by_its_number_in_the_step(bad, named):
    worker, batch = roles({}, max_bad_updates=1)[1]["policy"], rows_to_learn()
    batch.write("advantages", torch.where(torch.arange(6)[:, None] == bad, torch.nan, batch["advantages"]))
    portions, update = StreamedBatch(worker._algorithm, num_groups=3), updated(worker)
    for rows in ([5, 4], [2, 0], [3, 1]):
        portion = batch.select(rows)
        update.add(portion, portions.add(portion))
    with pytest.raises(NotFiniteError, match=named):
        update.finish(portions.policy_scale).result()


def updated(worker, **options):
    """An update in portions of a policy on its own."""
    reads = {*MODEL_COLUMNS, *policy_reads(worker._algorithm)}
    return StreamedUpdate(LocalPool().start("policy", lambda: worker), planned, reads=reads, **options)


def test_a_gradient_that_is_not_finite_names_all_rows_of_the_step():
    engine, batch = local_engine(max_bad_updates=1), rows_to_learn()
    for rows in ([1, 0], [5]):
        engine.accumulate(batch, [rows], lambda rows, inputs: (root_of_nothing(engine, inputs), {}))
    with pytest.raises(NotFiniteError, match="gradient was not finite .* row 1, 0, 5 of the step"):
        engine.finish(0.5)


def root_of_nothing(engine, inputs):
    """A loss of 0 with a gradient of infinity times 0."""
    logprobs = engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0]
    return (logprobs - logprobs.detach()).abs().sqrt().sum()


def test_an_overflow_of_fp16_in_one_portion_halves_the_loss_scale_once():
    engine, batch = local_engine(precision="fp16", max_bad_updates=1), rows_to_learn()
    before, scale = weights(engine), engine._scale.value
    for rows, factor in (([0, 1], 1.0), ([2, 3], 1e6), ([4, 5], 1.0)):
        engine.accumulate(
            batch, [rows], lambda rows, inputs, factor=factor: (factor * likely(engine, rows, inputs)[0], {})
        )
    assert engine.finish(1 / 22)["skipped_updates"] == 1
    assert engine._scale.value == scale / 2 and torch.equal(weights(engine), before)


@pytest.mark.parametrize("then", ["portions", "update"])
def test_portions_of_a_step_that_was_given_up_are_forgotten(then):
    algorithm, given_up = roles({})
    fresh = roles({})[1]
    Streamed(algorithm, given_up).add(next(in_portions(rows_of_six_prompts(), seed=3)))
    step = streamed_step if then == "portions" else whole_step
    for learners in (given_up, fresh):
        step(rows_of_six_prompts(), algorithm, learners)
    assert torch.equal(weights(given_up["policy"].engine), weights(fresh["policy"].engine))


@pytest.mark.parametrize("zero", [[0], [1, 2, 4], [0, 1, 2, 3, 4, 5]], ids=str)
def test_rows_without_advantage_are_left_out_as_of_the_whole_step(zero):
    config = {"skip_zero_advantages": True, "entropy_coef": 0.1}
    (algorithm, whole), (_, parts) = roles(config), roles(config)
    for seed in range(2):
        batches = [rows_of_six_prompts(), rows_of_six_prompts()]
        for batch in batches:
            batch.write("rewards", torch.where(torch.isin(GROUPS, torch.tensor(zero)), 1.0, batch["rewards"]))
        expected = whole_step(batches[0], algorithm, whole)
        metrics = streamed_step(batches[1], algorithm, parts, seed=seed, skips=True)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-6)
        assert metrics["skipped_rows_share"] > 0
    assert distance(parts["policy"], whole["policy"]) < 1e-6


def test_a_step_with_nothing_to_learn_leaves_the_policy_and_no_nan():
    algorithm, learners = roles({})
    batch, before = rows_of_six_prompts(), weights(learners["policy"].engine)
    batch.write("mask", torch.zeros_like(batch["mask"]))
    metrics = streamed_step(batch, algorithm, learners)
    assert metrics["loss"] == metrics["grad_norm"] == metrics["skipped_updates"] == 0
    assert torch.equal(weights(learners["policy"].engine), before)


def test_a_group_that_is_split_over_portions_is_refused():
    portions, batch = StreamedBatch(roles({})[0], num_groups=3), rows_to_learn()
    assert portions.add(batch.select([4, 5])) == 0
    assert portions.add(batch.select([0, 1])) == 2
    with pytest.raises(ValueError, match=r"need whole groups in a portion, .* got \[0, 1\] a second time"):
        portions.add(batch.select([2, 3]))


def test_rewards_of_turns_that_only_some_portions_have_are_kept():
    batch = rows_to_learn()
    first, second = batch.select([0, 1]), batch.select([2, 3, 4])
    second.write("turn_rewards", second["mask"].float())
    second.write("values", second["values"])
    together = concat_portions([first, second])
    assert together["turn_rewards"].tolist() == [[0.0] * 7, [0.0] * 7, *second["turn_rewards"].tolist()]
    assert together["values"].shape == (5, 7)


def test_an_engine_that_makes_whole_updates_only_says_so():
    class Whole(LocalEngine):
        can_accumulate, accumulate, finish = False, TrainEngine.accumulate, TrainEngine.finish

    worker = roles({})[1]["policy"]
    assert worker.can_accumulate()
    worker.engine.__class__ = Whole
    assert not worker.can_accumulate()
    batch, update = rows_to_learn(), updated(worker)
    with pytest.raises(ValueError, match="need whole updates for Whole"):
        update.add(batch, StreamedBatch(worker._algorithm, num_groups=3).add(batch))


def test_an_engine_that_keeps_gradients_elsewhere_is_not_taken_for_one_that_was_rescaled():
    engine, batch = local_engine(), rows_to_learn()
    engine.accumulate(batch, [[0, 1]], partial(likely, engine))
    engine.model.zero_grad(set_to_none=True)
    with pytest.raises(RuntimeError, match="need gradients beside the parameters"):
        engine.finish(0.5)


@pytest.mark.parametrize(
    ("config", "epochs", "plan"),
    [
        ({"policy_loss": Choice(name="clip_cov")}, 1, one_update([0, 1, 2, 3, 4, 5])),
        ({}, 2, one_update([0, 1, 2, 3, 4, 5])),
        ({}, 1, BatchPlan([[[[0, 1, 2]]], [[[3, 4, 5]]]])),
    ],
    ids=["statistics of a minibatch", "epochs", "minibatches"],
)
def test_a_learner_refuses_portions_that_would_not_be_the_step(config, epochs, plan):
    worker = roles(config, epochs=epochs)[1]["policy"]
    with pytest.raises(ValueError, match="need (whole updates|one update)"):
        worker.accumulate(rows_to_learn(), plan, 0.0, 0)


def shifted(rewards):
    """An advantage of a user that only large batches show."""
    return rewards - rewards.mean() if len(rewards) > 4 else rewards


def scaled_by_longest(rewards, mask):
    return rewards / mask.shape[1]


def own_aggregation(mask):
    return mask.float() / mask.sum()


def test_a_function_that_only_seemed_to_be_of_each_group_is_found_before_the_update():
    algorithm, learners = roles({"advantage": Choice(name=f"{__name__}:shifted")})
    assert streaming_obstacle(algorithm, AlgorithmConfig()) is None
    before = weights(learners["policy"].engine)
    with pytest.raises(RuntimeError, match="advantages of the rows together are others"):
        streamed_step(rows_of_six_prompts(), algorithm, learners)
    assert torch.equal(weights(learners["policy"].engine), before)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"epochs": 2}, "algorithm.epochs=2 and algorithm.minibatches=1 make several updates"),
        ({"minibatches": 4}, "algorithm.epochs=1 and algorithm.minibatches=4 make several updates"),
        (
            {"policy_loss": Choice(name="kl_cov")},
            "algorithm.policy_loss kl_cov has statistics over all rows of an update",
        ),
        (
            {"advantage": Choice(name="gae", whiten=True)},
            "algorithm.advantage gae, whiten=True has statistics over all groups",
        ),
        (
            {"correction": Choice(name="seq_tis", normalize=True)},
            "algorithm.correction seq_tis, normalize=True has statistics",
        ),
        ({"likelihood_coef": 0.1}, "algorithm.likelihood_coef has a denominator of its own"),
        (
            {"aggregation": Choice(name=f"{__name__}:own_aggregation")},
            "own_aggregation is none of token_mean, ",
        ),
        (
            {"advantage": Choice(name=f"{__name__}:scaled_by_longest")},
            "scaled_by_longest has statistics over all groups",
        ),
        ({"advantage": GAE, "kl": KL_IN_REWARD}, None),
        ({**GSPO, "correction": Choice(name="geometric_rs"), "kl": KL_IN_LOSS, "entropy_coef": 0.1}, None),
        ({"correction": Choice(name="loglinear"), "skip_zero_advantages": True}, None),
    ],
    ids=str,
)
def test_what_needs_all_rows_at_once_is_refused_with_its_setting(config, reason):
    config = AlgorithmConfig(**config)
    answer = streaming_obstacle(Algorithm.bind(config), config)
    assert answer is None if reason is None else reason in answer


@pytest.mark.parametrize(
    ("choice", "name"),
    [("advantage", name) for name in ADVANTAGES] + [("correction", name) for name in CORRECTIONS],
    ids=lambda value: value,
)
def test_of_each_function_is_known_whether_the_other_groups_matter(choice, name):
    own = PRIME if name == "prime" else {choice: Choice(name=name)}
    config = AlgorithmConfig(**own)
    algorithm = Algorithm.bind(config)
    batch = rows_of_all_columns()
    parts = list(in_portions(batch, seed=4))
    for rows in (batch, *parts):
        write_advantages(rows, algorithm, 0.0)
    order = torch.cat([rows["number"] for rows in parts])
    together, apart = batch.select(order), concat_portions(parts)
    written = [name for name in ("advantages", "correction_weights") if name in batch]
    same = all(torch.allclose(together[name], apart[name], rtol=1e-4, atol=1e-6) for name in written)
    assert same == (streaming_obstacle(algorithm, config) is None)


def rows_of_all_columns() -> Batch:
    """Columns that any function may read; one prompt has equal rewards."""
    batch, generator = rows_of_six_prompts(), torch.Generator().manual_seed(3)
    rewards = torch.where(GROUPS == 2, 0.5, batch["rewards"])
    for name in ("trainer_logprobs", "prm_logprobs", "sum_squared_probs"):
        batch.write(
            name, batch["rollout_logprobs"] + 0.1 * torch.randn(batch["mask"].shape, generator=generator)
        )
    batch.write("states", torch.randint(1, 3, batch["mask"].shape, generator=generator))
    parts = torch.stack([rewards, torch.rand(12, generator=generator)], 1)
    of_rows = {
        "rewards": rewards,
        "greedy_rewards": rewards.flip(0),
        "reward_parts": parts,
        "reward_weights": torch.ones(12, 2),
    }
    batch.update(Batch({**of_rows, "number": torch.arange(12)}))
    return batch
