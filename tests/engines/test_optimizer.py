"""Optimizers by name: steps by hand, options, what is refused; the schedule of the learning rate by hand."""

from __future__ import annotations

import math

import pytest
import torch

from tests.tiny import tiny_policy
from tests.training import local_engine, rows_to_learn, weights
from verl.config.fields import Options
from verl.config.roles import OptimizerConfig
from verl.engines.optimizer import OPTIMIZERS, build_optimizer, check_optimizer, is_elementwise, lr_factor

WHOLE = [list(range(6))]
ELEMENTWISE = (
    *("adam", "adamw", "sgd", "adagrad", "rmsprop", "radam"),
    *("nadam", "adamax", "asgd", "adadelta", "rprop"),
)


class Counting(torch.optim.SGD):
    """Has a state that is no tensor."""

    def step(self, closure=None):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p]["count"] = 1


def config(name="adamw", *, lr=0.1, weight_decay=0.0, **options):
    return OptimizerConfig(name=name, lr=lr, weight_decay=weight_decay, options=Options(**options))


def likely(engine):
    return lambda rows, inputs: (
        -engine.model.token_logprobs(inputs, temperature=1.0, chunk=100)[0].mean(),
        {},
    )


def test_sgd_steps_by_hand_with_its_options_and_decay_of_matrices_alone():
    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[1.0, 2.0]]))
        model.bias.fill_(3.0)
    optimizer = build_optimizer(model, config("SGD", weight_decay=0.5, momentum=0.9))
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.tensor([[1.0, 0.0]]), torch.ones(1)
        optimizer.step()
    # 1 - 0.1 * 1.5 = 0.85, and 0.85 - 0.1 * (0.9 * 1.5 + 1.425) = 0.5725; the bias 3 - 0.1 - 0.1 * 1.9
    torch.testing.assert_close(model.weight, torch.tensor([[0.5725, 2 - 0.1 - 0.1 * (0.9 + 0.95)]]))
    torch.testing.assert_close(model.bias, torch.tensor([2.71]))


def test_muon_takes_the_matrices_of_the_layers_and_adamw_all_other_weights():
    model = tiny_policy()
    optimizer = build_optimizer(model, config("muon", momentum=0.8))
    by_muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in by_muon}
    assert {name.split(".")[-2] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    }
    assert optimizer.param_groups[0]["momentum"] == 0.8
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    p = next(p for name, p in model.named_parameters() if "q_proj.weight" in name)
    before = p.detach().clone()
    p.grad = torch.randn_like(p)
    optimizer.step()
    # Singular values near 1, times 0.2 sqrt(longer side) and the rate.
    values = torch.linalg.svdvals((before - p.detach()) / 0.1 / (0.2 * math.sqrt(max(p.shape))))
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3


@pytest.mark.parametrize("name", [*ELEMENTWISE, "adafactor", "muon"])
def test_every_optimizer_resumes_as_if_it_had_not_stopped(name, tmp_path):
    optimizer = {"name": name, "lr": 1e-2}
    first, other = local_engine(optimizer=optimizer), local_engine(optimizer=optimizer, seed=1)
    check_optimizer(first._config.optimizer, setting="policy.optimizer")
    start = weights(first)
    first.update(rows_to_learn(), WHOLE, likely(first))
    first.save(tmp_path)()
    other.load(tmp_path)
    for engine in (first, other):
        engine.update(rows_to_learn(), WHOLE, likely(engine))
    assert torch.equal(weights(first), weights(other)) and not torch.equal(weights(first), start)


def test_parts_of_a_matrix_are_updated_by_optimizers_that_treat_each_weight_by_itself():
    assert {name for name in (*ELEMENTWISE, "adafactor", "muon") if is_elementwise(config(name))} == {
        *ELEMENTWISE
    }
    with pytest.raises(ValueError, match="need an optimizer that updates each weight by itself .* got muon"):
        build_optimizer(tiny_policy(), config("muon"), sharded_by=lambda p: None)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        (config("adamm"), "x: need one of .* got 'adamm'; did you mean 'adam'"),
        (config("sgd", momentun=0.9), "got 'momentun'; did you mean 'momentum'"),
        (config("sgd", momentum=-1.0), "sgd refuses optimizer.options .*-1.0; correct them"),
        (
            OptimizerConfig(name="sgd", options=Options(lr=1.0)),
            "need lr of sgd as optimizer.lr",
        ),
        (config("adamw", eps=1e-6), "need eps of adamw as optimizer.eps"),
        (config("muon", ns_step=3), "did you mean 'ns_steps'"),
        (config("rprop", weight_decay=0.1), "need an optimizer with weight_decay, got rprop"),
        (
            config("lbfgs"),
            "lbfgs refuses .* doesn't support per-parameter",
        ),
        (config("sparseadam"), "sparseadam cannot make a step with gradients alone"),
        (config("tests.engines.test_optimizer:Counting"), "whose state is tensors of each parameter"),
        (config("tests.tiny:tiny_policy"), "tiny_policy"),
    ],
    ids=lambda value: value.name if isinstance(value, OptimizerConfig) else "",
)
def test_what_cannot_be_right_is_refused_before_a_model_is_loaded(chosen, message):
    with pytest.raises(ValueError, match=message):
        check_optimizer(chosen, setting="x")


def test_all_optimizers_of_torch_are_known_and_a_class_of_the_user_is_taken():
    assert {"adamw", "muon", "adafactor"} <= OPTIMIZERS.keys()
    check_optimizer(config("torch.optim:SGD", momentum=0.9), setting="policy.optimizer")


def test_the_schedules_go_through_their_points():
    def rates(schedule, updates, **settings):
        config = OptimizerConfig(schedule=schedule, **settings)
        return [lr_factor(update, config, 10) for update in updates]

    assert rates("constant", [0, 1, 2, 3, 99], warmup_steps=3) == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates("linear", [0, 5, 10, 20]) == [1.0, 0.5, 0.0, 0.0]
    assert rates("linear", [0, 1, 2, 6, 10], warmup_steps=2, min_lr_ratio=0.5) == pytest.approx(
        [1 / 3, 2 / 3, 1.0, 0.75, 0.5]
    )
    assert rates("cosine", [0, 5, 10], min_lr_ratio=0.1) == pytest.approx([1.0, 0.55, 0.1])
    assert rates("cosine", [2.5]) == pytest.approx([(1 + math.sqrt(0.5)) / 2])
