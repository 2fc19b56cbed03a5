"""A search's directory; does not import Ray."""
