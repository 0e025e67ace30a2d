"""Fused kernels and optimizers for training methods that look for flat minima."""
