"""For the moment: a part of the vocabulary under its old name."""

from vocabulary.nodes import *  # noqa: F403
from vocabulary.prompts import *  # noqa: F403
