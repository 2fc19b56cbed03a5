"""Serving of models over HTTP, and the page to try them."""
