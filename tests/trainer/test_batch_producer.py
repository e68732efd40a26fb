"""The pipeline in real runs: the same losses as the plain loop, bounded staleness, restarts, and servers that
work beside training.
"""

from __future__ import annotations

import io
import os
import signal
import time
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
from rich.console import Console

from tests.training import toy_config, toy_trainer
from verl.data.batch import Batch
from verl.monitoring.ledger_report import read_ledger
from verl.trainer.rl_trainer import Trainer

SERVED = ("rollout.engine=served", "rollout.servers=1")


def plain_steps(trainer: Trainer, steps: int) -> list[dict[str, float]]:
    """Steps of a loop in the user's hands, without a pipeline."""
    config, take = trainer.config, trainer.loader.take
    return [
        trainer.update_policy(trainer.collect_data(take(config.prompts_per_step), refill=take))
        for _ in range(steps)
    ]


def followed(history: list[dict[str, float]]) -> list[dict[str, str]]:
    """What was learned from and what it gave, bit for bit."""
    names = ("reward", "loss", "grad_norm", "critic/loss", "resample_draws", "dead_groups_share", "tokens")
    return [{name: metrics[name].hex() for name in names if name in metrics} for metrics in history]


def test_dynamic_sampling_gives_up_after_as_many_rounds_as_the_plain_loop(letters, tmp_path):
    runs = []
    for name in ("plain", "piped"):
        given = {"reward_fn": lambda prompt, response: float(prompt == "aac=") * len(response)}
        settings = (
            "rewards.functions=[]",
            "algorithm.max_resamples=2",
            "algorithm.overlong_buffer_tokens=0",
            "data.shuffle=false",
        )
        trainer = toy_trainer("dapo", letters, tmp_path / name, *settings, **given)
        runs.append(plain_steps(trainer, 1) if name == "plain" else [trainer.step()])
        assert {t.prompt.content for t in trainer.last} == {"aac="}
    assert followed(runs[0]) == followed(runs[1]) and runs[1][0]["resample_draws"] == 2


@pytest.mark.parametrize("recipe", ["grpo", "ppo", "dapo", "remax", "gdpo"])
def test_without_staleness_the_losses_are_those_of_the_plain_loop_to_the_last_bit(recipe, letters, tmp_path):
    plain = plain_steps(toy_trainer(recipe, letters, tmp_path / "plain"), 4)
    piped = toy_trainer(recipe, letters, tmp_path / "piped")
    assert followed([piped.step() for _ in range(4)]) == followed(plain)
    assert piped.producer.pipeline.ledger.counts().answering == 0


def stepped(
    letters: Any, folder: Any, *overrides: str, steps: int = 6
) -> tuple[Trainer, list[dict[str, float]]]:
    trainer = toy_trainer("grpo", letters, folder, *overrides)
    return trainer, [trainer.step() for _ in range(steps)]


@pytest.mark.parametrize("bound", [1, 2, 4])
def test_in_turn_every_step_is_as_stale_as_it_may_be_and_never_more(bound, letters, tmp_path):
    _, history = stepped(letters, tmp_path, f"pipeline.max_staleness={bound}")
    assert [step["staleness/max"] for step in history] == [min(bound, i) for i in range(6)]
    assert [step["pipeline/in_queue"] for step in history] == [4 * bound] * 6


def test_two_runs_of_the_same_seed_have_the_same_batches_and_losses(letters, tmp_path):
    runs = [stepped(letters, tmp_path / name, "pipeline.max_staleness=2") for name in ("one", "two")]
    assert followed(runs[0][1]) == followed(runs[1][1])
    assert [t.response_ids for t in runs[0][0].last] == [t.response_ids for t in runs[1][0].last]
    assert followed(runs[0][1])[-1] != followed(stepped(letters, tmp_path / "three")[1])[-1]


def fitted(letters: Any, folder: Any, *overrides: str) -> Trainer:
    trainer = Trainer(toy_config("grpo", letters, folder, *overrides), console=Console(file=io.StringIO()))
    trainer.fit()
    return trainer


def test_a_run_that_goes_on_from_a_checkpoint_learns_from_what_waited_there_and_its_ledger_adds_up(
    letters, tmp_path
):
    settings = ("pipeline.max_staleness=2", "checkpoint.every_steps=1")
    whole = fitted(letters, tmp_path / "whole", *settings, "steps=6")
    fitted(letters, tmp_path / "cut", *settings, "steps=3")
    resumed = fitted(letters, tmp_path / "cut", *settings, "steps=6")
    assert [t.response_ids for t in resumed.last] == [t.response_ids for t in whole.last]
    reports = [read_ledger(tmp_path / name / "run") for name in ("whole", "cut")]
    assert all(not (report.missing or report.twice or report.mismatches) for report in reports)
    counts = resumed.producer.pipeline.ledger.counts()
    assert (counts.trained, counts.waiting, counts.accounted) == (24, 8, counts.dispatched)


def test_a_group_without_a_reward_gives_way_to_another_prompt(letters, tmp_path):
    def picky(prompt, response):
        if prompt == "aac=":
            raise ValueError("no judgement")
        return len(set(response))

    trainer = toy_trainer(
        "grpo", letters, tmp_path, "rewards.functions=[]", "data.shuffle=false", reward_fn=picky
    )
    metrics = trainer.step()
    assert len(trainer.last) == 16 and "aac=" not in {t.prompt.content for t in trainer.last}
    assert (
        metrics["pipeline/dropped_too_few"],
        metrics["pipeline/retried_reward"],
        metrics["outcome/reward_error"],
    ) == (1, 1, 4)


def test_a_step_that_was_interrupted_is_made_again_with_its_groups(letters, tmp_path):
    class Once:
        def __init__(self):
            self.calls = 0

        def __call__(self, prompt, response):
            self.calls += 1
            if self.calls == 20:
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.5)
            return len(set(response))

    trainer = toy_trainer(
        "grpo", letters, tmp_path, "rewards.functions=[]", "pipeline.max_staleness=1", reward_fn=Once()
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    metrics = [trainer.step() for _ in range(3)]
    counts = trainer.producer.pipeline.ledger.counts()
    assert (counts.trained, counts.waiting, counts.dispatched) == (12, 4, 16) and metrics[-1][
        "staleness/max"
    ] == 1


def failing_once(owner: Any, method: str, error: BaseException, *, call: int) -> None:
    """Lets one call of a method raise, the first being number 0."""
    inner, numbers = getattr(owner, method), iter(range(10**6))

    def fails_once(*given: Any) -> Any:
        if next(numbers) == call:
            raise error
        return inner(*given)

    setattr(owner, method, fails_once)


@pytest.mark.parametrize("error", [RuntimeError("down"), KeyboardInterrupt(), SystemExit(3)])
@pytest.mark.parametrize(
    ("owner", "method", "call"),
    [
        ("rollout.generator", "generate", 0),
        ("codec", "encode_prompt", 1),
        ("collector._sampler", "finish", 2),
    ],
)
def test_a_step_that_fails_in_turn_is_made_again_with_its_groups(
    owner, method, call, error, letters, tmp_path
):
    trainer = toy_trainer("grpo", letters, tmp_path)
    failing_once(attrgetter(owner)(trainer), method, error, call=call)
    with pytest.raises(type(error)):
        trainer.step()
    trainer.step()
    counts = trainer.producer.pipeline.ledger.counts()
    assert (counts.trained, counts.dispatched) == (4, 4)


def test_after_too_many_failures_in_a_row_the_next_step_has_other_prompts(letters, tmp_path):
    is_down = [True]

    def judge(prompt, response):
        if is_down:
            raise ConnectionError("the judge is down")
        return len(set(response))

    settings = ("rewards.functions=[]", "rewards.max_failed_share=1", "pipeline.max_failures_in_a_row=4")
    trainer = toy_trainer("grpo", letters, tmp_path, *settings, reward_fn=judge)
    with pytest.raises(RuntimeError, match="4 groups failed one after the other"):
        trainer.step()
    is_down.clear()
    trainer.step()
    counts = trainer.producer.pipeline.ledger.counts()
    assert (counts.trained, counts.dispatched, counts.accounted) == (4, 8, 8)


def test_rows_of_the_users_own_are_learned_from_after_a_streamed_step_that_failed(letters, tmp_path):
    source = toy_trainer("grpo", letters, tmp_path / "source")
    settings = (*SERVED, "pipeline.batches=streamed", "algorithm.epochs=1", "algorithm.minibatches=1")
    trainer = toy_trainer("grpo", letters, tmp_path, *settings, rollout=source.rollout.generator)
    data = trainer.collect_data(trainer.loader.take(4))
    failing_once(trainer.producer, "next_batch", RuntimeError("no reward"), call=0)
    with pytest.raises(RuntimeError, match="no reward"):
        trainer.step()
    assert trainer.update_policy(data)["reward"] == data.metrics["reward"]


def test_a_trainer_may_be_closed_twice(letters, tmp_path):
    trainer, _ = stepped(letters, tmp_path, steps=1)
    trainer.close()
    trainer.close()


def test_an_update_that_fails_leaves_its_groups_to_the_next_step(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path)
    update, failures = trainer.roles.update, [RuntimeError("out of memory")]

    def update_later(*given):
        if failures:
            raise failures.pop()
        return update(*given)

    trainer.roles.update = update_later
    with pytest.raises(RuntimeError, match="out of memory"):
        trainer.step()
    trainer.step()
    counts = trainer.producer.pipeline.ledger.counts()
    assert (counts.trained, counts.dispatched) == (4, 4)


def test_steps_and_a_loop_of_the_users_own_take_turns(letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "pipeline.max_staleness=1")
    plain_steps(trainer, 3)
    trainer.step()
    plain_steps(trainer, 3)
    assert trainer.step()["staleness/max"] <= 1
    counts = trainer.producer.pipeline.ledger.counts()
    assert trainer.version == 8 and counts.trained == 8 and counts.accounted == counts.dispatched


def test_a_run_that_goes_on_with_a_narrower_bound_drops_what_is_too_old(letters, tmp_path):
    fitted(letters, tmp_path, "pipeline.max_staleness=2", "steps=3")
    folder = tmp_path / "run" / "checkpoints" / "step-00000003"
    resumed = toy_trainer("grpo", letters, tmp_path, "steps=5", f"checkpoint.resume={folder}")
    history = resumed.fit()
    assert [metrics["staleness/max"] for metrics in history] == [0, 0]
    assert resumed.producer.pipeline.ledger.counts().dropped == {"surplus": 8}


def test_a_reward_that_failed_is_asked_for_again_and_no_other(letters, tmp_path):
    calls = []

    def flaky(prompt, response):
        calls.append(prompt)
        if len(calls) == 5:
            raise ConnectionError("the judge is down")
        return len(set(response))

    trainer = toy_trainer("grpo", letters, tmp_path, "rewards.functions=[]", reward_fn=flaky)
    metrics = trainer.step()
    assert len(calls) == 17 and metrics["failed_share"] == 0 and metrics["pipeline/retried_reward"] == 1


def test_what_needs_all_rows_of_a_step_is_refused_before_it_starts(letters, tmp_path):
    config = toy_config("gspo", letters, tmp_path, *SERVED, "pipeline.batches=streamed")
    with pytest.raises(
        ValueError,
        match=r"pipeline.batches=streamed, but algorithm.epochs=1 and algorithm.minibatches=2 make several",
    ):
        Trainer(config, console=Console(file=io.StringIO()))


@pytest.mark.servers
@pytest.mark.parametrize("batches", ["arrival", "streamed", "deterministic"])
def test_a_server_answers_the_next_batch_while_this_one_is_learned_from(batches, letters, tmp_path):
    settings = (
        *SERVED,
        "steps=6",
        "pipeline.max_staleness=1",
        f"pipeline.batches={batches}",
        "checkpoint.every_steps=3",
    )
    shown = io.StringIO()
    trainer = Trainer(toy_config("grpo", letters, tmp_path, *settings), console=Console(file=shown))
    try:
        history = trainer.fit()
        assert all(metrics["staleness/max"] <= 1 for metrics in history) and any(
            metrics["staleness/mean"] > 0 for metrics in history
        )
        # The policy moves far in a step, and not a single step takes that for an error of the sampler.
        assert all(metrics.get("kl_sampler", 0) < 1e-4 and len(trainer.last) == 16 for metrics in history)
        assert max(metrics.get("kl_off_policy", 0) for metrics in history) > 1e-4
        assert "sampler and trainer differ" not in shown.getvalue()
        if batches == "deterministic":
            assert [metrics["staleness/mean"] for metrics in history] == [0, 1, 1, 1, 1, 1]
    finally:
        trainer.close()
    report = read_ledger(tmp_path / "run")
    assert not (report.missing or report.twice or report.mismatches) and report.counts.trained == 24


def test_answers_of_older_versions_are_no_error_of_the_sampler(letters, tmp_path):
    """A batch that is answered, learned from once, and then again as a stale one."""
    settings = ("policy.optimizer.lr=0.01", "algorithm.correction=recompute")
    trainer = toy_trainer("grpo", letters, tmp_path, *settings)
    data = trainer.collect_data(trainer.loader.take(4))
    current = trainer.update_policy(data)
    stale = trainer.update_policy(replace(data, rows=Batch.from_trajectories(data.trajectories)))
    assert current["kl_sampler"] < 1e-9 and current["mismatch/kl_k3"] < 1e-9
    assert not {"kl_off_policy", "off_policy/kl_k3"} & current.keys()
    assert not {"kl_sampler", "sampler_gap", "sampler_gap_max", "mismatch/kl_k3"} & stale.keys()
    assert stale["kl_off_policy"] == pytest.approx(stale["off_policy/kl_k3"], rel=1e-3)
    assert stale["kl_off_policy"] > trainer.config.rollout.mismatch_warn
    assert not [note for note in trainer.notes if "sampler and trainer differ" in note]


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_a_wrong_sampler_shows_on_answers_that_wait_where_the_batch_is_stale(shift, letters, tmp_path):
    trainer = toy_trainer("grpo", letters, tmp_path, "policy.optimizer.lr=0.01")
    data = trainer.collect_data(trainer.loader.take(4))
    trainer.update_policy(data)
    waiting = trainer.collect_data(trainer.loader.take(2)).rows
    waiting.write("rollout_logprobs", waiting["rollout_logprobs"] - shift)
    trainer.notes.clear()
    stale = replace(data, rows=Batch.from_trajectories(data.trajectories), fresh=waiting)
    assert trainer.update_policy(stale)["sampler_gap"] == pytest.approx(shift, abs=1e-4)
    warnings = [note for note in trainer.notes if "sampler and trainer differ" in note]
    assert len(warnings) == bool(shift)


@pytest.mark.servers
def test_on_servers_two_deterministic_runs_learn_from_the_same_prompts_of_the_same_versions(
    letters, tmp_path
):
    runs = []
    for name in ("one", "two"):
        settings = (*SERVED, "steps=4", "pipeline.max_staleness=2", "pipeline.batches=deterministic")
        trainer = toy_trainer("grpo", letters, tmp_path / name, *settings)
        try:
            steps = [
                (trainer.step(), [(t.prompt.index, t.group, t.versions[0]) for t in trainer.last])
                for _ in range(4)
            ]
        finally:
            trainer.close()
        runs.append(steps)
    assert [batch for _, batch in runs[0]] == [batch for _, batch in runs[1]]
    losses = [[metrics["loss"] for metrics, _ in steps] for steps in runs]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


@pytest.mark.servers
def test_a_streamed_step_is_the_whole_step(letters, tmp_path):
    whole = ("algorithm.epochs=1", "algorithm.minibatches=1", "algorithm.advantage.whiten=false")
    ends = []
    for batches in ("arrival", "streamed"):
        trainer = toy_trainer(
            "ppo", letters, tmp_path / batches, *SERVED, f"pipeline.batches={batches}", *whole
        )
        try:
            history = [trainer.step() for _ in range(3)]
        finally:
            trainer.close()
        ends.append(
            {
                name: [metrics[name] for metrics in history]
                for name in ("reward", "loss", "critic/loss", "grad_norm", "entropy")
            }
        )
    for name, values in ends[0].items():
        assert ends[1][name] == pytest.approx(values, rel=2e-3, abs=1e-4), name


@pytest.mark.servers
def test_a_reward_that_asks_the_program_to_end_fails_and_leaves_the_engines_alone(letters, tmp_path):
    def leaves(prompt, response):
        raise SystemExit(3)

    trainer = toy_trainer("grpo", letters, tmp_path, *SERVED, "rewards.functions=[]", reward_fn=leaves)
    try:
        with pytest.raises(RuntimeError, match="SystemExit: 3"):
            trainer.step()
        assert trainer.rollout.pool.replicas[0].state == "serving"
    finally:
        trainer.close()
