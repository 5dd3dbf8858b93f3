"""Server-sent events (WHATWG HTML, section 9.2) as far as Colmeia's stream uses them: bytes in, events out."""

import json
from collections.abc import Iterator

from colmeia.client.shapes import Event

_LIMIT = 4 * 1024 * 1024


class EventDecoder:
    """Cuts a byte stream into events. Comments (heartbeats) vanish; a half event at the end is dropped."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, chunk: bytes) -> Iterator[Event]:
        """Take the next bytes, cut anywhere, and yield the events they complete. Raises ValueError for no JSON."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        if len(self._rest) > _LIMIT:
            raise ValueError("an event is larger than 4 MiB")
        for line in lines:
            text = line.removesuffix(b"\r")
            if text.startswith(b"data:"):
                self._data.append(text[5:].removeprefix(b" "))
            elif not text and self._data:
                event: Event = json.loads(b"\n".join(self._data))
                self._data.clear()
                yield event
