"""Generation and evaluation with a trained model."""
