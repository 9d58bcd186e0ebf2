"""The door of this room: what weights say."""

from techniques.weights.heads import answer

__all__ = ["answer"]
