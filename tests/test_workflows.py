"""The workflows as files: what code draws, what the schemas allow, what a reader of the canvas needs."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from tests import draw_workflows
from tests.canvas import text
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.node_pack import ROOT

NAMES = list(draw_workflows.WORKFLOWS)
OFFICIAL = ["Official DiffusionRig", "Official DiFaReli"]


@pytest.fixture(scope="module")
def schemas(pack):
    folder = pack.host.folder / "input" / "album"
    folder.mkdir()
    (folder / "photo.png").touch()
    return {k: n.define_schema() for k, n in pack.nodes.items()}


@pytest.fixture(scope="module")
def drawn(schemas):
    return draw_workflows.draw(schemas)


def load(name: str) -> dict:
    return json.loads((ROOT / "workflows" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_files_are_what_the_code_draws(drawn):
    for folder in ("workflows", "tests/api"):
        assert {p.stem for p in (ROOT / folder).glob("*.json")} == set(NAMES), folder
    for name, c in drawn.items():
        for folder, graph in (("workflows", c.ui()), ("tests/api", c.api())):
            path = ROOT / folder / f"{name}.json"
            assert path.read_text(encoding="utf-8") == text(graph), f"python -m tests.draw_workflows ({path})"


@pytest.mark.parametrize("name", NAMES)
def test_values_and_sockets_fit_the_schemas(drawn, schemas, name):
    graph, c = load(name), drawn[name]
    links = {link[0]: link for link in graph["links"]}
    seen = set()
    for node, made in zip(graph["nodes"], c.nodes, strict=False):
        for slot, entry in enumerate(node["inputs"]):
            if entry["link"] is not None:
                assert links[entry["link"]][3:5] == [node["id"], slot]
                seen.add(entry["link"])
                source = graph["nodes"][links[entry["link"]][1] - 1]
                given = source["outputs"][links[entry["link"]][2]]["type"]
                assert given in entry["type"].split(",") and links[entry["link"]][5] == given, (name, entry)
        for entry in node["outputs"]:
            assert all(links[k][1] == node["id"] for k in entry["links"] or [])
        if made.type not in schemas:
            continue
        assert len(node["widgets_values"]) == len(made.widgets)
        for i in schemas[made.type].inputs:
            value = made.widgets.get(i.id)
            if i.widget and i.options is not None and i.id not in made.links:
                missing = name in OFFICIAL and i.id == "file" and "models" in node["properties"]
                assert value in i.options or missing, (made.type, i.id, value)
            elif i.widget and i.min is not None:
                assert i.min <= value <= i.max, (made.type, i.id)
    assert seen == links.keys()


@pytest.mark.parametrize("name", NAMES)
def test_the_canvas_reads_well(name):
    graph = load(name)
    boxes = [(*n["pos"], n["pos"][0] + n["size"][0], n["pos"][1] + n["size"][1]) for n in graph["nodes"]]
    for i, a in enumerate(boxes):
        for b in boxes[:i]:
            apart = a[0] >= b[2] or b[0] >= a[2] or a[1] >= b[3] or b[1] >= a[3]
            assert apart, (name, graph["nodes"][i]["type"])
    titles = [g["title"][0] for g in graph["groups"]]
    assert titles == [str(i + 1) for i in range(len(titles))]
    note = graph["nodes"][-1]
    assert note["type"] == "MarkdownNote" and note["widgets_values"][0].startswith("# ")
    assert "$" not in note["widgets_values"][0] and len(note["widgets_values"][0]) > 300


@pytest.mark.parametrize("name", NAMES)
def test_the_thumbnail_is_a_small_square(name):
    path = ROOT / "workflows" / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.size == (512, 512)
    assert path.stat().st_size < 120_000


def test_files_that_must_be_fetched_are_named_on_their_loaders():
    for name in NAMES:
        needs = [m for n in load(name)["nodes"] for m in n["properties"].get("models", [])]
        assert bool(needs) == (name in OFFICIAL), name
        for m in needs:
            assert m["directory"] == "face_rig" and m["url"].startswith("https://")
        for node in load(name)["nodes"]:
            listed = [m["name"] for m in node["properties"].get("models", [])]
            assert not listed or node["widgets_values"][0] in listed, (name, node["type"])
