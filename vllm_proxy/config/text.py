"""What text may be: YAML's and JSON's escapes can produce half of a character."""


def has_lone_surrogate(text: str) -> bool:
    """Whether *text* contains half of a character, which cannot be encoded as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False
