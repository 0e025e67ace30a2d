"""What torch.compile leaves to Python: which call may come when, and every write of weights."""

from torch._compile import _disable_dynamo

# torch.compiler.disable() imports Dynamo, which takes a second, where it decorates. This one imports it at the first
# call, and torch's own optimizers need it as well.
untraced = _disable_dynamo
