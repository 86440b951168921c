"""Peers rebuilt from their published descriptions, in our own words and code, to be measured beside ours."""
