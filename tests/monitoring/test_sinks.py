"""Each sink, alone and after a resume."""

from __future__ import annotations

import math
import sys
import time

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.monitoring.trackers import METRICS, lines_of, screen, shown, tracker
from verl.config.run import TrackingConfig
from verl.monitoring.sinks import Run
from verl.monitoring.tracking import Tracker


def test_every_step_is_a_line_of_valid_json_on_disk_at_once(tmp_path):
    out = tracker(tmp_path, "jsonl")
    out.log(1, {"reward": 0.5, "kl": math.nan, "entropy": math.inf})
    assert (
        tmp_path / "metrics.jsonl"
    ).read_text() == '{"step": 1, "reward": 0.5, "kl": null, "entropy": null}\n'


def test_a_resumed_run_has_each_step_once_and_no_torn_line(tmp_path):
    first = tracker(tmp_path, "jsonl")
    for step in (1, 2, 3, 4):
        first.log(step, {"reward": float(step)})
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "rew')
    second = tracker(tmp_path, "jsonl", first_step=3)
    second.log(3, {"reward": 30.0})
    second.close()
    assert [(line["step"], line["reward"]) for line in lines_of(tmp_path / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_a_new_run_in_the_same_folder_begins_with_its_own_step_0(tmp_path):
    for reward in (1.0, 2.0):
        out = tracker(tmp_path, "jsonl", first_step=1)
        out.log(0, {"reward": reward})
        out.close()
    assert lines_of(tmp_path / "metrics.jsonl") == [{"step": 0, "reward": 2.0}]


def test_a_line_that_lacks_only_its_end_is_kept_when_a_run_resumes(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "reward": 1.0}\n{"step": 2, "reward": 2.0}')
    out = tracker(tmp_path, "jsonl", first_step=3)
    out.log(3, {"reward": 3.0})
    assert [line["step"] for line in lines_of(tmp_path / "metrics.jsonl")] == [1, 2, 3]


def test_tensorboard_shows_the_resumed_curve_only(tmp_path):
    first = tracker(tmp_path, "tensorboard", first_step=1)
    for step in (1, 2, 3):
        first.log(step, {"reward": 3.0 * step})
    first.close()
    time.sleep(1.1)  # Event files are ordered by names that count whole seconds.
    second = tracker(tmp_path, "tensorboard", first_step=2)
    for step in (2, 3):
        second.log(step, {"reward": 2.0 * step})
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 3.0), (2, 4.0), (3, 6.0)]


def test_the_console_has_one_aligned_plain_line_per_step_within_80_columns(tmp_path):
    console = screen()
    out = tracker(tmp_path, "console", console=console, total_steps=100_000)
    out.log(1, METRICS)
    out.log(
        99_999,
        METRICS | {"reward": -1.234e-5, "kl": -123456.0, "entropy": -999.99, "response_tokens": 131072.0},
    )
    header, first, second = shown(console)
    assert header.split() == [
        "step",
        "reward",
        "accuracy",
        "length",
        "KL",
        "entropy",
        "tokens/s",
        "seconds",
        "left",
    ]
    assert first.split() == [
        "1/100000",
        "0.250",
        "0.500",
        "120.0",
        "0.001",
        "2.000",
        "12.3k",
        "60.00",
        "69d",
        "10h",
    ]
    assert len(header) == len(first) == len(second) <= 80
    assert second.split()[1:6] == ["-1e-05", "0.500", "131.1k", "-123.5k", "-1000.0"]
    assert "\x1b" not in console.file.getvalue()


def test_metrics_that_are_absent_are_a_dash_and_a_step_without_any_is_silent(tmp_path):
    console = screen()
    out = tracker(tmp_path, "console", console=console)
    out.log(0, {"eval/accuracy": 0.5})
    out.log(1, {"reward": 1.0})
    assert shown(console)[1].split() == ["1/100", "1.000", "-", "-", "-", "-", "-", "-", "-"]
    assert len(shown(console)) == 2


def test_fine_tuning_shows_its_loss_in_place_of_rewards(tmp_path):
    console = screen()
    tracker(tmp_path, "console", console=console).log(
        1, {"loss": 2.5, "response_tokens": 3.0, "entropy": 1.0, "seconds": 0.5}
    )
    header, first = shown(console)
    assert header.split() == ["step", "loss", "length", "entropy", "tokens/s", "seconds", "left"]
    assert first.split() == ["1/100", "2.500", "3.000", "1.000", "-", "0.500", "0:50"]


def test_the_header_is_repeated_rarely_and_the_time_left_follows_the_recent_pace(tmp_path):
    console = screen()
    out = tracker(tmp_path, "console", console=console, total_steps=60)
    for step in range(1, 61):
        out.log(step, METRICS | {"seconds": 100.0 if step <= 25 else 2.0})
    lines = shown(console)
    assert [i for i, line in enumerate(lines) if "reward" in line] == [0, 26, 52]
    assert lines[1].endswith("1:38:20")
    assert lines[51 + 1].endswith("left") and lines[51].endswith("0:20") and lines[-1].endswith("0:00")


def test_an_unknown_sink_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="got 'tensorbord'; did you mean 'tensorboard'?"):
        tracker(tmp_path, "tensorbord")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_whose_package_is_missing_says_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"need the package {name} .* pip install {name}, or"):
        tracker(tmp_path, name)


def test_a_sink_that_cannot_start_ends_the_run_before_it_begins(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(RuntimeError, match="sink 'jsonl' could not start: .* take it out of tracking.sinks"):
        tracker(tmp_path, "jsonl")


def test_mlflow_goes_on_with_the_same_run_after_a_resume(tmp_path):
    mlflow = pytest.importorskip("mlflow")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    for first_step in (1, 2):
        out = tracker(tmp_path, "mlflow", first_step=first_step)
        out.log(first_step, {"eval/pass@8": float(first_step)})
        assert out.failures == {}
        out.close()
    history = mlflow.MlflowClient().get_metric_history(
        (tmp_path / "mlflow_run_id").read_text(), "eval/pass_8"
    )
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0)]


def test_wandb_keeps_its_run_id_over_a_resume_and_takes_a_new_one_for_a_new_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for first_step in (1, 2, 1):
        out = tracker(tmp_path, "wandb", first_step=first_step)
        out.log(first_step, METRICS)
        out.close()
        assert out.failures == {}
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1] != ids[2]
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) == 3


def test_a_run_has_a_name_and_a_group(tmp_path):
    config = TrackingConfig(sinks=("tensorboard",), name="second try", group="seeds")
    Tracker(config, tmp_path, console=screen(), total_steps=2).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (text,) = events.Tensors("run/text_summary")
    assert b"second try" in text.tensor_proto.string_val[0] and b"seeds" in text.tensor_proto.string_val[0]
    assert Run(TrackingConfig(), tmp_path, 2, 0, screen()).name == tmp_path.name
