"""Loads the model of a checkpoint for inference."""

from job.nn.language_model import LanguageModel, build_model, load_weights
from job.training.checkpoint import LoadedCheckpoint


def load_model(checkpoint: LoadedCheckpoint) -> LanguageModel:
    """Returns the checkpoint's model on the CPU, in the dtype of its weights."""
    config = checkpoint.config
    model = build_model(config.model, len(checkpoint.vocabulary), config.run.seed)
    model = model.to(next(weight.dtype for weight in checkpoint.weights.values() if weight.is_floating_point()))
    load_weights(model, checkpoint.weights, "checkpoint")
    return model
