"""One worker's training; knows no Ray."""
