"""Text of any origin as one line that can be printed. Floor F0."""

from __future__ import annotations


def plain(text: object) -> str:
    r"""The text with what cannot be printed escaped: it neither breaks a line nor moves the cursor.

    >>> print(plain("two\nlines"))
    two\nlines
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def one_line(error: BaseException | str) -> str:
    """An exception's message on one line; its type where it has no message.

    >>> one_line(ValueError("two\\n  lines"))
    'two lines'
    """
    return plain(" ".join(str(error).split())) or type(error).__name__
