"""Triton kernels, installed as flatkern.triton_kernels. There are none yet: no operation lists triton as a backend."""

if __name__ == "triton_kernels":
    raise ImportError(
        "triton_kernels is installed as flatkern.triton_kernels; at top level the name belongs to other packages"
    )
