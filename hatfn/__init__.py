"""hatfn: continual learning with hard attention to the task, in the functional style."""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hatfn.public import *  # noqa: F403

__version__ = version("hatfn")


if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, imported when it is first asked for: the command line need not wait for it."""
        public = import_module("hatfn.public")
        if hasattr(public, name):
            return getattr(public, name)
        try:
            return import_module(f"hatfn.{name}")
        except ModuleNotFoundError:
            raise AttributeError(f"module 'hatfn' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *import_module("hatfn.public").__all__})
