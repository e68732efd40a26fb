"""The switch between the layouts of training and generation, on processes that exchange weights."""

from __future__ import annotations

import pytest
import torch

from tests.distributed import on_ranks
from tests.tiny import random_prompts, tiny_codec, tiny_transformer
from verl.engines.hf.models import PolicyModel
from verl.engines.hf.pretrained import load_language_model
from verl.rollout.embedded.generator import EmbeddedEngine
from verl.utils.sampling_types import SamplingParams

pytestmark = pytest.mark.distributed

PROMPTS = random_prompts([3, 7, 1, 5])
SMALL, LARGE = 2**11, 2**28
# Layouts of training, and tensor-parallel sizes of generation.
CASES = [
    {"parallel": {}, "tensor": 2, "overlap": True, "bucket": SMALL},
    {"parallel": {}, "tensor": 4, "overlap": True, "bucket": LARGE},
    {"parallel": {}, "tensor": 1, "overlap": False, "bucket": SMALL},
    {"parallel": {"tensor": 2}, "tensor": 4, "overlap": True, "bucket": SMALL},
    {"parallel": {"tensor": 2}, "tensor": 2, "overlap": False, "bucket": LARGE},
    {"parallel": {"tensor": 2}, "tensor": 1, "overlap": True, "bucket": SMALL},
    {"parallel": {"tensor": 4}, "tensor": 2, "overlap": True, "bucket": SMALL},
    {"parallel": {"replicas": 2}, "tensor": 2, "overlap": True, "bucket": SMALL},
    {"parallel": {"sequence": 2}, "tensor": 2, "overlap": True, "bucket": SMALL},
    {"parallel": {}, "tensor": 2, "overlap": True, "bucket": SMALL, "lora": True},
    {"parallel": {}, "tensor": 2, "overlap": True, "bucket": SMALL, "precision": "bf16"},
    {"parallel": {}, "tensor": 2, "overlap": True, "bucket": SMALL, "idle": True},
    {"parallel": {"tensor": 4}, "tensor": 4, "overlap": True, "bucket": SMALL},
]


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    # 100 tokens in shards of 25 are uneven in rows of a head; 4 key-value heads let 4 ranks share a matrix.
    folder = tmp_path_factory.mktemp("model")
    tiny_transformer(num_key_value_heads=4, tie_word_embeddings=True, intermediate_size=68).save_pretrained(
        folder
    )
    return str(folder)


@pytest.fixture(scope="module")
def results(source) -> list[list[dict]]:
    by_rank = on_ranks(
        "tests.rollout.embedded.hybrid_runs:switches",
        4,
        [{**case, "source": source} for case in CASES],
        PROMPTS,
        limit_s=400,
    )
    return [[ranks[i] for ranks in by_rank] for i in range(len(CASES))]


@pytest.mark.parametrize(
    "number", range(len(CASES)), ids=lambda i: f"{CASES[i]['parallel']}->{CASES[i]['tensor']}-{i}"
)
def test_every_rank_has_its_slices_bit_for_bit_and_got_only_what_it_lacked(results, number):
    for ours in results[number]:
        assert ours["wrong"] == [] and ours["asleep"] == 0
        assert [received for received, _ in ours["switches"]] == [ours["lacking"]] * 2
        # No second copy of the model: the generation weights alone.
        assert all(held <= ours["target"] for _, held in ours["switches"])


def test_where_every_matrix_is_split_the_bytes_are_those_of_the_papers_formula(results):
    # Training tensor 4 -> generation tensor 2 on 4 ranks: (tp - tg pg) / (tg pg tp) M, of the weights that
    # are split.
    ours = results[6][0]
    split = ours["whole"] - replicated_bytes()
    assert ours["lacking"] == (4 - 2) * split // (2 * 4)


def replicated_bytes() -> int:
    return sum(
        p.numel() * 4
        for name, p in tiny_transformer(num_key_value_heads=4, intermediate_size=68).named_parameters()
        if "norm" in name
    )


def test_equal_layouts_move_nothing_and_share_their_storage(results):
    assert all(ours["switches"] == [(0, 0), (0, 0)] for ours in results[12])


def test_each_replica_answers_its_prompts_as_one_process_does(results, source):
    alone = EmbeddedEngine(PolicyModel(load_language_model(source), "fp32"), tiny_codec(), max_slots=8)
    expected = [
        g[0]
        for g in alone.generate(PROMPTS, [SamplingParams(max_tokens=5, seed=i) for i in range(len(PROMPTS))])
    ]
    compared = 0
    for case, ranks in zip(CASES, results, strict=True):
        if case.get("lora") or case.get("precision"):
            continue
        for ours in ranks:
            for (ids, logprobs), wanted in zip(ours["answers"], expected, strict=False):
                assert ids == wanted.token_ids, case
                torch.testing.assert_close(
                    torch.tensor(logprobs), torch.tensor(wanted.logprobs), atol=1e-5, rtol=1e-5
                )
                compared += 1
    assert compared > 50


def test_replicas_are_numbered_and_the_first_tensor_rank_of_each_collects(results):
    places = [ours["place"] for ours in results[0]]
    assert [(place.data_rank, place.collects) for place in places] == [
        (0, True),
        (1, True),
        (0, False),
        (1, False),
    ]
