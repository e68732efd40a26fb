"""`verl plan reshard`: its figures, copies and drawings, and one clear message for what cannot be planned."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import verl
from verl.cli.main import main
from verl.monitoring.formatting import format_bytes
from verl.planner.reshard_report import format_seconds

TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 512,
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A folder with a configuration alone: weights are not needed."""
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("tiny/config.json").write_text(json.dumps(TINY))
    return "tiny"


def figures_of(*given: str) -> dict:
    assert main(["plan", "reshard", *given, "--json", "figures.json"]) == 0
    return json.loads(Path("figures.json").read_text())


def test_the_table_shows_the_plan_beside_the_paper_and_other_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    figures = figures_of("--model", "llama-7b", "--training", "tensor=8,data=2", "--generation", "tensor=2")
    shown = capsys.readouterr().out
    assert "6.74B weights, 13.5 GB, on 16 ranks" in shown
    rows = {
        cells[1].strip(): [cell.strip() for cell in cells[2:-1]]
        for line in shown.splitlines()
        if len(cells := line.split("│")) > 3
    }
    assert rows["share"] == ["0.376", "0.500", "0.876", "0.876", "0.938"]
    assert rows["in paper"] == ["0.375", "", "0.875", "0.875", "0.938"]
    assert rows["received"] == [format_bytes(way["received_bytes"]) for way in figures["ways"]]
    assert (
        "8 replicas of generation: [0, 4], [1, 5], [2, 6], [3, 7], ..." in shown
        and "several nodes" not in shown
    )
    assert figures["ways"][0]["received_bytes"] == max(figures["received_bytes"])
    assert (
        sum(figures["received_bytes"]) == sum(figures["sent_bytes"])
        and max(figures["from_other_nodes_bytes"]) == 0
    )


def test_the_copies_of_a_rank_are_all_that_it_receives_keeps_and_sends(tiny, capsys):
    sizes = ("--model", tiny, "--training", "fsdp=4,tensor=2", "--generation", "tensor=2", "--dtype", "fp32")
    figures = figures_of(*sizes)
    capsys.readouterr()
    assert main(["plan", "reshard", *sizes, "--copies", "5"]) == 0
    counted = {"keeps": 0, "from": 0, "to": 0}
    for line in capsys.readouterr().out.splitlines():
        kind = re.match(r"(?:bucket \d+ )?(keeps|from|to)", line)[1]
        size = 4
        for start, stop in re.findall(r"(\d+):(\d+)", line):
            size *= int(stop) - int(start)
        counted[kind] += size
    expected = {"keeps": "local_bytes", "from": "received_bytes", "to": "sent_bytes"}
    assert counted == {kind: figures[name][5] for kind, name in expected.items()}


def test_nodes_decide_what_travels_between_them(tiny, capsys):
    sizes = ("--model", tiny, "--training", "fsdp=8", "--generation", "tensor=2")
    together, apart = figures_of(*sizes, "--nodes", "1"), figures_of(*sizes, "--devices-per-node", "4")
    assert "the ranks of 4 of them are on several nodes" in capsys.readouterr().out
    assert max(together["from_other_nodes_bytes"]) == 0 < max(apart["from_other_nodes_bytes"])
    assert apart == figures_of(*sizes, "--nodes", "2")
    near = figures_of(*sizes, "--nodes", "2", "--grouping", "consecutive")
    assert [way["way"] for way in near["ways"]] == ["this plan", "by bucket", "HybridFlow-V", "DS-Chat"]
    assert near["ways"][0]["formula"] is None


def test_ranks_of_a_sequence_have_different_shards_under_fsdp_and_equal_weights_otherwise(tiny):
    generation = ("--generation", "tensor=2")
    sharded = figures_of("--model", tiny, "--training", "fsdp=4,sequence=2", *generation)
    assert sharded == figures_of("--model", tiny, "--training", "fsdp=8", *generation)
    equal = figures_of("--model", tiny, "--training", "tensor=4,sequence=2", *generation)
    assert (
        equal["received_bytes"]
        == figures_of("--model", tiny, "--training", "tensor=4,data=2", *generation)["received_bytes"]
    )


def test_layouts_that_are_equal_need_no_byte(tiny):
    figures = figures_of(
        "--model", f"{tiny}/config.json", "--training", "tensor=4,data=2", "--generation", "tensor=4"
    )
    assert figures["ways"][0]["received_bytes"] == figures["num_buckets"] == 0
    assert figures["ways"][0]["formula"] == 0 and figures["ways"][0]["num_messages"] == 0


@pytest.mark.parametrize(("name", "start"), [("plan.png", b"\x89PNG"), ("plan.svg", b"<?xml")])
def test_the_drawing_is_a_picture(name, start, tiny, capsys):
    assert (
        main(
            [
                "plan",
                "reshard",
                "--model",
                tiny,
                "--training",
                "pipeline=2,tensor=2",
                "--generation",
                "tensor=2",
                "--plot",
                name,
            ]
        )
        == 0
    )
    assert f"drawing: {name}" in capsys.readouterr().out
    assert Path(name).read_bytes().startswith(start) and Path(name).stat().st_size > 5000


def test_numbers_are_human_readable():
    assert [format_bytes(n) for n in (0, 999, 1e3, 15.13e6, 1.5e11)] == [
        "0 B",
        "999 B",
        "1 kB",
        "15.1 MB",
        "150 GB",
    ]
    assert [format_seconds(s) for s in (0.00844, 4.938)] == ["8.44 ms", "4.94 s"]


def test_planning_loads_no_model_library():
    given = ["plan", "reshard", "--model", "llama-7b", "--training", "tensor=2", "--generation", "tensor=1"]
    program = (
        f"import sys; from verl.cli.main import main; main({given}); "
        "print(*({'torch', 'transformers', 'matplotlib'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(verl.__file__).parents[1],
    )
    assert result.stdout.splitlines()[-1] == ""


MISTAKES = {
    "model": ({"--model": "llama-7"}, ["one of llama-7b", "got 'llama-7'; did you mean 'llama-7b'?"]),
    "no json": ({"--model": "notes.txt"}, ["need a configuration in JSON, got notes.txt"]),
    "no object": ({"--model": "list.json"}, ["need a configuration as a JSON object, got list"]),
    "family": ({"--model": "other.json"}, ["need a model of llama, mistral, qwen2", "got model_type 'gpt2'"]),
    "lacks": ({"--model": "lacks.json"}, ["need hidden_size in the configuration"]),
    "key": (
        {"--training": "tensr=2"},
        ["need sizes of training as name=number", "got 'tensr=2'; did you mean tensor?"],
    ),
    "generation key": ({"--generation": "data=2"}, ["of tensor, pipeline, experts, got 'data=2'"]),
    "number": (
        {"--training": "tensor=two"},
        ["need a number from 1 for tensor of training, got 'tensor=two'"],
    ),
    "no number": ({"--training": "tensor"}, ["need a number from 1 for tensor of training, got 'tensor'"]),
    "zero": ({"--generation": "tensor=0"}, ["need a number from 1 for tensor of generation"]),
    "twice": ({"--training": "tensor=2,tensor=4"}, ["need tensor of training once"]),
    "divide": (
        {"--generation": "tensor=3"},
        ["to divide those of training, got tensor=3 for 2 tensor ranks x 1 shards"],
    ),
    "heads": ({"--training": "tensor=3", "--generation": "tensor=1"}, ["got 8 queries for tensor=3"]),
    "key-value heads": ({"--training": "tensor=8"}, ["need key-value heads that tensor=8 divides, got 4"]),
    "stages": ({"--training": "pipeline=5,tensor=2"}, ["need at most as many stages as layers, got 5 for 4"]),
    "experts": ({"--training": "tensor=2,experts=2"}, ["need a model with experts"]),
    "generation experts": ({"--generation": "tensor=2,experts=4"}, ["got experts=4 for tensor=2"]),
    "nodes": ({"--nodes": "3"}, ["need --nodes that divide the 4 ranks of training, got 3"]),
    "devices": ({"--devices-per-node": "0"}, ["need --devices-per-node from 1"]),
    "bucket": ({"--bucket-mib": "0"}, ["need --bucket-mib from 1"]),
    "rank": ({"--copies": "4"}, ["need a rank from 0 to 3, got 4"]),
    "picture": (
        {"--plot": "plan.txt"},
        ["need --plot with a picture that ends with .png, .svg, .pdf, got 'plan.txt'"],
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_message(mistake, tiny, capsys):
    Path("notes.txt").write_text("no JSON")
    Path("list.json").write_text("[]")
    Path("other.json").write_text('{"model_type": "gpt2"}')
    Path("lacks.json").write_text('{"model_type": "llama"}')
    changes, messages = MISTAKES[mistake]
    given = {"--model": tiny, "--training": "tensor=2,data=2", "--generation": "tensor=2", **changes}
    assert main(["plan", "reshard", *(word for pair in given.items() for word in pair)]) == 2
    told, shown = capsys.readouterr()
    assert told == "" and shown.startswith("verl: ") and "Traceback" not in shown and len(shown) < 500
    assert [message for message in messages if message not in shown] == []


@pytest.mark.parametrize(
    "given", [["plan"], ["plan", "resard"], ["plan", "reshard"], ["plan", "reshard", "--dtype", "int8"]]
)
def test_a_command_line_that_is_none_ends_with_2(given, capsys):
    with pytest.raises(SystemExit) as ended:
        main(given)
    assert ended.value.code == 2
    assert "usage: verl plan" in capsys.readouterr().err
