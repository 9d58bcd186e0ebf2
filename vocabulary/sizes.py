"""What to do about a model that does not fit. Never imports torch."""

from dataclasses import dataclass

from utils import show_bytes


@dataclass(frozen=True)
class Room:
    """Free bytes, what the loaded model holds counted as free: on the device that a model goes to, on all GPUs together, in this machine's memory (0: unknown)."""

    device: str = "cpu"
    free: int = 0
    gpus: int = 0
    cpu: int = 0


def ways(need: int, dtype: str, room: Room) -> list[tuple[str, str]]:
    """How a model whose weights need so many bytes in a dtype may fit: an option of `M` and of the command line, and what comes of it in words."""

    def there(bytes_needed: int, free: int) -> str:
        over = bytes_needed - free
        return f"{show_bytes(bytes_needed)} of {show_bytes(free)}" + (f", still {show_bytes(over)} too much" if over > 0 else ", which fits")

    out = [("dtype=bfloat16", there(need // 2, room.free))] if dtype == "float32" else []
    if room.device.startswith("cuda"):
        if room.gpus > room.free:
            out.append(("device_map=auto", f"spread over all GPUs: {there(need, room.gpus)}"))
        out.append(("device=cpu", f"in this machine's memory, slower: {there(need, room.cpu)}"))
    return out
