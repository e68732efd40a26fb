"""Models for others: the folder of a trained model, its card, the export of checkpoints, and the hub."""

from verl.trainer.export.exporting import export_checkpoint

__all__ = ["export_checkpoint"]
