"""Settings of reinforcement learning that contradict each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from verl.config.checks.column_readers import may_read, reads
from verl.config.fields import Choice
from verl.config.run import TrainerConfig


@dataclass(frozen=True)
class Contradiction:
    """Settings that do not work together.

    Attributes:
        condition: True for a configuration that has the contradiction.
        need: what must hold; `{c.KEY}` in each text is replaced by the value of the setting.
        got: the values that break it.
        remedy: what to do.
    """

    condition: Callable[[TrainerConfig], bool]
    need: str
    got: str
    remedy: str

    def message(self, config: TrainerConfig) -> str:
        """Error for the user."""
        return f"need {self.need}, got {self.got}; {self.remedy}".format(c=config)


def compares_with_sampler(config: TrainerConfig) -> bool:
    """True if the ratio of the policy loss is to the probabilities of the sampler."""
    a = config.algorithm
    return a.correction.name in ("bypass", "loglinear", "off_policy_mask") or a.policy_loss.name == "dppo"


def _training_layout(config: TrainerConfig) -> str:
    """Layout that the hybrid engine names for training; auto if it is off or names none."""
    repartition = config.hybrid_engine.actor_repartition
    return repartition.strategy_mapping.training if repartition.enabled else "auto"


_CORRECTION_AND_LOSS = (
    "algorithm.correction {c.algorithm.correction.name} and "
    "algorithm.policy_loss {c.algorithm.policy_loss.name}"
)
# The sampler's probabilities are then not used.
_RECOMPUTE = "algorithm.correction=recompute and a policy loss other than dppo"

_SAMPLING = (
    Contradiction(
        lambda c: (
            compares_with_sampler(c)
            and (c.sampling.top_p < 1 or c.sampling.top_k > 0 or c.sampling.min_p > 0)
        ),
        "logprobs of the whole distribution",
        "truncated sampling (top_p {c.sampling.top_p}, top_k {c.sampling.top_k}, min_p {c.sampling.min_p}) "
        f"with {_CORRECTION_AND_LOSS}",
        f"set {_RECOMPUTE}",
    ),
    Contradiction(
        lambda c: compares_with_sampler(c) and c.sampling.repetition_penalty != 1,
        "logprobs of the model's own distribution",
        f"sampling.repetition_penalty {{c.sampling.repetition_penalty}} with {_CORRECTION_AND_LOSS}",
        f"set {_RECOMPUTE}",
    ),
    Contradiction(
        lambda c: (
            c.rollout.engine == "sglang"
            and {c.sampling.repetition_penalty, c.evaluation.repetition_penalty or 1} != {1}
        ),
        "sampling.repetition_penalty 1 for rollout.engine sglang, whose penalty leaves the prompt out",
        "{c.sampling.repetition_penalty}, with evaluation.repetition_penalty "
        "{c.evaluation.repetition_penalty}",
        "take another engine",
    ),
    Contradiction(
        lambda c: compares_with_sampler(c) and c.sampling.temperature == 0,
        "logprobs of the distribution that was sampled",
        f"sampling.temperature 0 with {_CORRECTION_AND_LOSS}",
        f"set a temperature above 0, or {_RECOMPUTE}",
    ),
    Contradiction(
        lambda c: c.samples_per_prompt > 1 and c.sampling.temperature == 0,
        "different answers in a group",
        "samples_per_prompt {c.samples_per_prompt} with sampling.temperature 0",
        "set a temperature above 0",
    ),
    Contradiction(
        lambda c: c.sampling.temperature == 0 and reads(c, "greedy_rewards"),
        "answers other than the most likely one for algorithm.advantage {c.algorithm.advantage.name}",
        "sampling.temperature 0, where every advantage is 0",
        "set a temperature above 0",
    ),
    Contradiction(
        lambda c: c.evaluation.samples > 1 and c.evaluation.temperature == 0,
        "different answers to a prompt",
        "evaluation.samples {c.evaluation.samples} with evaluation.temperature 0",
        "set one answer or a temperature above 0",
    ),
    Contradiction(
        lambda c: any(not 1 <= k <= c.evaluation.samples for k in c.evaluation.pass_at),
        "from 1 to evaluation.samples {c.evaluation.samples} answers in each k of evaluation.pass_at",
        "{c.evaluation.pass_at}",
        "raise evaluation.samples, or leave these k out",
    ),
)

_GROUPS = (
    Contradiction(
        lambda c: c.samples_per_prompt == 1 and reads(c, "group_ids"),
        "siblings to compare with",
        "samples_per_prompt 1 with algorithm.policy_loss {c.algorithm.policy_loss.name} and "
        "algorithm.advantage {c.algorithm.advantage.name}, which would learn nothing",
        "set samples_per_prompt above 1",
    ),
    Contradiction(
        lambda c: c.samples_per_prompt == 1 and c.algorithm.dynamic_sampling,
        "groups for algorithm.dynamic_sampling",
        "samples_per_prompt 1, whose rewards are always equal",
        "set samples_per_prompt above 1 or dynamic_sampling to false",
    ),
    Contradiction(
        lambda c: (
            c.algorithm.kept_groups_share < 1
            and (c.samples_per_prompt == 1 or c.pipeline.batches == "streamed")
        ),
        "all groups of a step at once, with siblings, for algorithm.kept_groups_share "
        "{c.algorithm.kept_groups_share}",
        "samples_per_prompt {c.samples_per_prompt} and pipeline.batches {c.pipeline.batches}",
        "set samples_per_prompt above 1 and other batches, or kept_groups_share to 1",
    ),
    Contradiction(
        lambda c: c.samples_per_prompt == 1 and c.algorithm.length_penalty.name != "off",
        "siblings to compare lengths with",
        "samples_per_prompt 1 with algorithm.length_penalty {c.algorithm.length_penalty.name}",
        "set samples_per_prompt above 1, or use algorithm.overlong_buffer_tokens",
    ),
    Contradiction(
        lambda c: c.prompts_per_step * c.samples_per_prompt < c.algorithm.minibatches,
        "an answer for each of the updates of algorithm.minibatches {c.algorithm.minibatches}",
        "prompts_per_step {c.prompts_per_step} with samples_per_prompt {c.samples_per_prompt}",
        "lower algorithm.minibatches, or raise one of the two",
    ),
    Contradiction(
        lambda c: (
            c.prompts_per_step < c.algorithm.minibatches <= c.prompts_per_step * c.samples_per_prompt
            and {c.algorithm.policy_loss.name, c.algorithm.aggregation.name} & {"online_dpo", "prompt_mean"}
            != set()
        ),
        "a whole group for each of the updates of algorithm.minibatches {c.algorithm.minibatches}, as "
        "algorithm.policy_loss {c.algorithm.policy_loss.name} with aggregation "
        "{c.algorithm.aggregation.name} needs them",
        "prompts_per_step {c.prompts_per_step}",
        "set algorithm.minibatches to at most {c.prompts_per_step}",
    ),
    Contradiction(
        lambda c: c.pipeline.survivors.options.get("least", 1) > c.samples_per_prompt,
        "pipeline.survivors.least of at most samples_per_prompt {c.samples_per_prompt}",
        "{c.pipeline.survivors.options}",
        "lower it",
    ),
)

_LOSSES = (
    Contradiction(
        lambda c: c.algorithm.kl.where == "loss" and c.algorithm.kl.estimator.name == "k1",
        "a KL estimator whose gradient is not zero on average for algorithm.kl.where loss",
        "k1",
        "set algorithm.kl.estimator to k2 or k3",
    ),
    Contradiction(
        lambda c: (
            c.algorithm.kl.where == "reward"
            and c.algorithm.kl.estimator.name
            in ("k1_straight_through", "k3_straight_through", "k3_importance")
        ),
        "a KL estimator that has a meaning without a gradient for algorithm.kl.where reward",
        "{c.algorithm.kl.estimator.name}",
        "set algorithm.kl.estimator to k1 or k3, whose value is the same",
    ),
    Contradiction(
        lambda c: c.algorithm.overlong_buffer_tokens >= c.sampling.max_tokens,
        "algorithm.overlong_buffer_tokens below sampling.max_tokens",
        "{c.algorithm.overlong_buffer_tokens} and {c.sampling.max_tokens}",
        "a fifth of it is usual (DAPO, 2503.14476)",
    ),
    Contradiction(
        # The steps of a run by epochs are known when its data is read.
        lambda c: (
            c.epochs is None and c.critic.warmup_steps >= c.steps and may_read(c, "values", "prm_logprobs")
        ),
        "critic.warmup_steps below steps",
        "{c.critic.warmup_steps} and {c.steps}: the policy would never learn",
        "lower it",
    ),
    Contradiction(
        lambda c: (
            c.algorithm.skip_zero_advantages
            and bool(
                c.algorithm.kl.where == "loss" or c.algorithm.entropy_coef or c.algorithm.likelihood_coef
            )
        ),
        "a loss that is the policy loss alone for algorithm.skip_zero_advantages",
        "algorithm.kl.where {c.algorithm.kl.where}, entropy_coef {c.algorithm.entropy_coef} and "
        "likelihood_coef {c.algorithm.likelihood_coef}, which also act on rows without advantage",
        "turn them off, or skip_zero_advantages",
    ),
    Contradiction(
        lambda c: (
            reads(c, "prm_logprobs")
            and c.algorithm.advantage.options.get("beta", 0.05)
            != c.algorithm.value_loss.options.get("beta", 0.05)
        ),
        "one beta for the process reward and for the loss that teaches it",
        "algorithm.advantage {c.algorithm.advantage.options} and "
        "algorithm.value_loss {c.algorithm.value_loss.options}",
        "set both to the same",
    ),
)

_PLACEMENT = (
    Contradiction(
        lambda c: _training_layout(c) == "megatron" and c.placement.name == "local",
        "placement=colocated, split or standalone for strategy_mapping.training=megatron",
        "placement local, but Megatron trains on ranks of its own",
        "change one of the two",
    ),
    Contradiction(
        lambda c: (
            c.placement.name != "local"
            and _training_layout(c) not in ("auto", c.placement.policy.engine.name)
            and c.placement.policy.engine != Choice(name="fsdp")
        ),
        "one engine for the policy",
        "{c.placement.policy.engine.name} in placement.policy.engine and "
        "{c.hybrid_engine.actor_repartition.strategy_mapping.training} in strategy_mapping.training",
        "leave strategy_mapping.training out",
    ),
)

_SERVERS = (
    Contradiction(
        lambda c: c.rollout.engine in ("sglang", "served", "http") and not c.rollout.has_servers,
        "servers for rollout.engine {c.rollout.engine}",
        "rollout.servers 0 and no rollout.addresses",
        "set one of them",
    ),
    Contradiction(
        lambda c: c.rollout.engine == "http" and c.rollout.servers > 0,
        "servers that run already for rollout.engine http",
        "rollout.servers {c.rollout.servers}",
        "name them in rollout.addresses",
    ),
    Contradiction(
        lambda c: c.rollout.servers_sleep and (c.rollout.engine in ("served", "http") or c.policy.lora.is_on),
        "servers of vllm or sglang that receive all weights for rollout.servers_sleep",
        "rollout.engine {c.rollout.engine} and policy.lora.rank {c.policy.lora.rank}: a sleeping server "
        "forgets the weights that a LoRA adapter belongs to",
        "set it to false",
    ),
    Contradiction(
        lambda c: (
            c.rollout.servers_sleep and (c.pipeline.max_staleness > 0 or c.pipeline.batches == "streamed")
        ),
        "servers that are awake while the policy learns for pipeline.max_staleness "
        "{c.pipeline.max_staleness} and batches {c.pipeline.batches}",
        "rollout.servers_sleep",
        "set it to false",
    ),
    Contradiction(
        lambda c: c.pipeline.oversample > 0 and c.pipeline.batches == "deterministic",
        "pipeline.oversample 0 for pipeline.batches deterministic",
        "{c.pipeline.oversample}: which answers are the slowest differs from run to run",
        "change one of the two",
    ),
)

_LORA = (
    Contradiction(
        lambda c: (
            c.policy.lora.quantize != "none"
            and (c.placement.name != "local" or c.rollout.has_servers or c.rollout.engine != "embedded")
        ),
        "one process that trains and generates for policy.lora.quantize {c.policy.lora.quantize}",
        "placement {c.placement.name} and rollout.engine {c.rollout.engine}: weights in 4 bits are neither "
        "sharded nor sent to other engines",
        "set placement=local and rollout.engine=embedded, or policy.lora.quantize=none",
    ),
    Contradiction(
        lambda c: c.critic.lora.quantize != "none" and c.placement.name != "local",
        "one process for critic.lora.quantize {c.critic.lora.quantize}",
        "placement {c.placement.name}: weights in 4 bits are not sharded",
        "set placement=local, or critic.lora.quantize=none",
    ),
)

_AGENT = (
    Contradiction(
        lambda c: bool(
            c.agent.program and (c.agent.tools or c.agent.environment or c.agent.environment_column)
        ),
        "either agent.program, which brings its own tools, or agent.tools and agent.environment",
        "both",
        "leave one of them out",
    ),
    Contradiction(
        lambda c: c.agent.is_on and c.data.tools is not None,
        "tools that are called: agent.tools",
        "data.tools {c.data.tools}, which are only shown to the model, beside episodes",
        "name the functions in agent.tools",
    ),
    Contradiction(
        lambda c: c.agent.is_on and c.algorithm.overlong_buffer_tokens > 0,
        "algorithm.overlong_buffer_tokens 0 for episodes, whose length is not limited by sampling.max_tokens",
        "{c.algorithm.overlong_buffer_tokens}",
        "set it to 0, and bound episodes by agent.max_tokens and agent.endings",
    ),
)

CONTRADICTIONS: tuple[Contradiction, ...] = (
    *_SAMPLING,
    *_GROUPS,
    *_LOSSES,
    *_PLACEMENT,
    *_SERVERS,
    *_LORA,
    *_AGENT,
)
