"""Names of classes and categories: which one a text or a number means.

A name wins over a number: where some class is called by a number, every number is a name, so that "1" is never the
second of the classes 0, 2, 5. "#1" is always the second one.
"""

import difflib
from collections.abc import Sequence


def place_of(value: object, names: Sequence[str]) -> int | None:
    """The index in `names` that a text or number from people means; None where it means none."""
    text = str(value)
    if text in names:
        return list(names).index(text)
    text = text.strip()
    numbered = text.startswith("#")
    number = text[1:] if numbered else text
    if not (number.isascii() and number.isdecimal()) or int(number) >= len(names):
        return None
    return int(number) if numbered or not any_number(names) else None


def any_number(names: Sequence[str]) -> bool:
    """Whether some name is a number."""
    return any(name.isdecimal() for name in names)


def hint(value: object, names: Sequence[str], most: int = 8) -> str:
    """What stands behind "no such class": names that look like `value`, else the first ones and how many there are."""
    close = difflib.get_close_matches(str(value), names, 3)
    if close:
        return f"did you mean {', '.join(close)}?"
    more = f" … ({len(names)} in all)" if len(names) > most else ""
    return f"there are {', '.join(names[:most])}{more}"
