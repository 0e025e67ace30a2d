"""The optimizers; their public names are in `flatkern`."""
