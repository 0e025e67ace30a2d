"""Every operation in eager PyTorch, one file per family: the definition of correct, written for reading.

Any device, no kernels, no speed. Arithmetic is float32 and rounds once, on store; square roots are
taken in float64 and rounded, because torch's float32 CPU square root is not correctly rounded.
"""
