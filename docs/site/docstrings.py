"""Reads hatfn's docstrings as the site needs them: roles become links, examples become code."""

from __future__ import annotations

import re
from typing import Any

import griffe

ROLE = re.compile(r":(?:func|meth|class|mod|data):`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Turns the roles and the headings of docstrings into what mkdocstrings reads."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        """Called once the package is read."""
        for thing in everything(pkg):
            if thing.docstring is not None:
                thing.docstring.value = markdown(thing, thing.docstring.value)


def everything(thing: griffe.Object) -> list[griffe.Object]:
    """An object and all that it contains, without what it imports."""
    inside = [member for member in thing.members.values() if not member.is_alias]
    return [thing, *(one for member in inside for one in everything(member))]


def markdown(thing: griffe.Object, text: str) -> str:
    """The docstring of an object with its roles as links."""

    def link(match: re.Match[str]) -> str:
        short, name = match.groups()
        shown = name.rpartition(".")[2] if short else name
        if name.startswith("torch."):
            return f"`{shown}`"
        try:
            path = name if name.startswith("hatfn.") else thing.resolve(name)
        except griffe.NameResolutionError:
            path = f"hatfn.{name}"
        # A name that the reference does not hold is shown without a link.
        return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'

    return re.sub(r"^(\s*)Example:$", r"\1Examples:", ROLE.sub(link, text), flags=re.MULTILINE)
