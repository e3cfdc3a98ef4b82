"""Puts examples/ and the changelog on the site, where they lie inside docs/ and not beside it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add what is shown: measured tables, their figures, the scripts that made them."""
    shown = [path for path in ROOT.glob("examples/**/*") if path.suffix in {".md", ".png", ".py"}]
    for path in [*sorted(shown), ROOT / "CHANGELOG.md"]:
        name = str(path.relative_to(ROOT))
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **kwargs: Any) -> str:
    """Links that leave docs/ in the repository stay inside the site."""
    return re.sub(r"\]\(((?:\.\./)*)\.\./(examples/|CHANGELOG)", r"](\1\2", markdown)
