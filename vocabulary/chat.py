"""
Chats: a prompt as turns, which a model's own template writes as text. A chat is a tuple of turns; one that ends with the assistant's turn ends there, as the beginning of its
answer. A label in a chat stands at a character of the turns' contents, one after another, so that it does not depend on the template. Never imports torch.
"""

import re
from dataclasses import dataclass

from vocabulary.nodes import UserError
from vocabulary.typed import parse_json

ROLES = ("system", "developer", "user", "assistant", "tool")
HEAD = re.compile(rf"^({'|'.join(ROLES)}):[ \n]?", re.MULTILINE)


@dataclass(frozen=True)
class Turn:
    """What one role says."""

    role: str
    content: str


Chat = tuple[Turn, ...]


def read_messages(obj: object) -> Chat:
    """A chat from its JSON, a list of {"role": …, "content": "text"}."""
    if not isinstance(obj, list) or not obj:
        raise UserError('a chat is a list of messages, [{"role": "user", "content": "text"}]')
    for n, m in enumerate(obj):
        if not isinstance(m, dict) or set(m) != {"role", "content"} or not isinstance(m["content"], str):
            raise UserError(f'message {n} of the chat must be {{"role": …, "content": "text"}}, and nothing else')
        if m["role"] not in ROLES:
            raise UserError(f"message {n} of the chat has the role {str(m['role'])[:40]!r}: roles are {', '.join(ROLES)}")
    return tuple(Turn(m["role"], m["content"]) for m in obj)


def messages(chat: Chat) -> list[dict[str, str]]:
    """A chat as tokenizers take it."""
    return [{"role": turn.role, "content": turn.content} for turn in chat]


def as_typed(text: str | Chat) -> str:
    """A chat in the form in which it is typed: each turn begins with its role on a new line; a line of a content that looks so gets a backslash. Text as it is."""
    if isinstance(text, str):
        return text
    guard = lambda content: re.sub(rf"\n(\\*(?:{'|'.join(ROLES)}):)", r"\n\\\1", content)  # noqa: E731
    return "\n".join(f"{turn.role}: {guard(turn.content)}" for turn in text)


def read_typed(text: str) -> Chat:
    """The chat that was typed: turns as `as_typed` writes them, or a JSON list of messages; text before the first role is the user's turn."""
    if text.lstrip().startswith("[{"):
        return read_messages(parse_json(text))
    marks = [*HEAD.finditer(text)]
    ends = [*(m.start() - 1 for m in marks[1:]), len(text)]
    free = lambda content: re.sub(rf"\n\\(\\*(?:{'|'.join(ROLES)}):)", r"\n\1", content)  # noqa: E731
    turns = [Turn(m[1], free(text[m.end() : end])) for m, end in zip(marks, ends)]
    first = text[: max(marks[0].start() - 1, 0)] if marks else text
    return (*([Turn("user", free(first))] if first else []), *turns)


def asked(text: str, system: str | None) -> Chat:
    """The chat that was typed, with this system's turn in front."""
    chat = read_typed(text)
    if system is None:
        return chat
    if any(turn.role == "system" for turn in chat):
        raise UserError("the chat has a system's turn of its own: leave --system or that turn out")
    return (Turn("system", system), *chat)


def turned(text: str | Chat | None, on: bool, system: str | None = None) -> str | Chat | None:
    """Text as the user's turn of a chat, behind a system's turn; back: the text of the last user's turn."""
    if text is None or isinstance(text, str) is not on:
        return text
    if on:
        return (*([] if system is None else [Turn("system", system)]), Turn("user", text))
    return text[last_user(text)].content


def grown(text: str | Chat, more: str) -> str | Chat:
    """A text, or the assistant's turn at the end of a chat (a new one where it has none), with more behind it."""
    if isinstance(text, str):
        return text + more
    if text[-1].role == "assistant":
        return (*text[:-1], Turn("assistant", text[-1].content + more))
    return (*text, Turn("assistant", more))


def last_user(chat: Chat) -> int:
    """The number of the user's last turn; of the last turn where the user says nothing."""
    return max((n for n, turn in enumerate(chat) if turn.role == "user"), default=len(chat) - 1)


def start_of(chat: Chat, number: int) -> int:
    """Where the content of a turn begins among all contents."""
    return sum(len(turn.content) for turn in chat[:number])


def read_label(place: object, text: str | Chat | None) -> int:
    """A label's place: a character offset in a text, [number of the message, character offset in its content] in a chat. -1 where there is no such place."""
    if isinstance(text, str | None):
        return place if type(place) is int and 0 <= place < len(text or "") else -1
    if not isinstance(place, list) or len(place) != 2 or not all(type(i) is int for i in place):
        return -1
    number, offset = place
    inside = 0 <= number < len(text) and 0 <= offset < len(text[number].content)
    return start_of(text, number) + offset if inside else -1


def label_json(place: int, text: str | Chat | None) -> int | list[int]:
    """What `read_label` reads."""
    if isinstance(text, str | None):
        return place
    number = max(n for n in range(len(text)) if start_of(text, n) <= place and text[n].content)
    return [number, place - start_of(text, number)]


def text_json(text: str | Chat | None) -> object:
    """A text or a chat as a prompt set holds it."""
    return text if isinstance(text, str | None) else messages(text)


CHAT_IDS = '''
def chat_ids(messages):
    """A chat as the tokenizer's own template writes it, up to where the assistant's answer begins, or goes on after its prefix."""
    prefix = messages[-1]["role"] == "assistant"
    return tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=not prefix, continue_final_message=prefix)

'''  # of exported scripts
