"""The identities: what must be equal, checked on this model and prompt."""

from vocabulary.prompts import Study
from vocabulary.requests import Identity
from vocabulary.wire import message, request


@request
class Identities:
    """The identities of the honesty panel on this model and prompt."""

    study: Study


# ------------------------------------------------------------------ results


@message
class IdentitiesResult:
    rows: tuple[Identity, ...]
    convention: str
