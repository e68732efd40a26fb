"""Rewards and sampling parameters of rows and sources."""

from __future__ import annotations

import json

import pytest

from verl.config.data import DataConfig, DataSource, RewardsConfig, WeightedChoice
from verl.data.dataset import load_prompts
from verl.data.loading.row_prompts import row_sampling
from verl.data.reading.row_cells import MalformedRow


def loaded(folder, rows, config=None, *, rewards=None, **source):
    """Prompts of a file with these rows."""
    path = folder / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": "1+1=", **row}) for row in rows))
    where = DataSource(path=str(path), **source)
    return load_prompts(where, config or DataConfig(), split="train", rewards=rewards or RewardsConfig())[0]


def test_a_source_gives_its_reward_and_its_sampling_to_its_rows(tmp_path):
    reward = WeightedChoice(name="exact", weight=2.0)
    (prompt,) = loaded(tmp_path, [{}], reward=reward, sampling={"max_tokens": 4})
    assert prompt.reward == reward and prompt.sampling == {"max_tokens": 4}
    (plain,) = loaded(tmp_path, [{}])
    assert plain.reward is None and plain.sampling == {}


def test_a_column_goes_over_the_source_and_a_row_without_a_value_has_that_of_the_source(tmp_path):
    rows = [
        {"by": "prefix_share"},
        {"by": {"name": "model", "options": {"path": "judge", "lower": None}, "weight": 0.5}},
        {"by": '{"name": "model", "path": "judge"}'},
        {"by": None},
        {"by": ""},
        {},
    ]
    model = WeightedChoice(name="model", path="judge")
    rewards = RewardsConfig(column="by", functions=(model,))
    made = [p.reward for p in loaded(tmp_path, rows, rewards=rewards, reward=WeightedChoice(name="exact"))]
    assert [choice.name for choice in made] == ["prefix_share", "model", "model", "exact", "exact", "exact"]
    assert made[1].options == made[2].options == {"path": "judge"} and made[1].weight == 0.5
    assert loaded(tmp_path, [{"by": "exact"}, {}], rewards=rewards)[1].reward is None


def test_data_cannot_choose_code_that_the_settings_do_not_name(tmp_path):
    row, column = {"by": "os:system"}, {"column": "by"}
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: need a built-in .* got 'os:system'"):
        loaded(tmp_path, [row], rewards=RewardsConfig(**column))
    named = RewardsConfig(**column, functions=(WeightedChoice(name="os:system"),))
    assert loaded(tmp_path, [row], rewards=named)[0].reward.name == "os:system"


@pytest.mark.parametrize(
    ("row", "named", "found"),
    [
        ({"name": "judge"}, [{"name": "judge", "address": "http://a"}], {"address": "http://a"}),
        ({"name": "model", "path": "b"}, [{"name": "model", "path": p} for p in "ab"], {"path": "b"}),
        ({"name": "json_schema", "schema": {}}, [], {"schema": {}}),
        ({"name": "model", "path": "/home"}, [{"name": "model", "path": "a"}], None),
        ({"name": "judge", "address": "http://b"}, [{"name": "judge", "address": "http://a"}], None),
        ({"name": "judge", "rubric": "key.txt"}, [{"name": "judge", "address": "http://a"}], None),
        ({"name": "judge"}, [], None),
        ({"name": "model"}, [{"name": "model", "path": p} for p in "ab"], None),
        ({"name": "json_schema", "schema_file": "/etc/passwd"}, ["json_schema"], None),
    ],
)
def test_data_chooses_models_servers_and_files_among_those_of_the_settings(tmp_path, row, named, found):
    rewards = RewardsConfig.model_validate({"column": "by", "functions": tuple(named)})
    if found is None:
        with pytest.raises(ValueError, match=f"line 1: need a function of the settings for '{row['name']}'"):
            loaded(tmp_path, [{"by": row}], rewards=rewards)
    else:
        assert loaded(tmp_path, [{"by": row}], rewards=rewards)[0].reward.options == found


def test_a_row_may_weigh_a_function_of_the_settings_otherwise(tmp_path):
    judge = WeightedChoice(name="judge", weight=0.5, address="http://a")
    rows = [{"by": "judge"}, {"by": {"name": "judge", "weight": 2.0}}]
    made = loaded(tmp_path, rows, rewards=RewardsConfig(column="by"), reward=judge)
    assert [prompt.reward.weight for prompt in made] == [0.5, 2.0] and made[1].reward.options == judge.options


def test_sampling_parameters_of_a_row_go_over_those_of_its_source(tmp_path):
    rows = [
        {"sampling": {"top_p": 0.5, "top_k": None}},
        {"sampling": '{"stop": "\\n"}'},
        {"sampling": {"max_tokens": 32.0}},
        {"sampling": None},
    ]
    made = loaded(tmp_path, rows, DataConfig(sampling_key="sampling"), sampling={"max_tokens": 4, "top_p": 1})
    assert [p.sampling for p in made] == [
        {"max_tokens": 4, "top_p": 0.5},
        {"max_tokens": 4, "top_p": 1, "stop": ("\n",)},
        {"max_tokens": 32, "top_p": 1},
        {"max_tokens": 4, "top_p": 1},
    ]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_new_tokens": 5}, "got 'max_new_tokens'; did you mean max_tokens"),
        ({"seed": 5}, "need sampling parameters among temperature, top_p"),
        ({"temperature": -1}, "temperature: .*greater than or equal to 0, got int -1"),
        ({"max_tokens": "many"}, "max_tokens: .*valid integer.*got str 'many'"),
        ({"stop": [""]}, "stop: .*an empty one"),
    ],
)
def test_a_sampling_parameter_that_is_none_is_refused(given, message):
    with pytest.raises(MalformedRow, match=message):
        row_sampling(given)


def test_wrong_parameters_are_named_with_their_place(tmp_path):
    with pytest.raises(ValueError, match="rows.jsonl, line 2: column 'how': need sampling parameters among"):
        loaded(tmp_path, [{}, {"how": {"seed": 1}}], DataConfig(sampling_key="how"))
    with pytest.raises(ValueError, match="sampling of the source .*rows.jsonl': need sampling parameters"):
        loaded(tmp_path, [{}], sampling={"seed": 1})
    with pytest.raises(ValueError, match="need the column 'how', which rewards.column or data.sampling_key"):
        loaded(tmp_path, [{}], DataConfig(sampling_key="how"))


def test_broken_json_is_named_by_its_place_in_the_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": \n')
    with pytest.raises(ValueError, match=r"line 2: .* invalid JSON: Expecting value at character 1[0-9]\n"):
        load_prompts(str(path), DataConfig(), split="train")
