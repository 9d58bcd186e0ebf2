"""The door of this room: what weights say."""

from weights import answer

__all__ = ["answer"]
