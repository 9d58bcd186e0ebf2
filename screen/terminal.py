"""
The terminal as a driver of Textual: what is typed becomes keys and pastes, and a terminal that is gone ends the app.

Textual 8.2 reads a paste character by character through its key parser (an ESC in it spills the rest as keys), takes an unknown or split escape sequence for
single keys, and when the terminal is gone it spins, or blocks on a full queue of writes. `Parser`, `Writer` and `Terminal` replace those three parts.
"""

import codecs
import os
import re
import selectors
import signal
from collections.abc import Generator, Iterable, Iterator

from textual import constants, events
from textual._parser import ParseTimeout
from textual._time import get_time
from textual._xterm_parser import BRACKETED_PASTE_END, BRACKETED_PASTE_START, XTermParser
from textual.drivers import linux_driver
from textual.drivers._writer_thread import WriterThread
from textual.drivers.linux_driver import LinuxDriver
from textual.message import Message

BURST = 512  # characters of one read that are a paste, in a terminal that does not mark pastes
SILENCE = 0.25  # seconds that end such a burst
NO_MARK = 5.0  # seconds after which a paste ends that the terminal began and did not end
REST_OF_SEQUENCE = 0.5  # seconds in which the rest of a begun escape sequence may come, over a slow line
MOST_PASTED = 1 << 20  # characters of one paste that are kept
MOST_WAITING = 500  # messages that wait for the app before nothing more is read

# what a terminal sends at once: CSI (with the three bytes of the old mouse report), SS3, a string (OSC, DCS, APC, PM, SOS), alt and a character, a character
UNIT = re.compile(
    r"\x1b\x1b?\[M[^\x1b]{3}|\x1b\x1b?\[(?!M)[0-?]*[ -/]*[@-~]|\x1b\x1b?O[ -~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[^\x1b\[O]|[^\x1b]", re.DOTALL
)
BEGUN = re.compile(r"\x1b\x1b?(?:\[(?:M[^\x1b]{0,2}|[0-?]{0,64}[ -/]{0,8})|O)?\Z", re.DOTALL)
SEQUENCES = re.compile(r"\x1b\[[^~A-Za-z]*[~A-Za-z]")


def newlines(text: str) -> str:
    """A pasted text with \\n for a newline: a terminal sends CR, as the enter key does."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


class Parser(XTermParser):
    """Bytes of a terminal, decoded, as messages: whole escape sequences, whole pastes. What is no known sequence is dropped, never read as keys."""

    def __init__(self, debug: bool = False):
        super().__init__(debug)
        self.held = ""  # the beginning of an escape sequence, or of the mark that ends a paste
        self.until = 0.0  # when it is taken for what it is
        self.paste: list[str] | None = None
        self.pasted = 0
        self.marked = False  # whether the terminal says where the paste ends

    def feed(self, data: str) -> Iterable[Message]:
        if not data:
            return super().feed("")
        return list(self.read(data))

    def tick(self) -> Iterable[Message]:
        """What is due by the clock: the end of a paste that no mark ended, the keys of a sequence that does not go on."""
        if not self.held and self.paste is None or get_time() < self.until:
            return []
        held, self.held = self.held, ""
        if self.paste is not None:
            self.paste.append(held)
            return [self.end_paste()]
        return [m for c in held if len(held) < 3 for m in self.unit(c)]

    def read(self, data: str) -> Iterator[Message]:
        if self.paste is None and self.held == "\x1b" and data[0] not in "\x1b[O":  # escape, and then another key
            self.held = ""
            yield from self.unit("\x1b")
        data, self.held, at = self.held + data, "", 0
        if self.paste is None and len(data) >= BURST and BRACKETED_PASTE_START not in data and len(SEQUENCES.sub("", data)) >= BURST:
            self.begin_paste(marked=False)
        while at < len(data):
            if self.paste is not None:
                at += yield from self.read_paste(data[at:])
            elif m := UNIT.match(data, at):
                at = m.end()
                if m[0] == BRACKETED_PASTE_START:
                    self.begin_paste(marked=True)
                else:
                    yield from self.unit(m[0])
            elif BEGUN.match(data, at):
                self.held = data[at:]
                self.until = get_time() + (REST_OF_SEQUENCE if self.held.strip("\x1b") else constants.ESCAPE_DELAY)
                return
            elif data.startswith("\x1b\x1b", at):
                yield from self.unit("\x1b")
                at += 1
            else:  # a sequence that is none
                at += 2

    def begin_paste(self, marked: bool) -> None:
        self.paste, self.pasted, self.marked, self.until = [], 0, marked, get_time() + (NO_MARK if marked else SILENCE)

    def read_paste(self, data: str) -> Generator[Message, None, int]:
        """The part of a paste in `data`; returns where it ends."""
        text, end, _ = data.partition(BRACKETED_PASTE_END) if self.marked else (data, "", "")
        if self.marked and not end:  # the mark may be cut in two
            cut = next((n for n in range(len(BRACKETED_PASTE_END) - 1, 0, -1) if text.endswith(BRACKETED_PASTE_END[:n])), 0)
            text, self.held = text[: len(text) - cut], text[len(text) - cut :]
        self.paste.append(text[: max(0, MOST_PASTED - self.pasted)])
        self.pasted += len(text)
        self.until = get_time() + (NO_MARK if self.marked else SILENCE)
        if end:
            yield self.end_paste()
        return len(text) + len(end) if end else len(data)

    def end_paste(self) -> events.Paste:
        text, self.paste = newlines("".join(self.paste)), None
        return events.Paste(text)

    def unit(self, text: str) -> Iterator[Message]:
        """One character or sequence through Textual's parser, which is left without a begun one."""
        if len(text) == 2:
            yield from list(self._sequence_to_key_events(text)) or self._sequence_to_key_events(text[1], alt=True)
            return
        try:
            got = list(super().feed(text))
        except (ValueError, OverflowError):  # a key report with a number that is no character
            super().__init__()
            return
        if self._timeout_time is not None:
            self._timeout_time, self._awaiting = None, self._gen.throw(ParseTimeout())
            got = [*got, *self._tokens] if text == "\x1b" else got
            self._tokens.clear()
        yield from (m for m in got if not (isinstance(m, events.Key) and any("\ud800" <= c <= "\udfff" for c in m.character or "")))


class Writer(WriterThread):
    """Writes until the terminal is gone; from then on it takes what is written and drops it, so that nobody waits."""

    def run(self) -> None:
        try:
            super().run()
        except OSError:
            while self._queue.get() is not None:
                pass


linux_driver.WriterThread = Writer  # the driver makes its writer by this name


class Terminal(LinuxDriver):
    """Textual's driver with `Parser`; it ends the app at a signal from its first byte on, and when the terminal is gone."""

    def start_application_mode(self) -> None:
        for sig in (signal.SIGHUP, signal.SIGTERM):
            self._loop.add_signal_handler(sig, self._app.exit)
        super().start_application_mode()

    def run_input_thread(self) -> None:
        """Read and parse until the app ends or the terminal is gone."""
        parser, decode = Parser(self._debug), codecs.getincrementaldecoder("utf-8")("replace").decode
        with selectors.DefaultSelector() as selector:
            selector.register(self.fileno, selectors.EVENT_READ)
            while not self.exit_event.is_set():
                wait = 0.02 if parser.held or parser.paste is not None else 0.1
                if selector.select(wait) and not self.crowded():
                    try:
                        data = os.read(self.fileno, 1 << 16)
                    except OSError:
                        data = b""
                    if not data:
                        self._loop.call_soon_threadsafe(self.gone)
                        return
                    for message in parser.feed(text) if (text := decode(data)) else ():
                        self.process_message(message)
                for message in parser.tick():
                    self.process_message(message)

    def crowded(self) -> bool:
        """Whether the app has so much to do that reading on would only fill memory; the terminal waits then."""
        if self._app._message_queue.qsize() < MOST_WAITING:
            return False
        self.exit_event.wait(0.02)
        return True

    def gone(self) -> None:
        """The terminal is gone: the app ends, and so does its engine."""
        self._app.exit()
