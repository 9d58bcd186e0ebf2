"""What of this room can't run over parts of a set, and why."""

from techniques.generation.requests import MakeDirection

SCATTERED: dict = {}
REFUSED = {
    MakeDirection: "it is one forward pass a prompt, and its name is the digest of all its bits, which parts would sum in another order; make it on one machine"
}
