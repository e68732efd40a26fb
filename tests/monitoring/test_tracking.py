"""The clock, every sink, and what people see: lines, curves and tables."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from verl.config.run import TrackingConfig
from verl.monitoring.tracking import SINKS, Clock, Sink, Tracker, samples_table, save_curve, terminal_curve

METRICS = {
    "reward": 0.25,
    "accuracy": 0.5,
    "response_tokens": 120.0,
    "kl": 0.001,
    "entropy": 2.0,
    "tokens_per_s": 12345.0,
    "seconds": 60.0,
}


def tracker(folder: Path, *sinks: str, console: Console | None = None, **steps: int) -> Tracker:
    return Tracker(
        TrackingConfig(sinks=sinks), folder, console=console or screen(), **{"total_steps": 100} | steps
    )


def screen(width: int = 80) -> Console:
    return Console(file=io.StringIO(), width=width)


def shown(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_the_clock_sums_phases_and_starts_again():
    clock = Clock()
    for _ in range(2):
        with clock.phase("generate"):
            time.sleep(0.02)
    with clock.phase("update"):
        pass
    taken = clock.take()
    assert 0.04 <= taken["time/generate_s"] < 0.5
    assert taken["time/update_s"] < 0.02
    assert clock.take() == {}


def test_the_clock_waits_for_queued_work_and_counts_it():
    clock = Clock(wait=lambda: time.sleep(0.02))
    with clock.phase("update"):
        pass
    assert clock.take()["time/update_s"] >= 0.02


def test_phases_do_not_nest_and_an_error_ends_one():
    clock = Clock()
    with (
        pytest.raises(AssertionError, match="'b' began inside phase 'a'"),
        clock.phase("a"),
        clock.phase("b"),
    ):
        pass
    with clock.phase("c"):
        pass
    assert set(clock.take()) == {"time/a_s", "time/c_s"}


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


def test_events_are_lines_between_the_steps_and_never_wrapped(tmp_path):
    console = screen(width=80)
    tracker(tmp_path, "console", console=console).event(f"checkpoint written to {'a' * 90} [bold]")
    tracker(tmp_path, "jsonl", console=console).event("nobody asked")
    assert shown(console) == [f"checkpoint written to {'a' * 90} [bold]"]


def test_samples_are_one_json_line_each_whatever_the_model_wrote(tmp_path):
    rows = [
        {
            "prompt": "2 + 2",
            "response": "四\ud800\n",
            "reward": 1.0,
            "scores": {"math": math.nan},
            "finish": "stop",
        }
    ]
    tracker(tmp_path, "jsonl").samples(10, rows)
    (row,) = lines_of(tmp_path / "samples" / "step-000010.jsonl")
    assert row == rows[0] | {"scores": {"math": None}}


class Broken(Sink):
    """Fails at every step."""

    def log(self, step, metrics):
        raise OSError("no space left on device")


def test_a_sink_that_fails_is_reported_once_counted_and_stops_nobody(tmp_path, monkeypatch):
    monkeypatch.setitem(SINKS, "broken", Broken)
    console = screen(width=200)
    out = tracker(tmp_path, "broken", "jsonl", console=console)
    for step in (1, 2, 3):
        out.log(step, METRICS)
    assert shown(console) == ["broken failed and is skipped where it fails: OSError: no space left on device"]
    out.close()
    out.close()
    assert shown(console)[1:] == ["broken: 3 of its writes failed; the run was not affected"]
    assert out.failures == {"broken": 3}
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 3


def test_samples_that_cannot_be_written_stop_nobody(tmp_path):
    (tmp_path / "samples").write_text("in the way")
    out = tracker(tmp_path)
    out.samples(1, [{"prompt": "p"}])
    assert out.failures == {"samples": 1}


def test_a_closed_pipe_does_not_end_the_run(tmp_path):
    program = (
        "import sys; from pathlib import Path; from verl.config.run import TrackingConfig; from verl.monitoring.tracking import Tracker\n"
        "out = Tracker(TrackingConfig(sinks=('console', 'jsonl')), Path(sys.argv[1]), total_steps=9)\n"
        "sys.stdin.read()\n"
        "for step in (1, 2, 3): out.log(step, {'reward': 1.0})\n"
        "out.close()"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    run.stdout.close()  # Like `| head`, before the first line.
    run.stdin.close()
    assert run.wait(60) == 0
    assert len(lines_of(tmp_path / "metrics.jsonl")) == 3


def test_an_unknown_sink_is_an_error_that_names_the_nearest(tmp_path):
    with pytest.raises(ValueError, match="got 'tensorbord'; did you mean 'tensorboard'?"):
        tracker(tmp_path, "tensorbord")


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_sink_whose_package_is_missing_says_how_to_get_it(tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"need the package {name} .* pip install verl\[{name}\]"):
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


def test_what_is_not_chosen_is_not_loaded():
    program = "import sys, verl.monitoring.tracking; print(*({'torch', 'matplotlib', 'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        == "\n"
    )


def test_a_curve_rises_from_the_lower_left_to_the_upper_right():
    lines = terminal_curve([0.0, 1.0, 2.0, 3.0], width=30, height=4, title="reward").splitlines()
    assert lines[0] == "reward"
    assert [line.split(" ")[0] for line in lines[1:5]] == ["3.000", "", "1.000", "0.000"]
    starts = [len(line) - len(line.split("┤")[1].lstrip()) for line in lines[1:5]]
    assert starts == sorted(starts, reverse=True) and len(set(starts)) == 4
    assert max(map(len, lines)) == 30 and lines[-1].split() == ["1", "4"]


def test_a_straight_line_has_its_dots_on_one_level():
    middle = [
        line
        for line in terminal_curve([2.0] * 9, width=20, height=3).splitlines()
        if "⠤" in line or "⠒" in line
    ]
    assert len(middle) == 1 and set(middle[0].split("┤")[1]) <= {"⠤", "⠒"}


def test_many_values_are_averaged_and_those_that_are_not_finite_bridged():
    noisy = [index % 2 + math.sin(index / 1000) for index in range(10_000)]
    assert max(map(len, terminal_curve(noisy, width=40).splitlines())) == 40
    bridged = terminal_curve([0.0, math.nan, 2.0], width=20, height=3)
    assert bridged == terminal_curve([0.0, 1.0, 2.0], width=20, height=3)
    assert terminal_curve([math.nan], title="reward") == "reward: no finite values"


def test_several_curves_have_a_letter_each_and_a_legend():
    text = terminal_curve({"ppo": [1.0, 1.0], "grpo": [0.0, 0.0]}, width=20, height=3)
    top, _, bottom, *_, legend = text.splitlines()
    assert set(top.split("┤")[1]) == {"a"} and set(bottom.split("┤")[1]) == {"b"}
    assert legend == "a ppo   b grpo"


def test_a_saved_curve_is_a_picture_and_leaves_pyplot_alone(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    save_curve(
        tmp_path / "new" / "reward.png",
        [1, 2, 3],
        [0.1, 0.5, math.nan],
        title="reward",
        ylabel="reward per answer",
    )
    assert (tmp_path / "new" / "reward.png").read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_the_table_of_samples_shows_text_as_it_is_and_lets_nothing_steer_the_terminal():
    console = screen(width=100)
    rows = [
        {"prompt": "2 + 2 [red]?", "response": "\x1b[2Jfour", "reference": 4, "reward": 0.5},
        {"prompt": "x" * 5000},
    ]
    console.print(samples_table(rows))
    text = console.file.getvalue()
    assert all(
        part in text for part in ("prompt", "answer", "reference", "2 + 2 [red]?", "four", "0.500", "…")
    )
    assert "\x1b" not in text and text.count("x") < 700
