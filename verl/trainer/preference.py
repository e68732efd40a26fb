"""Training a policy on preferences directly (DPO, IPO, SimPO): from pairs of answers, without rewards and
without sampling.
"""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from torch import Tensor
from transformers import PreTrainedModel
from typing_extensions import override

from verl.algorithms.preference import PAIR_LOSSES
from verl.algorithms.registry import bind
from verl.config.run import PreferenceConfig
from verl.data.batch import Batch, ModelInput, Trajectory
from verl.data.columns import readable_by
from verl.engines.hf.models import PolicyModel
from verl.engines.local import LocalForwardEngine, frozen_engine
from verl.trainer.pairwise_trainer import SIDES, PairwiseTrainer, answers_of, check_pair_loss
from verl.utils.sampling_types import Prompt
from verl.utils.tokens import TextCodec

# Of a policy there are logprobs; rewards are a reward model's.
_COLUMNS = readable_by("preference_loss")


class PreferenceTrainer(PairwiseTrainer):
    """Makes the chosen answer of a pair likelier than the rejected one, as the configured loss has it.

    Args:
        config: of the run, from `load_run(PreferenceConfig, ...)`.
        actor_model: the policy as a loaded model, a folder or a hub name; none: from `config.policy.path`.
        codec: its tokenizer; none: the one saved with the model.
        console: for people; none: standard output.

    Attributes:
        reference: the policy that must not be left; there if and only if the loss reads its logprobs.

    Raises:
        ValueError: settings that do not fit together, or models or files that cannot be read.
    """

    config: PreferenceConfig

    def __init__(
        self,
        config: PreferenceConfig,
        actor_model: PreTrainedModel | str | None = None,
        *,
        codec: TextCodec | None = None,
        console: Console | None = None,
    ) -> None:
        self.loss = check_pair_loss(bind(config.loss, PAIR_LOSSES, columns=_COLUMNS), _COLUMNS)
        super().__init__(config, actor_model, codec=codec, console=console)
        has_reference = any("_ref_" in name for name in self.loss.columns)
        self.reference: LocalForwardEngine | None = None
        if has_reference:
            policy = self.policy_engine.model
            assert isinstance(policy, PolicyModel)
            self.reference = frozen_engine(policy, config.reference, config.policy, setting="reference")

    def encode(self, pairs: list[Prompt]) -> Batch:
        """See `PairwiseTrainer.encode`; answers are closed with the end token."""
        return Batch.from_trajectories(
            [self._trajectory(*row, i) for i, row in enumerate(zip(*answers_of(pairs), strict=True))]
        )

    def write(self, rows: Batch, plan: list[list[int]]) -> None:
        """Adds `ref_logprobs` [B], sums over the answers."""
        if self.reference is None:
            return
        model = self.reference.model
        assert isinstance(model, PolicyModel)
        with self.clock.phase("ref_logprobs"):
            logprobs = self.reference.infer(rows, plan, lambda inputs: self._logprobs(model, inputs)[0])
        rows.write("ref_logprobs", logprobs.sum(1))

    def token_values(self, inputs: ModelInput) -> tuple[Tensor, Tensor | None]:
        """Logprobs and entropies."""
        model = self.policy_engine.model
        assert isinstance(model, PolicyModel)
        return self._logprobs(model, inputs)

    @override
    def row_columns(self, rows: Batch, values: Tensor) -> dict[str, Tensor]:
        columns = {"logprobs": values.sum(1), "tokens": self.answer_tokens(rows).to(values.device)}
        return columns | ({"ref_logprobs": rows["ref_logprobs"].to(values.device)} if self.reference else {})

    def monitors(
        self, columns: Mapping[str, Tensor], entropy: Tensor | None, step: Batch
    ) -> dict[str, Tensor]:
        """Entropy per token of all answers, and logprobs per token of those of each side."""
        assert entropy is not None
        tokens = self.answer_tokens(step).view(-1, 2).sum(0).tolist()
        sides = {
            f"{side}_logprobs": columns[f"{side}_logprobs"].detach().sum() / n
            for side, n in zip(SIDES, tokens, strict=True)
        }
        return {"entropy": entropy.detach().sum() / sum(tokens), **sides}

    def _logprobs(self, model: PolicyModel, inputs: ModelInput) -> tuple[Tensor, Tensor]:
        return model.token_logprobs(inputs, temperature=1.0, chunk=self.config.policy.logits_chunk_tokens)

    def _trajectory(self, prompt: Prompt, answer: str, row: int) -> Trajectory:
        ids = self.codec.encode_answer(answer)
        return Trajectory(
            prompt, self.codec.encode_prompt(prompt), ids, [True] * len(ids), None, [0] * len(ids), row // 2
        )
