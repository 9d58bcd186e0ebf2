"""Chats as text: the tokenizer's own chat template writes them, and the characters that are the turns' own are found in what it wrote."""

from jinja2 import TemplateError

from vocabulary.chat import Chat, messages, Turn
from vocabulary.nodes import UserError

SIGNS = range(0xE000, 0xF8FF)  # private characters that stand for contents
Own = tuple[tuple[int, int, int], ...]  # of each character run that is a content's: its start in the text, its length, its start among all contents


def prefix_of(chat: Chat) -> bool:
    """Whether a chat ends in the beginning of the assistant's answer."""
    return chat[-1].role == "assistant"


def render(tokenizer, chat: Chat) -> str:
    """
    The text of a chat up to where the assistant's answer begins, or goes on after its prefix, as tokenizer.apply_chat_template writes it. UserError without a
    template, and with the template's own words where it refuses the chat.
    """
    if not chat:
        raise UserError("an empty chat: type what the user says")
    if not getattr(tokenizer, "chat_template", None):
        raise UserError(
            "this model's tokenizer has no chat template, so it can't be asked in turns: ask it in plain text (>), or put a chat_template.jinja into its folder"
        )
    if prefix_of(chat) and not chat[-1].content.strip():
        raise UserError("the assistant's turn at the end is empty: type how its answer begins, or take the turn out")
    try:
        prefix = prefix_of(chat)
        return tokenizer.apply_chat_template(messages(chat), tokenize=False, add_generation_prompt=not prefix, continue_final_message=prefix)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        raise UserError(f"the chat template refuses these turns: {' '.join(str(error).split())[:300]}") from error


def own_characters(tokenizer, chat: Chat, text: str) -> Own | None:
    """
    Where the contents of the turns stand in the text of a chat. The template writes the same chat with a private character for each content; what stands between
    these is the template's. None where it writes this chat otherwise (some change a content, or look into it).
    """
    signs = {chr(sign): n for n, sign in zip(range(len(chat)), SIGNS)}
    try:
        skeleton = render(tokenizer, tuple(Turn(turn.role, sign) for sign, turn in zip(signs, chat)))
    except UserError:
        return None
    starts = [sum(len(turn.content) for turn in chat[:n]) for n in range(len(chat))]
    pieces, order = [""], []
    for c in skeleton:
        if c in signs:
            order.append(signs[c])
            pieces.append("")
        else:
            pieces[-1] += c
    if set(order) != set(range(len(chat))):
        return None
    own, at = [], len(pieces[0])
    for n, piece in zip(order, pieces[1:]):
        whole = chat[n].content
        content = next((c for c in (whole, whole.strip(), whole.rstrip(), whole.lstrip()) if text.startswith(c + piece, at)), None)
        if content is None:
            return None
        own.append((at, len(content), starts[n] + whole.index(content)))
        at += len(content) + len(piece)
    return tuple(own) if text.startswith(pieces[0]) and at == len(text) else None


def character(own: Own, place: int) -> int | None:
    """The character of the text that is this one of the contents; None where the template left it out."""
    return next((at + place - first for at, size, first in own if first <= place < first + size), None)


def template_tokens(own: Own, offsets: list[tuple[int, int]]) -> tuple[int, ...]:
    """The tokens, by their characters, that hold none of a content."""
    return tuple(i for i, (a, b) in enumerate(offsets) if not any(a < at + size and b > at for at, size, _ in own))
