"""A search's directory; knows no Ray."""
