"""The modelled cluster of `benchmarks/async_simulation.py` does what can be computed by hand."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import fmean

import pytest

from verl.config.pipeline import PipelineConfig

BENCHMARKS = str(Path(__file__).parents[2] / "benchmarks")
NUM_ENGINES, SLOTS, PROMPTS, SAMPLES, LENGTH, PROMPT = 20, 16, 40, 4, 1000, 100
LOAD_S, WRITE_S, SWITCH_S = 2.0, 1.0, 3.0


@pytest.fixture(scope="module")
def modules():
    """The scripts' own modules, which lie beside them."""
    sys.path.insert(0, BENCHMARKS)
    yield {name: import_module(name) for name in ("cluster", "modelled_engines", "async_prediction")}
    sys.path.remove(BENCHMARKS)


@pytest.fixture
def equal(modules):
    """A run with answers of equal length, on engines whose step takes 1 ms for each answer: a batch of 8
    answers for each takes 8 s.
    """
    pace = modules["modelled_engines"].Pace(0.0, 1e-3, 0.0, 0.0, SLOTS, LOAD_S, SWITCH_S)
    lengths = modules["modelled_engines"].Lengths(
        mean=LENGTH, sigma=0.0, longest=LENGTH, prompt=PROMPT, block=100
    )
    sizes = {
        "prompts_per_step": PROMPTS,
        "samples": SAMPLES,
        "train_s": 5.0,
        "write_s": WRITE_S,
        "steps": 12,
        "warmup": 4,
    }
    return modules["cluster"].Plan(NUM_ENGINES, None, pace=pace, lengths=lengths, **sizes)


@pytest.fixture
def varied(modules):
    """A run with answers of many lengths, two thirds of the devices for engines."""
    lengths = modules["modelled_engines"].Lengths()
    plan = modules["cluster"].Plan(30, NUM_ENGINES, PROMPTS, 8, lengths=lengths, steps=8, warmup=3)
    return replace(plan, config=PipelineConfig(max_staleness=2))


def figures(modules, plan, **config):
    return (
        modules["cluster"]
        .Cluster(replace(plan, config=PipelineConfig(**config)) if config else plan)
        .figures()
    )


def test_in_turn_a_step_takes_generation_and_training_one_after_the_other(modules, equal):
    pace = replace(equal.pace, base_s=5e-3, token_s=1e-6, prefill_s=2e-3)
    steps = figures(modules, replace(equal, pace=pace)).step_s
    # An engine has 2 prompts with 4 answers each; a step reads what is in the cache, to which each answer
    # adds a token.
    prefill_s = 2 * PROMPT * 2e-3
    decoding_s = (5e-3 + 8 * 1e-3 + 8 * PROMPT * 1e-6) * LENGTH + 8 * 1e-6 * LENGTH**2 / 2
    assert steps[1:] == pytest.approx(
        [prefill_s + decoding_s + SWITCH_S + 5.0 + WRITE_S + SWITCH_S + LOAD_S] * 11
    )


@pytest.mark.parametrize("part", [4, 16])
def test_one_step_off_a_step_takes_the_longer_of_generation_and_training(modules, equal, part):
    steps = figures(modules, replace(equal, generation=part), max_staleness=1).step_s
    generation_s, training_s = 8.0 * NUM_ENGINES / part, 5.0 / (1 - part / NUM_ENGINES)
    assert fmean(steps[-6:]) == pytest.approx(max(generation_s, training_s + WRITE_S) + LOAD_S, rel=1e-3)


def test_what_is_learned_from_as_it_comes_is_learned_earlier(modules, equal):
    # As many answers as there are slots, in four waves: three quarters of the training are over when the last
    # ones are there.
    plan = replace(equal, generation=10, pace=replace(equal.pace, slots=4))
    whole, streamed = (
        figures(modules, plan, batches=batches).step_s[-1] for batches in ("arrival", "streamed")
    )
    assert whole - streamed == pytest.approx(0.75 * 10.0)


@pytest.mark.parametrize(("bound", "more"), [(0, 0), (1, 0), (3, 5)])
def test_no_more_groups_are_in_work_than_batches_within_the_bound_hold(modules, varied, bound, more):
    class Watched(modules["cluster"].Cluster):
        most = 0

        def draw(self, count):
            counts = self.ledger.counts()
            self.most = max(
                self.most,
                counts.trained + counts.answering + counts.waiting + count - self.pipeline.version * PROMPTS,
            )
            return super().draw(count)

    run = Watched(replace(varied, config=PipelineConfig(max_staleness=bound, oversample=more)))
    assert run.figures().staleness_max == bound
    assert run.most == (bound + 1) * PROMPTS + more


@pytest.mark.parametrize("on_update", ["keep", "recompute", "abort"])
@pytest.mark.parametrize("more", [0, 10])
def test_each_sampled_token_is_trained_on_or_thrown_away_or_still_there(modules, varied, on_update, more):
    plan = replace(varied, on_update=on_update, config=PipelineConfig(max_staleness=2, oversample=more))
    run = modules["cluster"].Cluster(plan)
    told, totals = run.figures(), run.world.totals
    assert totals.trained + totals.thrown + sum(run.world.sampled.values()) == pytest.approx(totals.decoded)
    assert (told.thrown > 0.01) == bool(on_update == "abort" or more)
    assert (told.reread > 0.2) == (on_update == "recompute")
    assert 0 < told.slots_busy <= 1 and 0 < told.training_busy <= 1


def test_a_run_is_the_same_each_time(modules, varied):
    assert figures(modules, varied) == figures(modules, varied)


def test_lengths_have_the_mean_that_is_told(modules):
    lengths = modules["modelled_engines"].Lengths()
    sampled = [tokens for group in range(100) for tokens in lengths.of_group(group, 4096)]
    assert max(sampled) == lengths.longest
    assert fmean(sampled) == pytest.approx(lengths.average, rel=0.006)


def test_a_measured_run_is_predicted_by_its_parts(modules):
    prediction = modules["async_prediction"]
    phases = {"wait_training": 0.5, "sync_write": 0.03, "sync_load": 0.02}
    burst = {"wall_s": [9.0, 9.0, 0.8, 0.8]}
    measured = {
        "bursts": {"ahead 0": [burst] * 2},
        "reports": {"ahead 0": {"steps": [{"phases": phases}] * 8}},
    }
    steps = prediction.steps_of("ahead 0", measured)
    seconds = prediction.PartSeconds.of(steps)
    assert vars(seconds) == pytest.approx(
        {"generation_s": 0.5, "training_s": 0.25, "write_s": 0.03, "load_s": 0.02}
    )
    assert prediction.step_s(seconds, 0) == pytest.approx(0.8)
    assert prediction.step_s(seconds, 1) == pytest.approx(0.52, rel=1e-3)
