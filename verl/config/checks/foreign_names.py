"""Names of settings in other trainers, and their settings here, for the message of an unknown setting."""

from __future__ import annotations

import re
from collections.abc import Sequence

from verl.config.layers import nearest_key

# Name in verl, TRL or OpenRLHF, or the end of it -> setting here, and what differs.
FOREIGN_NAMES: dict[str, str] = {
    # Data
    "train_files": "data.train",
    "val_files": "data.test",
    "multiturn.messages_key": "data.prompt_key",
    "dataset_text_field": "data.prompt_key",
    "prompt_data": "data.train",
    "eval_dataset": "data.test",
    "dataset_name": "data.train",
    "train_dataset": "data.train",
    "dataset": "data.train",
    "input_key": "data.prompt_key",
    "label_key": "data.answer_key",
    "data.max_prompt_length": "data.max_prompt_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "prompt_max_len": "data.max_prompt_tokens",
    "max_prompt_len": "data.max_prompt_tokens",
    "max_seq_length": "data.max_sequence_tokens",
    "max_length": "data.max_sequence_tokens",
    "max_len": "data.max_sequence_tokens",
    "cutoff_len": "data.max_sequence_tokens",
    "sequence_len": "data.max_sequence_tokens",
    "assistant_only_loss": "data.train_on",
    "completion_only_loss": "data.train_on; prompts are never learned",
    "train_on_inputs": "data.train_on; prompts are never learned",
    # Sizes of a step
    "train_batch_size": "prompts_per_step, in prompts",
    "rollout_batch_size": "prompts_per_step, in prompts",
    "gen_batch_size": "prompts_per_step, in prompts",
    "num_prompts": "prompts_per_step",
    "n_samples_per_prompt": "samples_per_prompt",
    "num_generations": "samples_per_prompt",
    "rollout.n": "samples_per_prompt",
    "group_size": "samples_per_prompt",
    "per_device_train_batch_size": "policy.micro_batch_rows",
    "gradient_accumulation_steps": "policy.micro_batch_tokens; a step has as many micro-batches as it needs",
    "ppo_mini_batch_size": "algorithm.minibatches, the number of updates on the answers of a step",
    "num_mini_batches": "algorithm.minibatches",
    "steps_per_generation": "algorithm.minibatches, the number of updates on the answers of a step",
    "ppo_micro_batch_size_per_gpu": "policy.micro_batch_rows",
    "ppo_micro_batch_size": "policy.micro_batch_rows",
    "log_prob_micro_batch_size_per_gpu": "policy.micro_batch_rows",
    "micro_train_batch_size": "policy.micro_batch_rows",
    "micro_batch_size": "policy.micro_batch_rows",
    "ppo_max_token_len_per_gpu": "policy.micro_batch_tokens",
    "use_dynamic_bsz": "policy.micro_batch_tokens; micro-batches are always filled by tokens",
    "use_remove_padding": "policy.packing",
    "ppo_epochs": "algorithm.epochs, the passes over the answers of a step",
    "num_iterations": "algorithm.epochs, the passes over the answers of a step",
    "max_epochs": "algorithm.epochs, the passes over the answers of a step",
    # Length of a run
    "total_training_steps": "steps",
    "max_steps": "steps",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "total_epochs": "epochs",
    "num_train_steps": "steps",
    "num_episodes": "epochs",
    # Sampling
    "max_response_length": "sampling.max_tokens",
    "response_length": "sampling.max_tokens",
    "max_completion_length": "sampling.max_tokens",
    "generate_max_len": "sampling.max_tokens",
    "max_new_tokens": "sampling.max_tokens",
    "val_kwargs.n": "evaluation.samples",
    "val_kwargs.temperature": "evaluation.temperature",
    "rollout.temperature": "sampling.temperature",
    "rollout.top_p": "sampling.top_p",
    "rollout.top_k": "sampling.top_k",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    # Engines
    "rollout.name": "rollout.engine",
    "use_vllm": "rollout.engine; rollout.engine=vllm",
    "vllm_mode": "rollout.servers; 0: in the policy's processes",
    "vllm_num_engines": "rollout.servers",
    "vllm_tensor_parallel_size": "rollout.engine_options; rollout.engine_options.tensor_parallel_size=N",
    "tensor_model_parallel_size": "rollout.engine_options; rollout.engine_options.tensor_parallel_size=N",
    "gpu_memory_utilization": "rollout.engine_options; rollout.engine_options.gpu_memory_utilization=SHARE",
    "vllm_gpu_memory_utilization": "rollout.engine_options, gpu_memory_utilization",
    "free_cache_engine": "rollout.servers_sleep",
    "vllm_enable_sleep": "rollout.servers_sleep",
    # Models and optimizer
    "critic.model.path": "critic.path",
    "model.path": "policy.path",
    "model_name_or_path": "policy.path",
    "model_path": "policy.path",
    "pretrain": "policy.path",
    "ref_model": "reference",
    "ref.model.path": "reference",
    "critic_pretrain": "critic.path",
    "critic.optim.lr": "critic.optimizer.lr",
    "critic_learning_rate": "critic.optimizer.lr",
    "optim.lr": "policy.optimizer.lr",
    "learning_rate": "policy.optimizer.lr",
    "actor_learning_rate": "policy.optimizer.lr",
    "lr": "policy.optimizer.lr",
    "lr_warmup_steps": "policy.optimizer.warmup_steps",
    "warmup_steps": "policy.optimizer.warmup_steps",
    "lr_warmup_steps_ratio": "policy.optimizer.warmup_steps, in updates",
    "warmup_ratio": "policy.optimizer.warmup_steps, in updates",
    "lr_scheduler_type": "policy.optimizer.schedule",
    "lr_scheduler": "policy.optimizer.schedule",
    "weight_decay": "policy.optimizer.weight_decay",
    "l2": "policy.optimizer.weight_decay",
    "adam_betas": "policy.optimizer.betas",
    "adam_beta1": "policy.optimizer.betas, both in a list",
    "adam_beta2": "policy.optimizer.betas, both in a list",
    "optim": "policy.optimizer.name",
    "adam_epsilon": "policy.optimizer.eps",
    "grad_clip": "policy.optimizer.max_grad_norm",
    "max_grad_norm": "policy.optimizer.max_grad_norm",
    "max_norm": "policy.optimizer.max_grad_norm",
    "enable_gradient_checkpointing": "policy.gradient_checkpointing",
    "gradient_checkpointing": "policy.gradient_checkpointing",
    "bf16": "policy.precision; policy.precision=bf16",
    "fp16": "policy.precision; policy.precision=fp16",
    "torch_dtype": "policy.precision",
    "param_dtype": "policy.precision",
    "lora_r": "policy.lora.rank",
    "lora_rank": "policy.lora.rank",
    "lora_alpha": "policy.lora.alpha",
    "lora_target_modules": "policy.lora.targets",
    "target_modules": "policy.lora.targets",
    "load_in_4bit": "policy.lora.quantize; policy.lora.quantize=4bit",
    "param_offload": "placement.policy.offload",
    "optimizer_offload": "placement.policy.offload",
    "ulysses_sequence_parallel_size": "placement.policy.sequence",
    "packing": "policy.packing",
    # Algorithm
    "adv_estimator": "algorithm.advantage; most recipes are named after it, such as `verl train grpo`",
    "advantage_estimator": "algorithm.advantage; most recipes are named after it, such as `verl train grpo`",
    "loss_agg_mode": "algorithm.aggregation",
    "loss_type": "algorithm.policy_loss and algorithm.aggregation",
    "clip_ratio": "algorithm.policy_loss; its options clip_low and clip_high",
    "clip_ratio_low": "algorithm.policy_loss; its option clip_low",
    "clip_ratio_high": "algorithm.policy_loss; its option clip_high",
    "epsilon": "algorithm.policy_loss; its options clip_low and clip_high",
    "epsilon_high": "algorithm.policy_loss; its option clip_high",
    "eps_clip": "algorithm.policy_loss; its options clip_low and clip_high",
    "cliprange_value": "algorithm.value_loss; its option clip",
    "use_kl_loss": "algorithm.kl.where; algorithm.kl.where=loss",
    "use_kl_in_reward": "algorithm.kl.where; algorithm.kl.where=reward",
    "kl_loss_coef": "algorithm.kl.coef",
    "kl_coef": "algorithm.kl.coef",
    "init_kl_coef": "algorithm.kl.coef",
    "beta": "algorithm.kl.coef",
    "kl_loss_type": "algorithm.kl.estimator",
    "kl_penalty": "algorithm.kl.estimator",
    "kl_estimator": "algorithm.kl.estimator",
    "entropy_coeff": "algorithm.entropy_coef",
    "gamma": "algorithm.advantage; option gamma of gae",
    "lam": "algorithm.advantage; option lam of gae",
    "scale_rewards": "algorithm.advantage; option normalize_std of grpo",
    "norm_adv_by_std_in_grpo": "algorithm.advantage; option normalize_std of grpo",
    "filter_groups.enable": "algorithm.dynamic_sampling",
    "mask_truncated_completions": "algorithm.mask_truncated",
    "overlong_buffer.len": "algorithm.overlong_buffer_tokens",
    "overlong_buffer.penalty_factor": "algorithm.overlong_penalty",
    "critic_warmup": "critic.warmup_steps",
    "freezing_actor_steps": "critic.warmup_steps",
    "value_clip": "algorithm.value_loss; its option clip",
    "lambd": "algorithm.advantage; option lam of gae",
    "importance_sampling_level": "algorithm.policy_loss; sequence is `verl train gspo`",
    "dynamic_filtering": "algorithm.dynamic_sampling",
    "vllm_importance_sampling_correction": "algorithm.correction",
    # Rewards
    "custom_reward_function": "rewards.functions; rewards.functions=['FILE.py:FUNCTION']",
    "custom_reward_function.path": "rewards.functions; rewards.functions=['FILE.py:FUNCTION']",
    "custom_reward_function.name": "rewards.functions; rewards.functions=['FILE.py:FUNCTION']",
    "remote_rm_url": "rewards.functions; rewards.functions=['FILE.py:FUNCTION']",
    "reward_funcs": "rewards.functions",
    "reward_model": "rewards.functions; rewards.functions=[{name: model, path: FOLDER}]",
    "reward_model.path": "rewards.functions; rewards.functions=[{name: model, path: FOLDER}]",
    "reward_pretrain": "rewards.functions; rewards.functions=[{name: model, path: FOLDER}]",
    "reward_weights": "rewards.functions; each function has a weight",
    # Run
    "default_local_dir": "output_dir",
    "save_path": "output_dir",
    "ckpt_path": "output_dir",
    "save_freq": "checkpoint.every_steps",
    "save_steps": "checkpoint.every_steps",
    "save_total_limit": "checkpoint.keep",
    "max_ckpt_num": "checkpoint.keep",
    "max_actor_ckpt_to_keep": "checkpoint.keep",
    "resume_mode": "checkpoint.resume",
    "resume_from_checkpoint": "checkpoint.resume",
    "resume_from_path": "checkpoint.resume",
    "load_checkpoint": "checkpoint.resume",
    "test_freq": "evaluation.every_steps",
    "eval_steps": "evaluation.every_steps",
    "val_before_train": "evaluation.at_start",
    "trainer.logger": "tracking.sinks",
    "logger": "tracking.sinks",
    "report_to": "tracking.sinks",
    "use_wandb": "tracking.sinks; tracking.sinks=[console,jsonl,wandb]",
    "project_name": "tracking.project",
    "wandb_project": "tracking.project",
    "log_val_generations": "tracking.num_samples",
    "num_completions_to_print": "tracking.num_samples",
    "n_gpus_per_node": "placement.devices, a list with the devices of each node",
    "nnodes": "placement.devices, a list with the devices of each node",
}
# The same in runs on pairs, where a name may mean another thing.
_OF_PAIRS = {
    "beta": "loss; its option beta, such as loss.beta=0.1",
    "loss_type": "loss; loss=dpo, ipo or simpo",
    "dpo_loss_type": "loss; loss=dpo, ipo or simpo",
    "max_epochs": "epochs",
    "label_smoothing": "loss; its option label_smoothing of dpo",
}
# Part of a name -> capability that is not there.
MISSING_CAPABILITIES: dict[str, str] = {
    "image": "models that read images are not supported",
    "images": "models that read images are not supported",
    "video": "models that read videos are not supported",
    "videos": "models that read videos are not supported",
    "audio": "models that read audio are not supported",
    "vision": "models that read images are not supported",
    "speculative": "speculative decoding is not supported",
    "multi_turn": "tools are agent.tools, an environment is agent.environment, see docs/multi_turn.md",
    "interaction": "a partner that talks is agent.environment, see docs/multi_turn.md",
    "reward_manager": "rewards.functions takes functions of one answer or of all; overlong answers are "
    "algorithm.overlong_buffer_tokens",
    "sync_ref_model": "a reference that follows the policy is not supported",
    "ref_model_sync_steps": "a reference that follows the policy is not supported",
    "ref_model_mixup_alpha": "a reference that follows the policy is not supported",
    "zero_stage": "models are sharded by FSDP2 over placement.devices, not by DeepSpeed's stages",
    "deepspeed": "models are sharded by FSDP2 over placement.devices, not by DeepSpeed's stages",
}


def name_here(key: str, known: Sequence[str]) -> tuple[str, str] | None:
    """The setting here of another trainer's name, and a sentence that begins with it.

    Args:
        key: of another trainer; the longest end of it that is in the table counts.
        known: settings of this kind of run.
    """
    parts = key.split(".")
    ends = (".".join(parts[i:]) for i in range(len(parts)))
    names = FOREIGN_NAMES if "algorithm" in known else FOREIGN_NAMES | _OF_PAIRS
    text = next((names[end] for end in ends if end in names), "")
    setting = re.split("[,; ]", text)[0]
    if setting == "prompts_per_step" and setting not in known:
        setting = text = next((rows for rows in ("rows_per_step", "pairs_per_step") if rows in known), "")
    return (setting, text) if setting in known else None


def advice_for(key: str, known: Sequence[str]) -> str:
    """The way out of an unknown setting, as the end of a sentence."""
    words = {*key.split("."), *key.replace(".", "_").split("_")}
    if missing := next((text for word, text in MISSING_CAPABILITIES.items() if word in words), None):
        return missing
    if here := name_here(key, known):
        return f"here it is {here[1]}"
    return f"the nearest is {nearest_key(key, known)}; `verl config WORD` searches all settings"
