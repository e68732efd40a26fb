"""Evaluation of a policy on held-out prompts."""

from verl.trainer.evaluation.answering import answer_all, evaluate, evaluation_schedule, summarize
from verl.trainer.evaluation.eval_sets import evaluation_size
from verl.trainer.evaluation.sample_rows import sample_row

__all__ = ["answer_all", "evaluation_size", "evaluate", "evaluation_schedule", "sample_row", "summarize"]
