"""Reports of runs: one page that needs no network."""
