"""For the moment: a part of the vocabulary under its old name."""

from techniques.attribution.requests import *  # noqa: F403
from techniques.attention.requests import *  # noqa: F403
from techniques.weights.requests import *  # noqa: F403
from techniques.patching.requests import *  # noqa: F403
