import captioning.stage  # noqa: F401  # its OpenMP settings, before torch is loaded: what stages run with
