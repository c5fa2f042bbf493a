"""One program per claim of speed or memory; each compares in one run."""
