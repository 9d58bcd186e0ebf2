"""What is known to be wrong, in words. A line that is no longer needed fails its test."""

KNOWN: dict[tuple[str, str], str] = {}
