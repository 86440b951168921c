"""The pipeline's stages, one file each, run by DVC as `python -m stages.<name>`."""
