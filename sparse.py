"""For the moment: a part of the vocabulary under its old name."""

from techniques.features.requests import *  # noqa: F403
