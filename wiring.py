"""For the moment: a part of the vocabulary under its old name."""

from vocabulary.circuit import *  # noqa: F403
from techniques.circuits.requests import *  # noqa: F403
