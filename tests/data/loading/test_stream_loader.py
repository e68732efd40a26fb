"""Streams: checked when drawn, shuffled in a buffer, with exact continuation and epochs."""

from __future__ import annotations

import io
import json
from functools import partial

import pytest
import torch

from verl.config.data import DataConfig, DataSource
from verl.data.loading.loader_factory import build_loader
from verl.data.loading.row_prompts import RowPrompts
from verl.data.loading.stream_loader import StreamLoader
from verl.data.reading.layouts import prompt_of
from verl.data.reading.row_stream import open_rows


def written(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def numbered(folder, count):
    return written(folder, *({"prompt": f"p{i}"} for i in range(count)))


def loader(path, *, seed=0, admits=lambda prompt: True, **data):
    config = DataConfig(shuffle_buffer=data.pop("shuffle_buffer", 8), **data)
    source = DataSource(path=str(path), streaming=True, weight=1.0)
    make = RowPrompts(source, config, partial(prompt_of, config=config))
    return StreamLoader(open_rows(source, "train"), make, admits, config, seed=seed)


def contents(loader, n):
    return [prompt.content for prompt in loader.take(n)]


def saved(state):
    """What a checkpoint makes of a state."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_each_pass_has_every_row_once_in_a_new_order(tmp_path):
    stream = loader(numbered(tmp_path, 30))
    passes = [contents(stream, 30) for _ in range(3)]
    assert all(sorted(one) == sorted(f"p{i}" for i in range(30)) for one in passes)
    assert len({*map(tuple, passes), tuple(f"p{i}" for i in range(30))}) == 4
    assert stream.epochs == 3 and stream.num_prompts == 30
    stream.take(15)
    assert stream.epochs == 3.5


def test_without_shuffling_rows_come_as_they_stand_and_are_read_when_they_are_drawn(tmp_path):
    seen = []
    stream = loader(numbered(tmp_path, 9), shuffle=False, admits=lambda p: seen.append(p.content) or True)
    assert contents(stream, 4) == ["p0", "p1", "p2", "p3"] == seen
    assert contents(stream, 7) == ["p4", "p5", "p6", "p7", "p8", "p0", "p1"]


@pytest.mark.parametrize("before", [0, 1, 7, 22, 23, 29, 30, 31, 75])
def test_a_stream_goes_on_exactly_with_its_buffer(tmp_path, before):
    path = numbered(tmp_path, 30)
    one, other = loader(path), loader(path)
    if before:
        one.take(before)
    other.take(3)  # what was read before is forgotten
    other.load_state_dict(saved(one.state_dict()))
    assert one.take(70) == other.take(70)
    assert (one.epochs, one.take_metrics()) == (other.epochs, other.take_metrics())


def test_the_state_of_another_stream_is_refused(tmp_path):
    state = loader(numbered(tmp_path, 30)).state_dict()
    with pytest.raises(ValueError, match="seed was 0 and is 1"):
        loader(numbered(tmp_path, 30), seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="need the rows of .*rows.jsonl with which the run began"):
        loader(numbered(tmp_path, 31)).load_state_dict(state)


def test_a_malformed_row_stops_where_it_is_read_or_is_counted(tmp_path):
    path = written(tmp_path, {"prompt": "a"}, {"answer": "1"}, {"prompt": "b" * 9}, "{", {"prompt": "c"})
    with pytest.raises(ValueError, match=r"rows.jsonl, line 2: need a column .*data.on_malformed=skip"):
        loader(path).take(1)
    stream = loader(path, on_malformed="skip", admits=lambda prompt: len(prompt.content) < 5)
    assert sorted(contents(stream, 2)) == ["a", "c"]
    assert stream.take_metrics() == {"data/malformed_rows": 2, "data/too_long_rows": 1}
    assert [prompt.index for prompt in loader(numbered(tmp_path, 3), shuffle=False).take(4)] == [0, 1, 2, 3]


def test_a_stream_without_usable_rows_ends(tmp_path):
    with pytest.raises(ValueError, match="need at least one usable row in .* a whole pass of 2 rows: 2 malf"):
        loader(written(tmp_path, {"a": 1}, {"a": 2}), on_malformed="skip").take(1)
    with pytest.raises(ValueError, match="got none in a whole pass of 1 rows: 0 malformed, 1 too long"):
        _ = loader(numbered(tmp_path, 1), admits=lambda prompt: False).prompts  # before the first step
    with pytest.raises(ValueError, match="10000 rows in a row cannot be used"):
        loader(written(tmp_path, *["{}"] * 10_001), on_malformed="skip").take(1)


def test_streams_and_rows_are_mixed_by_weight(tmp_path):
    made = list(loader(numbered(tmp_path, 6)).prompts)
    known = [DataSource(path="known.jsonl", weight=1.0)]
    streams = [loader(numbered(tmp_path, 50)), loader(numbered(tmp_path, 50), seed=5)]
    sources = [*known, *(DataSource(path=f"s{i}", weight=2.0) for i in range(2))]
    mixed = build_loader(made, [6], sources, DataConfig(), seed=0, streams=streams)
    drawn = mixed.take(50)
    assert len({prompt.index for prompt in drawn if prompt.index >= 6}) == 40
    assert [mixed.prompt(p.index) is not None for p in drawn] == [p.index < 6 for p in drawn]
    assert mixed.take_metrics()["source/s1/share"] == 0.4
    assert mixed.num_prompts is None and mixed.epochs is None
    for sources, message in [
        ([*known, DataSource(path="s")], "need a weight for each source"),
        ([DataSource(path="known.jsonl"), DataSource(path="s")], "with a stream among them"),
    ]:
        with pytest.raises(ValueError, match=message):
            build_loader(made, [6], sources, DataConfig(), seed=0, streams=streams[:1])
    with pytest.raises(ValueError, match="need rows that can all be drawn for data.curriculum pass_rate"):
        curriculum = DataConfig.model_validate({"curriculum": "pass_rate"})
        build_loader([], [], [DataSource(path="s")], curriculum, seed=0, streams=streams[:1])
