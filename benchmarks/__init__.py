"""`make bench`: speed beside peers and limits, measured in turn within one run, kept as JSON."""
