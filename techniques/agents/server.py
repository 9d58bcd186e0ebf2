"""Serves the tools over the Model Context Protocol (the package `mcp`, an optional dependency). One call at a time has the model."""

import threading
import time
from collections.abc import Callable

import anyio
import mcp_types as types
from mcp.server import Server
from mcp.server.stdio import stdio_server

from vocabulary.nodes import UserError
from vocabulary.requests import Progress

WORDS = """Loupe: a microscope for the circuits of transformer language models. Each tool is one analysis on a model (default: zoo, a small embedded one) and a prompt
or a prompt set (a .jsonl file). Addresses: L3H2 a head, L3H2.q its queries, L3.mlp, L3.resid_pre@S2 at a label or @-1 at a position. Interventions
(do): L9H9=zero, =mean, =patch, =resample, =scale:0.5. Results are tables as text, with the conventions they follow in the last line, and JSON."""
EVERY = 0.25  # seconds between two lines of progress


def server(tools: list[tuple[str, str, dict]], answer: Callable[[str, dict, Callable, Callable], tuple[str, object]], read_only: bool) -> Server:
    """A server of tools (name, description, schema). answer(name, arguments, say, stopped) gives text and JSON, or a UserError; it runs in a thread."""
    turn = threading.Lock()
    hints = types.ToolAnnotations(read_only_hint=read_only, destructive_hint=False, open_world_hint=True)
    listed = [types.Tool(name=name, description=text, input_schema=shape, annotations=hints) for name, text, shape in tools]

    async def list_tools(ctx, params) -> types.ListToolsResult:
        return types.ListToolsResult(tools=listed)

    async def call_tool(ctx, params) -> types.CallToolResult:
        gone, last = threading.Event(), 0.0

        def say(part: Progress) -> None:
            nonlocal last
            if time.monotonic() - last >= EVERY or part.notice:
                last = time.monotonic()
                anyio.from_thread.run(ctx.session.report_progress, part.done, part.total or None, part.text)

        def work() -> tuple[str, object]:
            with turn:
                return answer(params.name, params.arguments or {}, say, gone.is_set)

        try:
            text, body = await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        except UserError as error:
            return types.CallToolResult(content=[types.TextContent(type="text", text=str(error))], is_error=True)
        finally:
            gone.set()
        return types.CallToolResult(content=[types.TextContent(type="text", text=text)], structured_content=body)

    return Server("loupe", title="Loupe", instructions=WORDS, on_list_tools=list_tools, on_call_tool=call_tool)


def serve(some: Server) -> None:
    """On stdin and stdout, until they close. What libraries print goes to stderr."""

    async def run() -> None:
        async with stdio_server() as (read, out):
            await some.run(read, out, some.create_initialization_options())

    anyio.run(run)
