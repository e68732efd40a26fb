"""The same recipe with the policy itself and with servers that follow it: what it learns, what it says, and
what it refuses.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from tests.training import CHARACTERS, toy_trainer
from verl.config.rollout import RolloutConfig
from verl.engines.hf.pretrained import make_tiny_model
from verl.monitoring.mismatch_limits import check_mismatch
from verl.rollout.pool.admin_api import ENDPOINT_FILE, call_admin_api

SETTINGS = ("steps=3", "sampling.max_tokens=6")
SERVERS = "rollout={engine: served, servers: 2}"


@pytest.mark.servers
def test_with_servers_a_run_learns_what_it_learns_alone(letters, tmp_path):
    alone = toy_trainer("grpo", letters, tmp_path / "alone", *SETTINGS)
    expected = [alone.step() for _ in range(3)]
    served = toy_trainer("grpo", letters, tmp_path / "served", *SETTINGS, SERVERS)
    try:
        for theirs, ours in zip(expected, [served.step() for _ in range(3)], strict=True):
            keys = ("reward", "response_tokens", "loss", "grad_norm")
            assert {key: ours[key] for key in keys} == pytest.approx(
                {key: theirs[key] for key in keys}, rel=1e-4, abs=1e-6
            )
            assert ours["sampler_gap"] <= ours["sampler_gap_max"] < 1e-4 and ours["engines/serving"] == 2
            assert ours["engines/sync_bytes"] > 0
        engines_of_a_run_are_listed_added_and_removed(served, tmp_path / "served" / "run")
    finally:
        served.close()
    assert not (tmp_path / "served" / "run" / ENDPOINT_FILE).exists()


@pytest.mark.ray
def test_servers_follow_a_policy_that_is_spread_over_ranks(letters, tmp_path):
    alone = toy_trainer("grpo", letters, tmp_path / "alone", *SETTINGS)
    expected = [alone.step() for _ in range(3)]
    spread = "placement={name: colocated, devices: [2], address: local}"
    trainer = toy_trainer(
        "grpo", letters, tmp_path / "spread", *SETTINGS, spread, "rollout={engine: served, servers: 1}"
    )
    try:
        for theirs, ours in zip(expected, [trainer.step() for _ in range(3)], strict=True):
            keys = ("reward", "response_tokens", "loss", "grad_norm")
            assert {key: ours[key] for key in keys} == pytest.approx(
                {key: theirs[key] for key in keys}, rel=2e-4, abs=1e-6
            )
            assert ours["sampler_gap_max"] < 1e-4 and ours["engines/sync_bytes"] > 0
    finally:
        trainer.close()


@pytest.mark.vllm
def test_with_vllm_in_its_process_a_loaded_model_is_trained_and_followed(tmp_path, monkeypatch):
    # Plugins of other packages beside vLLM are none of ours.
    monkeypatch.setenv("VLLM_PLUGINS", "")
    trainer = followed(tmp_path, "rollout={engine: vllm, engine_options: {max_model_len: 64}}", use_vllm=True)
    try:
        check_followed(trainer)
    finally:
        trainer.close()


@pytest.mark.sglang
def test_an_sglang_server_follows_its_policy(tmp_path):
    trainer = followed(tmp_path, "rollout={engine: sglang, servers: 1, servers_sleep: true}")
    try:
        check_followed(trainer)
    finally:
        trainer.close()


def followed(folder, *overrides: str, **given):
    """A run on a loaded model with heads of a size that every engine knows."""
    make_tiny_model(folder / "model", hidden=128, layers=2, characters=CHARACTERS)
    loaded = AutoModelForCausalLM.from_pretrained(folder / "model")
    return toy_trainer(
        "grpo",
        folder / "model",
        folder,
        *SETTINGS,
        "policy.optimizer.lr=1e-2",
        *overrides,
        actor_model=loaded,
        **given,
    )


def check_followed(trainer):
    start = [p.detach().clone() for p in trainer.groups.policy.worker.model.parameters()]
    for _ in range(3):
        metrics = trainer.step()
        assert metrics["sampler_gap_max"] < 1e-3 and 0 < metrics["sampler_gap"] < 1e-4
    moved = max(
        float((p - q).abs().max())
        for p, q in zip(trainer.groups.policy.worker.model.parameters(), start, strict=True)
    )
    assert moved > 1e-3  # old weights would not have these logprobs


def engines_of_a_run_are_listed_added_and_removed(trainer, folder):
    def verl(*args: str) -> subprocess.CompletedProcess:
        # The secret of the run must not go to a proxy; at port 9 there is none that could answer.
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "no_proxy": "", "NO_PROXY": ""}
        command = [sys.executable, "-m", "verl.cli.main", *args]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment)

    listed = verl("engines", "list", str(folder))
    assert (
        listed.returncode == 0
        and "served-0" in listed.stdout
        and "served-1" in listed.stdout
        and "serving" in listed.stdout
    )
    assert call_admin_api(folder, "POST", "/engines", {"name": "third", "address": None}) == {"name": "third"}
    assert verl("engines", "remove", str(folder), "served-0").returncode == 0
    trainer.step()
    states = {row["name"]: row["state"] for row in call_admin_api(folder, "GET", "/engines")["engines"]}
    assert states.keys() == {"served-0", "served-1", "third"} and states["served-0"] in ("draining", "gone")
    unknown = verl("engines", "remove", str(folder), "nobody")
    assert unknown.returncode == 2 and "need the name of an engine, got 'nobody'" in unknown.stderr
    known = json.loads((folder / ENDPOINT_FILE).read_text())
    assert (folder / ENDPOINT_FILE).stat().st_mode & 0o077 == 0
    (folder / ENDPOINT_FILE).write_text(json.dumps({**known, "secret": "guessed"}))
    assert "need the secret of this run" in verl("engines", "list", str(folder)).stderr


def test_a_folder_without_a_run_has_no_engines(tmp_path):
    with pytest.raises(ValueError, match="need the output_dir of a run that works and has servers"):
        call_admin_api(tmp_path, "GET", "/engines")


def test_a_difference_of_sampler_and_trainer_is_told_and_may_end_the_run():
    metrics = {"kl_sampler": 0.02, "sampler_gap": 0.1, "sampler_gap_max": 3.0}
    (told,) = check_mismatch(metrics, RolloutConfig())
    assert "KL 0.02 nats per token, logprobs by 0.1 on average and at most 3" in told
    assert (
        check_mismatch({**metrics, "kl_sampler": 0.005}, RolloutConfig())
        == check_mismatch({}, RolloutConfig())
        == []
    )
    with pytest.raises(RuntimeError, match="the limit rollout.mismatch_stop is 0.01"):
        check_mismatch(metrics, RolloutConfig(mismatch_stop=0.01))
    with pytest.raises(RuntimeError, match="KL nan"):
        check_mismatch({"kl_sampler": float("nan")}, RolloutConfig(mismatch_stop=0.01))


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        (
            "{engine: served}",
            "need servers for rollout.engine served, got rollout.servers 0 and no rollout.addresses",
        ),
        ("{engine: http, servers: 2}", "need servers that run already for rollout.engine http"),
        ("{servers: 2}", "rollout.servers .* would be ignored: rollout.engine is embedded"),
        ("{engine: vllm, python: x}", "rollout.python .* would be ignored: there are no servers"),
    ],
)
def test_settings_of_engines_that_do_not_fit_are_refused(rollout, message, letters, tmp_path):
    with pytest.raises(ValueError, match=message):
        toy_trainer("grpo", letters, tmp_path, f"rollout={rollout}")
