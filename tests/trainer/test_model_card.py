"""Model cards: metadata for the hub, what a reader needs, and nothing private."""

from __future__ import annotations

import json

import pytest
from huggingface_hub import ModelCard

from verl.config import load_config
from verl.config.run import RewardModelConfig, SFTConfig
from verl.trainer.export.base_files import BaseFiles
from verl.trainer.export.model_card import CardFacts, write_card
from verl.trainer.export.public_values import public_name, public_value


def written(folder, settings, **facts):
    """The card of a policy after 30 steps."""
    base = facts.pop("base", BaseFiles("org/base-model"))
    given = {"kind": "PolicyModel", "settings": settings, "base": base, "step": 30} | facts
    write_card(folder, CardFacts(**given))
    return (folder / "README.md").read_text()


def settings_of(*overrides, recipe="grpo"):
    return load_config(recipe, ["policy.path=org/base-model", *overrides]).model_dump(mode="json")


def test_metadata_is_what_the_hub_reads(tmp_path):
    written(tmp_path, settings_of("data.train=org/data"))
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.library_name, data.pipeline_tag) == (
        "org/base-model", "transformers", "text-generation",
    )  # fmt: skip
    assert data.tags == ["verl", "reinforcement-learning", "grpo"] and data.datasets == ["org/data"]


def test_license_and_base_of_a_local_model_are_those_of_its_card(tmp_path):
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: org/first\n---\ntext")
    out = tmp_path / "out"
    out.mkdir()
    written(out, settings_of(), base=BaseFiles(str(tmp_path)))
    data = ModelCard.load(out / "README.md").data
    assert (data.license, data.base_model) == ("apache-2.0", "org/first")


def test_a_card_has_recipe_data_curves_and_evaluation(tmp_path):
    rows = [{"step": i, "reward": i / 100, "loss": None} for i in range(1, 61)]
    rows[0]["eval/accuracy"], rows[29]["eval/accuracy"], rows[50]["eval/accuracy"] = 0.25, 0.75, 0.9
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": ')
    text = written(
        tmp_path,
        settings_of("data.train=task:add-2", "policy.optimizer.lr=3e-5"),
        run_folder=tmp_path,
        num_rows=7500,
    )
    assert "reinforcement learning (advantage `grpo`, loss `ppo_clip`), 30 steps" in text
    assert "| `policy.optimizer.lr` | `3e-05` |" in text and "`policy.optimizer.betas`" not in text
    assert "training: `task:add-2`, 7500 rows" in text
    assert "| `eval/accuracy` | 0.250 | 0.750 |" in text
    assert "| 1 | 0.010 |\n" in text and "| 30 | 0.300 |\n" in text and "| 31 |" not in text
    assert "transformers " in text and "AutoModelForCausalLM.from_pretrained(folder)" in text


@pytest.mark.parametrize(
    ("config", "kind", "method", "loader"),
    [
        (SFTConfig(), "PolicyModel", "supervised fine-tuning", "AutoModelForCausalLM"),
        (RewardModelConfig(), "RewardModel", "loss `bradley_terry`", "AutoModelForSequenceClassification"),
        (SFTConfig(), "ValueModel", "supervised fine-tuning", "value_head.safetensors"),
    ],
)
def test_each_kind_of_model_says_how_it_was_trained_and_is_loaded(config, kind, method, loader, tmp_path):
    text = written(tmp_path, config.model_dump(mode="json"), kind=kind)
    assert method in text and loader in text


def test_a_card_has_no_keys_addresses_and_folders(tmp_path):
    text = written(
        tmp_path,
        settings_of(
            "data.train=/home/someone/secret project/rows.jsonl",
            "rewards.functions=[{name: /home/someone/score.py:f, api_key: abc123, url: 'http://10.0.0.7:80/v1'}]",
            "reference=/home/someone/models/ref",
        ),
        base=BaseFiles("/home/someone/models/base"),
    )
    assert "rows.jsonl" in text and "score.py:f" in text
    private = ("/home", "someone", "abc123", "10.0.0.7", "secret project")
    assert [word for word in private if word in text] == []


def test_words_that_look_private_are_not_shown():
    assert public_name("/a/b/model/") == "model" and public_name("~/x/y.jsonl") == "y.jsonl"
    assert public_name("Qwen/Qwen2.5-0.5B") == "Qwen/Qwen2.5-0.5B"
    assert public_name("see hf_abcdefghijkl and s3://bucket/x") == "see (not shown) and (not shown)"
    assert public_value({"token": "x", "max_tokens": 4, "paths": ["/a/b"]}) == {
        "token": "(not shown)", "max_tokens": 4, "paths": ["b"],
    }  # fmt: skip
