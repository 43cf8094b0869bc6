"""Docstrings of this project as Markdown, for the site: an extension of griffe, which reads them.

A docstring lists what it explains as lines `name: text`, indented where they go on, and these
become a list; what it raises gets a paragraph. Everything else is Markdown already.
"""

import re

import griffe

# `key: text`, `data, index [window, B]: text`, `R [T, T]: text`.
_ITEM = re.compile(r"^((?:[a-zA-Z_]\w*(?: \[[^\]]*\])?)(?:, [a-z_]\w*(?: \[[^\]]*\])?)*): ?(.*)$")
_CAPITAL = re.compile(r"^[A-Z][a-z]")  # a sentence that begins with a word and a colon
_SPAN = re.compile(r"(`[^`]*`)")


def markdown(text: str) -> str:
    lines, listed = [], False
    for line in text.splitlines():
        if line.startswith("    ") or not line.strip():  # code, or the end of a paragraph
            listed = listed and bool(line.strip())
            lines.append(line)
            continue
        line = _escaped(line)
        if (item := _ITEM.match(line)) and not _CAPITAL.match(line):
            lines += [] if listed else [""]
            lines.append(f"- **`{item[1]}`**: {item[2]}")
            listed = True
        elif listed and not line[0].isupper():  # goes on, indented or not
            lines.append(f"  {line.lstrip()}")
        else:
            if listed or line.startswith("Raises "):
                lines.append("")
            lines.append(line)
            listed = False
    return "\n".join(lines)


def _escaped(line):
    """<v, M_i> would be a tag."""
    parts = _SPAN.split(line)
    return "".join(part if part[:1] == "`" else part.replace("<", "&lt;") for part in parts)


def told_fields(source: str) -> str:
    """The fields of a class that comments explain, behind them or above, as lines `name: text`."""
    lines, above = [], []
    for line in source.splitlines():
        if comment := re.match(r"    # (.*)", line):
            above.append(comment[1])
        elif field := re.match(r"    (\w+): .*?(?:  # (.*))?$", line):
            text = " ".join([*above, *filter(None, [field[2]])])
            lines += [f"{field[1]}: {text}"] if text else []
            above = []
        elif line.startswith("    def "):
            break
        else:
            above = []
    return "\n".join(lines)


class Docstrings(griffe.Extension):
    """Every docstring as Markdown, a dataclass's with what is said of its fields."""

    def on_object(self, *, obj, **_):
        if not obj.docstring:
            return
        made = " ".join(str(each.value) for each in getattr(obj, "decorators", ()))
        told = told_fields(obj.source) if "dataclasses.dataclass" in made else ""
        obj.docstring.value = markdown(f"{obj.docstring.value}\n\n{told}")
