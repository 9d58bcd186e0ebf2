"""What of this room can't run over parts of a text, and why."""

from techniques.lens.requests import FitJacobian, TuneLens

SCATTERED: dict = {}
REFUSED = {
    TuneLens: "each step of a fit depends on the one before; fit on one machine",
    FitJacobian: "its matrices are too large to pass through parts; fit on one machine, which can be cancelled between two prompts",
}
