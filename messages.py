"""For the moment: the whole vocabulary under its old name."""

import msgspec  # noqa: F401

from vocabulary.nodes import *  # noqa: F403
from vocabulary.prompts import *  # noqa: F403
from vocabulary.requests import *  # noqa: F403
from vocabulary.wire import *  # noqa: F403
from techniques.output.requests import *  # noqa: F403
from techniques.lens.requests import *  # noqa: F403
from techniques.attention.requests import *  # noqa: F403
from techniques.attribution.requests import *  # noqa: F403
from techniques.weights.requests import *  # noqa: F403
from techniques.patching.requests import *  # noqa: F403
from techniques.identities.requests import *  # noqa: F403
