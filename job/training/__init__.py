"""One worker's training; does not import Ray."""
