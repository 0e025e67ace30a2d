"""Thin helpers for training stacks, each imported by name: flatkern.integrations.lightning, .transformers, .accelerate,
.timm, .skorch."""
