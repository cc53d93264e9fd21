"""Translations: English is the schemas' own, Chinese and Korean have every string and nothing stale."""

from __future__ import annotations

import json
import re

import pytest

from tests.node_pack import *  # noqa: F403 the fixtures
from tests.write_locales import LOCALES, categories, node_defs, text


def load(language: str, name: str) -> dict:
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


def strings(tree: dict, place: str = "") -> dict[str, str]:
    """Every string by its place, parts joined by '/'."""
    found = {}
    for key, value in tree.items():
        inner = strings(value, f"{place}/{key}") if isinstance(value, dict) else {f"{place}/{key}": value}
        found |= inner
    return found


def test_english_is_what_the_nodes_say(pack):
    schemas = {k: n.define_schema() for k, n in pack.nodes.items()}
    for name, want in (("nodeDefs", node_defs(schemas)), ("main", categories(schemas))):
        have = (LOCALES / "en" / f"{name}.json").read_text(encoding="utf-8")
        assert have == text(want), "python -m tests.write_locales"


@pytest.mark.parametrize("language, script", [("zh", r"[\u4e00-\u9fff]"), ("ko", r"[\uac00-\ud7a3]")])
def test_a_translation_is_whole(language, script):
    for name in ("nodeDefs", "main"):
        english, own = strings(load("en", name)), strings(load(language, name))
        assert own.keys() - english.keys() == set(), "no such string any more"
        assert english.keys() - own.keys() == set(), "not translated yet"
        for place, value in own.items():
            told = place.endswith(("/tooltip", "/description"))
            assert value.strip() == value != "" and (not told or re.search(script, value)), place


@pytest.mark.parametrize("language", ["zh", "ko"])
def test_numbers_and_names_survive_translation(language):
    """Ranges, sizes, file names and the names of inputs stand in the translation as in the original."""
    english, own = strings(load("en", "nodeDefs")), strings(load(language, "nodeDefs"))
    number = r"\d+(?:\.\d+)?"
    for place, value in english.items():
        lost = set(re.findall(number, value)) - set(re.findall(number, own[place]))
        kept = re.findall(r"'\w+'|\w+\.(?:pth|pkl|tar|npz|pt|ckpt)\b|models/\w+", value)
        lost |= {k for k in kept if k not in own[place]}
        assert not lost, (place, lost)
