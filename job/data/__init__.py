"""Text to windows of tokens."""
