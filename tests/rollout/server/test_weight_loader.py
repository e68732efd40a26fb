"""Weights into a model: which names count, and that the fingerprint is of what the model has."""

from __future__ import annotations

import pytest
import torch

from tests.tiny import tiny_transformer
from verl.rollout.server.weight_loader import WeightLoader
from verl.weight_sync.fingerprint import digest, fingerprint
from verl.weight_sync.types import TensorInfo, WeightChunk


def load_all(loader: WeightLoader, tensors: dict[str, torch.Tensor]) -> str:
    loader.begin()
    loader.load(
        [
            (TensorInfo(name, tuple(t.shape), str(t.dtype).removeprefix("torch.")), t)
            for name, t in tensors.items()
        ]
    )
    return loader.end()


@pytest.mark.parametrize("names", ["embedding", "head", "both"])
def test_a_tied_head_is_taken_by_either_of_its_names(names):
    model, source = tiny_transformer(), tiny_transformer(seed=1)
    tensors = dict(source.state_dict())
    left = {"embedding": "lm_head.weight", "head": "model.embed_tokens.weight", "both": ""}[names]
    tensors.pop(left, None)
    assert load_all(WeightLoader(model), tensors) == fingerprint(
        {name: digest(t) for name, t in tensors.items()}
    )
    assert all(torch.equal(own, source.state_dict()[name]) for name, own in model.state_dict().items())


def test_without_any_of_its_names_it_is_missing():
    tensors = dict(tiny_transformer().named_parameters())
    del tensors["model.embed_tokens.weight"]
    loader = WeightLoader(tiny_transformer())
    with pytest.raises(ValueError, match="2 were not sent: model.embed_tokens.weight, lm_head.weight"):
        load_all(loader, tensors)
    assert loader.is_torn and not loader.is_open


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_have_the_fingerprint_of_what_was_sent(dtype):
    tensors = {name: t.detach().to(dtype) for name, t in tiny_transformer(seed=1).named_parameters()}
    assert load_all(WeightLoader(tiny_transformer()), tensors) == fingerprint(
        {name: digest(t) for name, t in tensors.items()}
    )


def test_a_copy_that_loses_digits_shows_in_the_fingerprint():
    tensors = {name: t.detach().double() + 1e-12 for name, t in tiny_transformer(seed=1).named_parameters()}
    assert load_all(WeightLoader(tiny_transformer()), tensors) != fingerprint(
        {name: digest(t) for name, t in tensors.items()}
    )


@pytest.mark.parametrize("family", ["qwen2", "mixtral", "deepseek_v3"])
def test_a_folder_is_read_by_the_models_names_even_where_its_files_have_others(family, tmp_path):
    model, source = tiny_transformer(family), tiny_transformer(family, seed=1)
    source.save_pretrained(tmp_path)
    tensors = dict(source.named_parameters())
    infos = tuple(TensorInfo(name, tuple(t.shape), "float32") for name, t in tensors.items())
    for asked in (infos, ()):
        loader = WeightLoader(model)
        loader.begin()
        loader.load(loader.receive(WeightChunk(asked, "disk", {"folder": str(tmp_path)})))
        found = loader.end()
        assert not asked or found == fingerprint({name: digest(t) for name, t in tensors.items()})
        assert all(torch.equal(own, tensors[name]) for name, own in model.named_parameters())


def test_a_folder_without_a_tensor_of_the_update_is_an_error(tmp_path):
    tiny_transformer().save_pretrained(tmp_path)
    loader = WeightLoader(tiny_transformer())
    loader.begin()
    with pytest.raises(RuntimeError, match="1 are not there: other"):
        loader.receive(
            WeightChunk((TensorInfo("other", (1,), "float32"),), "disk", {"folder": str(tmp_path)})
        )
