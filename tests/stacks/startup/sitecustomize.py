"""Python imports this when a process begins: of all processes that these tests start, ranks and examples."""

import torchvision_operators  # noqa: F401
