"""The way out of a console: ``~.`` at the start of a line, as in ssh. Pure: bytes in, bytes out."""


class EscapeFilter:
    """Takes the escape out of what is typed. ``~~`` stands for one ``~``; any other ``~`` is left alone."""

    def __init__(self) -> None:
        self.is_left = False
        self._at_line_start = True
        self._holds_tilde = False

    def feed(self, typed: bytes) -> bytes:
        """Return what goes to the guest; once ``is_left`` is true the rest is dropped."""
        out = bytearray()
        for byte in typed:
            if self._holds_tilde:
                self._holds_tilde = False
                if byte == ord("."):
                    self.is_left = True
                    break
                out += b"~" if byte == ord("~") else bytes((ord("~"), byte))
            elif byte == ord("~") and self._at_line_start:
                self._holds_tilde = True
                continue
            else:
                out.append(byte)
            self._at_line_start = byte in b"\r\n"
        return bytes(out)
