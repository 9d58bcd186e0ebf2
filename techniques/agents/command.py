"""The command line of this room: mcp."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import ClassVar

from rich.console import Console

from vocabulary.nodes import UserError


@dataclass
class McpCommand:
    """Serve every command as a tool to coding agents, over the Model Context Protocol on stdin and stdout. No tool writes a file, unless --write."""

    write: bool = False
    """also tools that write files: fits, trainings, --out and --plot"""
    seconds: float = 60
    """what would take longer is refused with an estimate, unless the call says run_anyway"""
    unused: ClassVar[tuple[str, ...]] = ()

    def alone(self, engine, show: Callable[[object], None], errors: Console) -> int:
        if find_spec("mcp") is None:
            raise UserError("mcp needs the package of that name: `uv sync --group mcp`")
        if not self.seconds > 0:
            raise UserError("--seconds is a positive number")
        from techniques.agents.server import serve

        serve(engine, self.write, self.seconds)
        return 0


COMMANDS = {"mcp": McpCommand}
SHOW: dict = {}
