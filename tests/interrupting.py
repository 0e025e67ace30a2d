"""An alarm whose handler raises in the middle of a call."""

import gc
import signal

import torch


class Interrupted(BaseException):
    """As KeyboardInterrupt, no Exception."""


def raise_interrupted(*_):
    raise Interrupted


def interrupt(call, after):
    """Runs `call`, and has a signal handler raise in it; True if it did."""
    previous = signal.signal(signal.SIGALRM, raise_interrupted)
    gc.disable()  # what restores the weights of a collected optimizer is not what is interrupted here
    try:
        signal.setitimer(signal.ITIMER_REAL, after)
        call()
        signal.setitimer(signal.ITIMER_REAL, 0)
    except Interrupted:
        return True
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
        gc.enable()
        torch.set_grad_enabled(True)  # torch's no_grad() is Python, and may be interrupted while it is left
    return False
