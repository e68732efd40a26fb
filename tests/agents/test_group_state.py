import io

import torch

from verl.agents.group_state import groups_from, saved_groups
from verl.agents.groups import Group
from verl.data.trajectory import EpisodeRecord, Segment, Trajectory
from verl.utils.sampling_types import Prompt


def test_an_episode_of_two_segments_is_the_same_after_a_checkpoint():
    prompt = Prompt("?", index=4)
    record = EpisodeRecord(
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}],
        [{"type": "function"}],
        "max_turns",
        {"reward": 1.0, "won": 0.0},
        [0.5, 0.5],
        {"turns": 2.0},
    )
    answer = Trajectory(prompt, [1, 2], [3, 4], [True, False], [-0.5, 0.0], [0, 1], group=0, reward=1.0)
    answer.earlier = [Segment([1], [7], [True], [-0.25], [0])]
    answer.episode = record
    group = Group(0, prompt, oldest=0, answers=[answer], arrival=0)
    file = io.BytesIO()
    torch.save(saved_groups([group]), file)
    file.seek(0)
    (restored,) = groups_from(torch.load(file, weights_only=True), {4: prompt})
    assert restored.answers == [answer]
