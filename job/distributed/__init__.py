"""One gradient from many workers."""
