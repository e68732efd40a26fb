"""Sampling parameters of rows: applied to each group, and refused where training cannot follow them."""

from __future__ import annotations

import pytest

from tests.agents.test_collector import Scripted, collector
from tests.tiny import tiny_codec
from verl.agents.row_sampling import check_row_sampling, with_row_sampling
from verl.config import load_config
from verl.utils.sampling_types import Prompt, SamplingParams


def row(**sampling):
    return Prompt("ab", source="sums", index=3, sampling=sampling)


def test_each_group_is_sampled_with_the_parameters_of_its_row():
    engine = Scripted("1", "2")
    collector(engine).collect([row(max_tokens=5), Prompt("ab")], samples=2)
    asked = [p for _, params in engine.calls for p in params]
    assert sorted({p.max_tokens for p in asked}) == [5, 8]


def test_evaluation_takes_them_too():
    engine = Scripted("1")
    collector(engine).answer([row(temperature=0.5)], [SamplingParams(temperature=0.0, max_tokens=6)])
    (asked,) = [p for _, params in engine.calls for p in params]
    assert (asked.temperature, asked.max_tokens) == (0.5, 6)


def test_stop_texts_of_a_row_replace_those_of_the_settings():
    codec = tiny_codec()
    params = SamplingParams(stop=("a", "<eos>"), stop_ids=(7, *codec.token_ids_of(["<eos>"])))
    made = with_row_sampling(params, row(stop=("b",)), codec)
    assert made.stop == ("b",) and made.stop_ids == (7,)


@pytest.mark.parametrize(
    ("sampling", "settings", "message"),
    [
        ({"temperature": 0.5}, [], "row 3 of sums: need sampling.temperature 1 .* got 0.5"),
        ({"top_p": 0.5}, ["algorithm.correction=bypass"], "algorithm.correction bypass .* got top_p 0.5"),
        (
            {"max_tokens": 8},
            ["algorithm.overlong_buffer_tokens=8", "sampling.max_tokens=32"],
            "need max_tokens above algorithm.overlong_buffer_tokens 8, got 8",
        ),
        ({"repetition_penalty": 1.1}, ["rollout.engine=sglang", "rollout.servers=1"], "engine sglang"),
    ],
)
def test_parameters_that_training_or_the_engine_cannot_follow_are_refused(sampling, settings, message):
    config = load_config("grpo", settings)
    with pytest.raises(ValueError, match=message):
        check_row_sampling([row(**sampling)], config, trains=True)


def test_parameters_that_fit_are_taken():
    recompute = load_config("grpo", ["algorithm.correction=recompute"])
    check_row_sampling([row(temperature=1.0, top_p=0.5, max_tokens=4)], recompute, trains=True)
    check_row_sampling([row(temperature=0.5)], load_config("grpo"), trains=False)
