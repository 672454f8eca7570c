"""How a written report is known again, so that nothing else is overwritten by one."""

HTML = "seer report"  # content of the generator element
MARKDOWN = "<!-- seer report -->"
JSON = "seer_report"  # the first key

HEAD = 400  # bytes in which a mark stands


def is_report(head: bytes) -> bool:
    """Whether a file that begins like this is a report, in any format."""
    return f'content="{HTML}"'.encode() in head or head.startswith((MARKDOWN.encode(), f'{{"{JSON}":'.encode()))
