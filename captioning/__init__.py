"""Capstan's library: what the stages are built from. Run `python -m captioning --help` for the user's commands."""

__version__ = "0.1.0"
