"""The site of the documentation has every page, and every public name."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import yaml

import upop
from upop import integrations

ROOT = Path(__file__).parents[2]


def pages(entries: list[dict[str, object]]) -> list[str]:
    found: list[str] = []
    for entry in entries:
        for value in entry.values():
            found += pages(value) if isinstance(value, list) else [str(value)]
    return found


def test_every_page_is_in_the_contents() -> None:
    written = {str(each.relative_to(ROOT / "docs")) for each in (ROOT / "docs").rglob("*.md")}
    contents = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(pages(contents)) == sorted(written)


def test_every_public_name_has_its_entry() -> None:
    text = "".join(each.read_text(encoding="utf-8") for each in (ROOT / "docs" / "api").glob("*.md"))
    shown = set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))
    public = {f"upop.{name}" for name in upop.__all__} | {f"upop.integrations.{name}" for name in integrations.__all__}
    assert public <= shown
    for name in shown - public:  # what public functions take and return
        module, _, held = name.rpartition(".")
        assert hasattr(importlib.import_module(module), held) or importlib.util.find_spec(name), name
