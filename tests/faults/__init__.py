"""Fault injection: kills, full disks and damaged files in temporary clones, through the real `dvc repro`."""
