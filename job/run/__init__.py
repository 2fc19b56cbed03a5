"""One run's directory, as its driver sees it."""
