"""The help pages: each has a picture, an example, and tables that agree with the node's schema."""

from __future__ import annotations

import re

import pytest
from PIL import Image

from tests.browser import PACK, needs_browser, open_host
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT

DOCS = ROOT / "web" / "docs"
NAMES = sorted(p.stem for p in DOCS.glob("*.md"))
PICTURE = re.compile(r"!\[([^\]]+)\]\(([^)]+)\)")
ROW = re.compile(r"^\| `(\w+)` \| (.+) \|$", re.M)
RANGE = re.compile(r"(-?[\d.]+) \((-?[\d.]+) to (-?[\d.]+)\)")


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def section(text: str, title: str) -> str:
    return re.split(r"^## ", text.split(f"## {title}\n", 1)[1], maxsplit=1, flags=re.M)[0]


def table(text: str, title: str) -> dict[str, list[str]]:
    """Rows of a section's table: name -> the other cells."""
    rows = ROW.findall(section(text, title))
    assert len(dict(rows)) == len(rows), "a name stands twice"
    return {name: [cell.strip() for cell in rest.split(" | ")] for name, rest in rows}


def test_every_node_has_a_page(pack):
    assert set(pack.nodes) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_a_picture(name):
    first, *others = PICTURE.findall(page(name))
    assert first[1] == f"{name}.jpg", "python -m tests.picture_nodes"
    for _, file in (first, *others):
        path = DOCS / file  # the panel resolves it below /extensions/<folder>/docs/
        assert path.stat().st_size < 60_000, file
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "JPEG" and 300 <= picture.width <= 800, (file, picture.size)
            assert picture.convert("L").getextrema()[1] > 150, f"{file} is empty"


def test_every_picture_is_shown():
    shown = {file for name in NAMES for _, file in PICTURE.findall(page(name))}
    assert shown == {p.name for p in DOCS.iterdir() if p.suffix != ".md"}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_has_its_parts(pack, name):
    text = page(name)
    title, first = text.split("\n\n", 2)[:2]
    assert title == f"# {pack.nodes[name].define_schema().display_name}"
    assert not first.startswith(("#", "!", "|")), "what the node does comes first"
    parts = re.findall(r"^## (.+)$", text, re.M)
    assert parts[-3:] == ["Inputs", "Outputs", "Example"]
    assert "`" in section(text, "Example")


@pytest.mark.parametrize("name", NAMES)
def test_the_tables_agree_with_the_schema(pack, name):
    schema, text = pack.nodes[name].define_schema(), page(name)
    inputs, outputs = table(text, "Inputs"), table(text, "Outputs")
    assert list(inputs) == [i.id for i in schema.inputs]
    assert list(outputs) == [o.display_name for o in schema.outputs]
    for o in schema.outputs:
        assert outputs[o.display_name][0] == o.io_type, o.display_name
    for i in schema.inputs:
        kind, default = inputs[i.id][:2]
        assert kind.replace(", ", ",") == i.io_type, i.id
        if i.io_type in ("INT", "FLOAT") and i.widget and (limits := RANGE.fullmatch(default)):
            assert [float(v) for v in limits.groups()] == [i.default, i.min, i.max], i.id
        elif i.io_type in ("INT", "FLOAT") and i.widget:
            assert default == str(i.default) and i.id == "seed", f"{i.id}: no range"
        elif i.io_type == "BOOLEAN":
            assert default == ("on" if i.default else "off"), i.id
        elif i.optional and not i.default:
            assert default == "optional", i.id
        elif i.io_type == "COMBO" and default:
            assert default == i.default and default in i.options, i.id
        elif i.io_type == "STRING":
            assert default == i.default, i.id


class TestInTheBrowser:
    pytestmark = needs_browser

    def test_the_picture_shows(self, tmp_path, name="FaceRig_AlignFace"):
        with open_host(tmp_path) as bench:
            bench.load("Relight a portrait")
            bench.js("id => app.canvas.selectNode(bench.node(id))", bench.node(name))
            bench.page.locator("[data-testid=info-button]").click()
            picture = bench.page.locator(f"img[src$='/extensions/{PACK}/docs/{name}.jpg']")
            picture.wait_for(timeout=20_000)
            assert picture.evaluate("async e => { await e.decode(); return e.naturalWidth }") >= 300
            bench.picture("help.png")
