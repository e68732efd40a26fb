"""Fingerprints change with all that changes an answer or its reward, and with nothing else."""

from __future__ import annotations

import shutil

import pytest

from tests.training import toy_trainer
from verl.trainer.evaluation import identity
from verl.trainer.evaluation.answering import questions_of
from verl.trainer.evaluation.identity import (
    digest_of_code,
    digest_of_file,
    digest_of_files,
    digest_of_model,
    identity_of,
)


def identity_with(letters, folder, *overrides):
    trainer = toy_trainer("grpo", letters, folder, "evaluation.samples=2", *overrides)
    questions = questions_of(trainer.test_sets, trainer.config, trainer.codec)
    return identity_of(trainer.config, trainer.test_sets, questions, trainer.codec)


@pytest.mark.parametrize(
    "override, part",
    [
        ("evaluation.temperature=0.5", "sampling"),
        ("evaluation.samples=3", "sampling"),
        ("evaluation.greedy=true", "sampling"),
        ("evaluation.prompts=2", "data"),
        ("rewards.functions=[exact]", "rewards"),
        ("policy.precision=bf16", "engine"),
        ("evaluation.pass_at=[1]", None),
        ("rollout.max_slots=3", None),
        ("steps=7", None),
        ("rewards.timeout_s=9", None),
    ],
)
def test_each_part_knows_its_settings(letters, tmp_path, override, part):
    before, after = identity_with(letters, tmp_path), identity_with(letters, tmp_path, override)
    changed = {name for name in before if before[name] != after[name]}
    # The prompts that are asked for are part of both.
    assert changed - ({"sampling"} if part == "data" else set()) == ({part} if part else set())


def test_a_changed_reward_file_is_another_reward(letters, tmp_path):
    code = tmp_path / "mine.py"
    code.write_text("def one(trajectory):\n    return 1.0\n")
    before = identity_with(letters, tmp_path, f"rewards.functions=['{code}:one']")
    code.write_text("def one(trajectory):\n    return 0.5\n")
    after = identity_with(letters, tmp_path, f"rewards.functions=['{code}:one']")
    assert before["rewards"] != after["rewards"] and before["data"] == after["data"]


def test_a_model_is_known_by_its_files_wherever_they_are(letters, tmp_path):
    copied = shutil.copytree(letters, tmp_path / "copy")
    assert digest_of_model(str(copied)) == digest_of_model(str(letters))
    (copied / "README.md").write_text("more")
    assert digest_of_model(str(copied)) == digest_of_model(str(letters))
    weights = copied / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert digest_of_model(str(copied)) != digest_of_model(str(letters))


def test_a_large_file_is_known_by_blocks_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(identity, "_WHOLE_BYTES", 1000)
    path = tmp_path / "weights"
    path.write_bytes(bytes(70_000))
    before = digest_of_file(path)
    path.write_bytes(bytes(69_999) + b"1")
    assert digest_of_file(path) != before
    path.write_bytes(bytes(69_999))
    assert digest_of_file(path) != before


@pytest.mark.parametrize("name", ["judge", "judge_pairwise", "judge_ranking", "by_data_source"])
def test_rewards_without_a_function_of_their_own_have_a_fingerprint(name):
    assert digest_of_code(name) == name
    assert digest_of_code("exact") != digest_of_code("math")


def test_files_and_models_that_a_reward_function_reads_are_part_of_it(tmp_path, letters):
    rubric, schema = tmp_path / "rubric.md", tmp_path / "schema.json"
    rubric.write_text("Be brief.")
    schema.write_text("{}")
    options = {"rubric": str(rubric), "schema_file": str(schema), "scale": [1, 5], "template": "x" * 5000}
    before = digest_of_files(options)
    assert before == digest_of_files(options | {"cache": str(rubric)})
    rubric.write_text("Be long.")
    assert before != digest_of_files(options) != digest_of_files({**options, "rubric": "Be long."})
    assert digest_of_files({"path": str(letters)}) != digest_of_files({"path": str(tmp_path)})
