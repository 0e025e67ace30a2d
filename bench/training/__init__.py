"""Whole training steps, forward and backward included: what a user's loop gains or loses."""
