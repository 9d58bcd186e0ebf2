"""For the moment: alignment under its old name."""

from vocabulary.alignment import *  # noqa: F403
