import torch

from verl.algorithms.objective import Algorithm, write_advantages
from verl.config.algorithm import AlgorithmConfig
from verl.data.batch import Batch
from verl.data.episode_rows import EpisodeRows
from verl.data.packing import BatchPlan
from verl.data.trajectory import Segment, Trajectory
from verl.engines.minibatches import write_loss_weights
from verl.utils.sampling_types import Prompt


def segment(num_tokens: int, first: int = 5) -> Segment:
    ids = list(range(first, first + num_tokens))
    mask = [True] * (num_tokens - 1) + [False]
    return Segment([1, 2], ids, mask, [-0.5] * num_tokens, [0] * num_tokens)


def episode(lengths: list[int], *, group: int, reward: float, turns: list[float] = ()) -> Trajectory:
    *earlier, last = [segment(length) for length in lengths]
    trajectory = Trajectory(Prompt("?"), **vars(last), group=group, reward=reward)
    trajectory.earlier, trajectory.turn_rewards = list(earlier), list(turns)
    return trajectory


def bound(**settings) -> Algorithm:
    return Algorithm.bind(AlgorithmConfig.model_validate({"kl": {"where": "off"}, **settings}))


def test_an_episode_of_two_segments_has_two_rows_and_counts_once():
    split = [episode([3, 5], group=0, reward=1.0), episode([4], group=0, reward=0.0)]
    batch = Batch.from_trajectories(split)
    assert batch["episode_ends"].tolist() == [False, True, True]
    rows = EpisodeRows(batch)
    assert rows.episodes.num_rows == 2 and rows.episode_of.tolist() == [0, 0, 1]
    assert rows.episodes.response_lengths.tolist() == [3 + 1 + 5, 4]  # a masked position between segments
    assert rows.episodes["mask"][0].tolist() == [True] * 2 + [False] * 2 + [True] * 4 + [False]


def test_turns_at_the_border_of_two_segments_are_two():
    """Both segments are sampled from end to end: without a gap their turns would be one."""
    whole = [Segment([1], [5, 6], [True] * 2, [-0.5] * 2, [0] * 2) for _ in range(2)]
    split = Trajectory(Prompt("?"), **vars(whole[1]), group=0, reward=3.0)
    split.earlier, split.turn_rewards = [whole[0]], [2.0, 1.0]
    other = Trajectory(Prompt("?"), **vars(whole[0]), group=0, reward=0.0, turn_rewards=[0.0])
    batch = Batch.from_trajectories([split, other])
    write_advantages(batch, bound(advantage={"name": "grpo_turns", "normalize_std": False}), 0.0)
    # Turns of 2, 1 and 0 deviate by 1, 0 and -1 from their mean; each has what follows from it on.
    found = [values.tolist() for values in batch.ragged("advantages").values.split([2, 2, 2])]
    assert found == [[1.0, 1.0], [0.0, 0.0], [-1.0, -1.0]]


def test_advantages_of_segments_are_those_of_their_episode():
    """Three rows with rewards 1, 1, 0 would have a mean of 2/3; two episodes have one of 1/2."""
    batch = Batch.from_trajectories([episode([3, 5], group=0, reward=1.0), episode([4], group=0, reward=0.0)])
    algorithm = bound(advantage={"name": "grpo", "normalize_std": False})
    write_advantages(batch, algorithm, 0.0)
    found = [values.tolist() for values in batch.ragged("advantages").values.split([3, 5, 4])]
    assert found == [[0.5, 0.5, 0.0], [0.5] * 4 + [0.0], [-0.5] * 3 + [0.0]]


def test_loss_weights_of_segments_sum_to_that_of_one_episode():
    batch = Batch.from_trajectories([episode([3, 5], group=0, reward=1.0), episode([4], group=0, reward=0.0)])
    plan = BatchPlan([[[[2, 0, 1]]]])
    write_loss_weights(batch, plan, bound(aggregation="seq_mean_token_mean"))
    sums = batch["weights"].sum(1)
    torch.testing.assert_close(sums[:2].sum(), torch.tensor(0.5))
    torch.testing.assert_close(sums[2], torch.tensor(0.5))
    torch.testing.assert_close(batch["row_weights"], torch.tensor([0.25, 0.25, 0.5]))


def test_turn_rewards_lie_at_the_turns_of_their_segment():
    batch = Batch.from_trajectories(
        [episode([3, 4], group=0, reward=3.0, turns=[1.0, 2.0]), episode([3], group=0, reward=0.0)]
    )
    assert batch["turn_rewards"].tolist() == [[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_without_segments_nothing_is_copied():
    batch = Batch.from_trajectories([episode([3], group=0, reward=1.0)])
    assert EpisodeRows(batch).episodes is batch
