"""Read a file of conversations about pictures, in LLaVA's form, a JSON list or a row a line:

    {"id": 7, "image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
                                                  {"from": "gpt", "value": "A dog."}, ...]}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from lavis_evlgen.datasets.annotations.files import RowsFile, encodes, quoted, read_rows
from lavis_evlgen.media.errors import DataError

IMAGE = "<image>"  # where the picture stands
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


class ConversationRow(NamedTuple):
    """One conversation about the picture `image`, a path below the images folder: (role, words) of each message.

    Roles are system (first, if at all), user and assistant, in turn; the assistant has the last word.
    """

    image: str
    messages: tuple[tuple[str, str], ...]
    conversation_id: int | str | None = None
    image_id: int | str | None = None
    split: str | None = None


@dataclass
class ConversationsFile(RowsFile):
    """What a file of conversations holds; `rows` are ConversationRows."""

    def add(self, where: str, record: dict):
        """Keep the row, or say what is wrong with it."""
        image, turns = record.get("image"), record.get("conversations")
        if problem := _problem_with_image(image) or _problem_with_turns(turns):
            return self.problems.append(f"{where}: {problem}")
        messages = tuple((ROLES[turn["from"]], turn["value"].strip()) for turn in turns)
        if problem := _problem_with_messages(messages):
            return self.problems.append(f"{where}: {problem}")
        ids = (record.get(key) for key in ("id", "image_id"))
        ids = [found if isinstance(found, (int, str)) else None for found in ids]
        self.rows.append(ConversationRow(image.strip(), messages, *ids, record.get("split")))


def _problem_with_image(image) -> str | None:
    if image is None or image == "" or image == []:
        return "no picture (a conversation without one cannot train the connector)"
    if isinstance(image, list):
        return f"{len(image)} pictures; a conversation is about one"
    return None if isinstance(image, str) and image.strip() and encodes(image) else f"no image name but {image!r:.40}"


def _problem_with_turns(turns) -> str | None:
    if not isinstance(turns, list) or not turns:
        return "no conversations"
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            return f"turn {number} is not {{from, value}} but {turn!r:.60}"
        if str(turn.get("from")) not in ROLES:
            return f"turn {number} is from {turn.get('from')!r}; known are {', '.join(ROLES)}"
        if not turn["value"].strip() or not encodes(turn["value"]):
            return f"turn {number} says nothing that can be read"
    return None


def _problem_with_messages(messages: tuple[tuple[str, str], ...]) -> str | None:
    roles = [role for role, _ in messages]
    talk = roles[1:] if roles[0] == "system" else roles
    if talk != ["user", "assistant"] * (len(talk) // 2) or not talk:
        return f"the turns are from {', '.join(roles)}; expected human and gpt in turn, gpt last"
    places = [role for role, words in messages for _ in range(words.count(IMAGE))]
    if places != ["user"]:
        return f"{len(places)} times {IMAGE}, or not in a human's turn; it says where the picture stands, once"
    return None


def read_conversations_file(path) -> ConversationsFile:
    """Parse `path`; rows that cannot be used are listed in `.problems`. Raises DataError for a file of another kind."""
    table = read_rows(path, "conversations file", is_file=lambda content: False)
    if isinstance(table, dict):
        raise DataError(f"{path} is a JSON object with {quoted(table)}; expected a list of conversations")
    found, seen = ConversationsFile(str(path), table.format), {}
    for where, record in found.dicts(table.records, seen):
        found.add(where, record)
    header = [*table.header, *seen]
    if header and "conversations" not in header:
        raise DataError(
            f"{path} has no column 'conversations'; its columns are {quoted(header)}. Expected is LLaVA's JSON: id, "
            "image, conversations: [{from: human, value: ...}, {from: gpt, value: ...}]"
        )
    found.problems[:0] = table.problems
    return found
