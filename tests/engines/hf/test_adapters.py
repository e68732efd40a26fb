"""LoRA adapters: exported, read by PEFT, merged into a base, trained further, and refused."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from tests.tiny import batch_of, tiny_transformer
from verl.config.roles import LoraConfig, RoleConfig
from verl.engines.hf.hf_io import export_model
from verl.engines.hf.models import PolicyModel, RewardModel
from verl.engines.hf.pretrained import as_reward_model, load_language_model, load_reward_model
from verl.engines.hf.weights import is_plain_lora, unties_embeddings
from verl.engines.local import LocalEngine
from verl.utils.hub import find_adapter

IDS = torch.tensor([[5, 6, 7, 8]])
ROW = batch_of([[5, 6]], [[7, 8, 9]])
# Settings of an adapter, and whether servers can load it alone.
KINDS = {
    "plain": ({"rank": 4}, True),
    "all layers": ({"rank": 2, "targets": "all-linear"}, True),
    "head": ({"rank": 4, "targets": ("lm_head", "q_proj")}, True),
    "embedding": ({"rank": 4, "targets": ("embed_tokens", "v_proj")}, False),
    "whole head": ({"rank": 4, "modules_to_save": "lm_head"}, False),
    "whole embeddings": ({"rank": 4, "modules_to_save": ("lm_head", "embed_tokens")}, False),
    "dora": ({"rank": 4, "use_dora": True}, False),
    "rslora": ({"rank": 4, "alpha": 3.0, "use_rslora": True}, True),
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[bool, str]:
    """A saved model with tied embeddings, and one without."""
    root = tmp_path_factory.mktemp("bases")
    for tied in (True, False):
        tiny_transformer(tie_word_embeddings=tied).save_pretrained(root / str(tied))
    return {tied: str(root / str(tied)) for tied in (True, False)}


def adapted(base: str, **lora) -> LocalEngine:
    """An engine that trains an adapter."""
    model = PolicyModel(load_language_model(base), "fp32")
    config = RoleConfig(lora=LoraConfig(**lora))
    return LocalEngine(model, config, device=torch.device("cpu"), total_updates=3)


@torch.no_grad()
def moved(engine: LocalEngine) -> LocalEngine:
    """The engine with other values of all that it trains."""
    generator = torch.Generator().manual_seed(0)
    for parameter in engine.trained:
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return engine


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(IDS).logits


@pytest.fixture(scope="module")
def plain(bases, tmp_path_factory) -> str:
    """A folder with an adapter alone, and its base beside it under a relative name."""
    root = tmp_path_factory.mktemp("plain")
    shutil.copytree(bases[True], root / "base")
    moved(adapted(bases[True], rank=4)).export_adapter(root / "adapter", bases[True])
    change(root / "adapter", base_model_name_or_path="../base")
    return str(root / "adapter")


def change(folder: Path, **settings) -> Path:
    """Other settings in adapter_config.json."""
    path = Path(folder) / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    return Path(folder)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_way_out_and_in_gives_the_logits_that_were_trained(kind, tied, bases, tmp_path):
    base, (lora, is_plain) = bases[tied], KINDS[kind]
    start = logits(load_language_model(base))
    engine = adapted(base, **lora)
    torch.testing.assert_close(logits(engine.model.transformer), start, rtol=1e-5, atol=1e-5)
    trained = logits(moved(engine).model.transformer)
    assert (trained - start).abs().max() > 0.1
    engine.export(tmp_path / "model")
    engine.export_adapter(tmp_path / "adapter", base)
    models = {
        "model": AutoModelForCausalLM.from_pretrained(tmp_path / "model"),
        "peft": peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
        ),
        "merged": load_language_model(str(tmp_path / "adapter")),
        "continued": adapted(base, path=str(tmp_path / "adapter")).model.transformer,
    }
    for name, model in models.items():
        torch.testing.assert_close(
            logits(model), trained, rtol=0, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert is_plain_lora(engine.model.transformer) == is_plain
    changes_one = tied and kind in ("head", "embedding", "whole head", "whole embeddings")
    assert unties_embeddings(engine.model.transformer) == changes_one
    models["merged"].save_pretrained(tmp_path / "again")
    torch.testing.assert_close(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), trained, rtol=0, atol=1e-4
    )


def test_an_adapter_of_peft_with_ranks_of_its_own_is_merged_and_trained_further(bases, tmp_path):
    options = peft.LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=r".*\.(q_proj|down_proj)",
        rank_pattern={"down_proj": 4},
        alpha_pattern={"down_proj": 16},
        layers_to_transform=None,
        lora_dropout=0.1,
        init_lora_weights=False,
    )
    tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[True]), options)
    tuned.save_pretrained(tmp_path)
    want = logits(tuned.eval())
    torch.testing.assert_close(logits(load_language_model(str(tmp_path))), want, rtol=1e-4, atol=1e-5)
    further = adapted(bases[True], path=str(tmp_path))
    torch.testing.assert_close(logits(further.model.transformer), want)
    assert not is_plain_lora(further.model.transformer)


def test_an_adapter_with_added_tokens_makes_the_vocabulary_larger(bases, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(bases[True])
    model.resize_token_embeddings(model.config.vocab_size + 3, mean_resizing=False)
    options = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(model, options)
        tuned.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(load_language_model(str(tmp_path))), logits(tuned.eval()))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_adapter_of_an_embedding_that_peft_writes_with_its_base_comes_in(target, tied, bases, tmp_path):
    options = peft.LoraConfig(r=2, target_modules=["q_proj", target], init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(bases[tied]), options)
        tuned.save_pretrained(tmp_path, save_embedding_layers=True)
    want = logits(tuned.eval())
    torch.testing.assert_close(logits(load_language_model(str(tmp_path))), want, rtol=1e-4, atol=1e-5)
    further = adapted(bases[tied], path=str(tmp_path))
    torch.testing.assert_close(logits(further.model.transformer), want)


def test_a_damaged_file_of_an_adapter_is_named(plain, bases, tmp_path):
    shutil.copytree(plain, tmp_path / "cut")
    file = tmp_path / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:300])
    with pytest.raises(ValueError, match=r"need whole safetensors in .*adapter_model\.safetensors, got"):
        adapted(bases[True], path=str(tmp_path / "cut"))


def test_the_base_is_found_beside_the_adapter_and_a_missing_one_is_named(plain, tmp_path):
    found = find_adapter(plain)
    assert Path(found.base).resolve() == (Path(plain).parent / "base").resolve()
    shutil.copytree(plain, tmp_path / "moved")
    for base, problem in {
        "/no/such/model": "base_model_name_or_path '/no/such/model' in its adapter_config.json is no folder",
        None: "the model that the adapter belongs to, got none; give the model as policy.path",
    }.items():
        change(tmp_path / "moved", base_model_name_or_path=base)
        with pytest.raises(ValueError, match=problem):
            load_language_model(str(tmp_path / "moved"))


def test_what_peft_can_and_this_program_cannot_is_refused_by_name(plain, tmp_path):
    folder = tmp_path / "other"
    for settings, problem in (
        ({"peft_type": "IA3"}, "need a LoRA adapter, got peft_type 'IA3'"),
        ({"bias": "all"}, "without bias='all'"),
        ({"init_lora_weights": "pissa"}, "without init_lora_weights='pissa'"),
        ({"a_new_feature": True}, "without a_new_feature=True"),
    ):
        shutil.copytree(plain, folder, dirs_exist_ok=True)
        with pytest.raises(ValueError, match=problem):
            load_language_model(str(change(folder, **settings)))


def test_tensors_that_do_not_fit_and_contradicting_settings_are_refused(plain, bases, tmp_path):
    with pytest.raises(ValueError, match="need the rank of the adapter .*, 4, got lora.rank 8; leave it out"):
        adapted(bases[True], path=plain, rank=8)
    with pytest.raises(ValueError, match="no tensor for .*lora_A"):
        adapted(bases[True], path=str(with_tensors(plain, tmp_path / "few", drop=1)))
    with pytest.raises(ValueError, match="no place for model.layers.9.extra"):
        load_language_model(str(with_tensors(plain, tmp_path / "many", **{"model.layers.9.extra": IDS})))
    shutil.copytree(bases[True], tmp_path / "many", dirs_exist_ok=True)
    with pytest.raises(
        ValueError, match=r"need a model or a PEFT adapter in .*, got both, model.safetensors"
    ):
        load_language_model(str(tmp_path / "many"))


def with_tensors(source: str, folder: Path, *, drop: int = 0, **added) -> Path:
    """A copy of an adapter without some of its tensors, and with others."""
    shutil.copytree(source, folder)
    path = folder / "adapter_model.safetensors"
    tensors = dict(list(load_file(path).items())[drop:])
    save_file(tensors | added, path)
    base = Path(source).parent / "base"
    return change(folder, base_model_name_or_path=str(base))


@pytest.mark.parametrize(
    ("lora", "problem"),
    [
        ({"rank": 2, "targets": ("q_proj",), "modules_to_save": ("nothing",)}, "lora.modules_to_save, got"),
        ({"rank": 2, "targets": ("lm_head",), "modules_to_save": ("lm_head",)}, "in both"),
        ({"rank": 2, "targets": ("lm_head",), "use_dora": True}, "below the output layer"),
    ],
)
def test_layers_that_are_not_there_or_do_not_suit_are_refused(lora, problem, bases):
    with pytest.raises(ValueError, match=problem):
        adapted(bases[True], **lora)


def test_a_reward_model_is_written_as_an_adapter_with_its_head(bases, tmp_path):
    model = RewardModel(as_reward_model(load_language_model(bases[True])), "fp32")
    config = RoleConfig(lora=LoraConfig(rank=2))
    engine = moved(LocalEngine(model, config, device=torch.device("cpu"), total_updates=1))
    want = logits(model.transformer)
    engine.export_adapter(tmp_path / "adapter", bases[True])
    export_model(model, tmp_path / "model")
    base = AutoModelForSequenceClassification.from_pretrained(bases[True], num_labels=1)
    readers = (
        peft.PeftModel.from_pretrained(base, tmp_path / "adapter"),
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_labels=1),
        load_reward_model(str(tmp_path / "adapter"), new_head=False),
    )
    for reader in readers:
        torch.testing.assert_close(logits(reader), want, rtol=0, atol=1e-4)


def learner(base: str, **settings) -> tuple[LocalEngine, list[torch.Tensor]]:
    """An engine with dropout, and the logprobs that its updates compute."""
    model = PolicyModel(load_language_model(base), "fp32")
    config = RoleConfig(lora=LoraConfig(rank=4, dropout=0.5), **settings)
    engine = moved(LocalEngine(model, config, device=torch.device("cpu"), total_updates=9))
    seen: list[torch.Tensor] = []

    def objective(rows, inputs):
        seen.append(model.token_logprobs(inputs, temperature=1.0, chunk=100)[0])
        return -seen[-1].sum(), {}

    torch.manual_seed(0)
    for _ in range(2):
        engine.accumulate(ROW, [[0]], objective)
    return engine, seen


def test_dropout_acts_in_updates_alone(bases):
    engine, seen = learner(bases[True])
    inferred = [
        engine.infer(ROW, [[0]], lambda i: engine.model.token_logprobs(i, temperature=1.0, chunk=9)[0])[0]
        for _ in range(2)
    ]
    torch.testing.assert_close(*inferred)
    assert not torch.allclose(seen[0], inferred[0], atol=1e-3)
    assert not torch.allclose(seen[0], seen[1], atol=1e-3)


def test_what_is_computed_again_drops_the_same_inputs(bases):
    engines = [learner(bases[True], gradient_checkpointing=again)[0] for again in (False, True)]
    for one, other in zip(*(engine.trained for engine in engines), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
