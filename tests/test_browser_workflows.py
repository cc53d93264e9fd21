"""Every workflow in ComfyUI's real page: opened, asked for its prompt, saved and opened again, listed."""

from __future__ import annotations

import json

import pytest

from tests.browser import ROOT, needs_browser, open_host

pytestmark = needs_browser
NAMES = sorted(path.stem for path in (ROOT / "workflows").glob("*.json"))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with open_host(tmp_path_factory.mktemp("browser")) as bench:
        yield bench


def read(folder: str, name: str) -> dict:
    return json.loads((ROOT / folder / f"{name}.json").read_text(encoding="utf-8"))


def still(graph: dict) -> dict:
    """Without where the page looks at."""
    return {k: v for k, v in graph.items() if k != "extra"}


def opened(bench, workflow: str | dict, graph: dict):
    """Load; where files are to be fetched, the page says which, asks for their sizes, and is answered."""
    assert bench.load(workflow) == []
    models = [(m, n["widgets_values"]) for n in graph["nodes"] for m in n["properties"].get("models", [])]
    wanted = {m["name"] for m, values in models if m["name"] in values}
    dialog = bench.page.locator(".p-dialog")
    if wanted:
        dialog.wait_for()
        told = dialog.inner_text()
        assert not [file for file in wanted if file not in told]
        bench.page.keyboard.press("Escape")
    dialog.wait_for(state="detached", timeout=5000)
    assert set(bench.complaints()) <= {m["url"] for m, _ in models}


@pytest.mark.parametrize("name", NAMES)
def test_it_opens_and_comes_back_the_same(bench, name):
    graph, api = read("workflows", name), read("tests/api", name)
    opened(bench, name, graph)
    assert bench.prompt() == api
    first = bench.save()
    opened(bench, first, graph)
    assert still(bench.save()) == still(first)
    assert bench.prompt() == api
    bench.js("async () => { await app.extensionManager.command.execute('Comfy.Canvas.FitView') }")
    bench.page.wait_for_timeout(500)
    bench.picture(f"workflow_{name}.png")


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another(bench, name):
    """As large as the page draws them, their titles too."""
    opened(bench, name, read("workflows", name))
    title = bench.js("LiteGraph.NODE_TITLE_HEIGHT")
    boxes = [
        (n["type"], x, y - title, x + n["size"][0], y + n["size"][1])
        for n in bench.save()["nodes"]
        for x, y in [n["pos"]]
    ]
    for i, (a, *p) in enumerate(boxes):
        for b, *q in boxes[:i]:
            assert p[0] >= q[2] or q[0] >= p[2] or p[1] >= q[3] or q[1] >= p[3], (a, b)


def test_the_template_browser_shows_them(bench):
    bench.js("async () => { await app.extensionManager.command.execute('Comfy.BrowseTemplates') }")
    page = bench.page
    page.locator(".p-listbox-option", has_text="Face Rig").click()
    for _ in range(len(NAMES)):  # a part at a time, as one scrolls
        cards = page.locator("[data-testid^=template-workflow-]")
        if cards.count() == len(NAMES):
            break
        cards.last.scroll_into_view_if_needed()
        page.wait_for_timeout(300)
    found = cards.evaluate_all("all => all.map(c => c.dataset.testid.replace('template-workflow-', ''))")
    assert sorted(found) == NAMES
    bench.picture("templates.png")
    for name in NAMES:
        card = page.get_by_test_id(f"template-workflow-{name}")
        card.scroll_into_view_if_needed()
        card.locator("img").first.wait_for()
        page.wait_for_function(
            "img => img.naturalWidth === 512", arg=card.locator("img").first.element_handle()
        )
    page.get_by_test_id(f"template-workflow-{NAMES[0]}").click()
    page.locator(".p-dialog").wait_for(state="detached")
    wanted = {n["type"] for n in read("workflows", NAMES[0])["nodes"]}
    page.wait_for_function("n => app.graph.nodes.length === n", arg=len(read("workflows", NAMES[0])["nodes"]))
    assert {n["type"] for n in bench.save()["nodes"]} == wanted
    assert not bench.complaints()
