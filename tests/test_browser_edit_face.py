"""The head of Edit Face in ComfyUI's real page: follows sliders and hands, undo, loading, the run."""

from __future__ import annotations

import pytest
from PIL import Image

from tests import graphs
from tests.browser import needs_browser, open_host

pytestmark = needs_browser
# what the panel shows: how much of it is drawn, how bright, and where the bright part is, 0 left to 1 right
SHOWN = """async id => {
    const canvas = bench.node(id).faceRigHead.canvas, n = 64
    const small = new OffscreenCanvas(n, n).getContext("2d", { willReadFrequently: true })
    small.imageSmoothingQuality = "high"
    small.drawImage(canvas, 0, 0, n, n)
    const all = Array.from(small.getImageData(0, 0, n, n).data)
    let grey = 0, drawn = 0, skin = 0, at = 0
    for (let i = 0; i < all.length; i += 4) if (all[i + 3] > 100) {
        const value = (all[i] + all[i + 1] + all[i + 2]) / 765
        drawn++, grey += value
        if (value > 0.45 && i < 0.7 * all.length) skin++, at += (i / 4) % n
    }
    return { side: canvas.width, cover: drawn / n ** 2, grey: grey / drawn, middle: at / skin / n, all }
}"""


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with open_host(tmp_path_factory.mktemp("browser")) as bench:
        yield bench


@pytest.fixture(scope="module")
def node(bench):
    """The graph with its run done; the id of Edit Face."""
    assert not bench.load(graphs.edit_face())
    node = bench.node("FaceRig_EditFace")
    bench.show(node)
    wait(bench, node, "panel.shown")
    bench.picture("edit_face_before.png", node)
    assert hint(bench, node) == "Run once to see the face"
    outputs = bench.run()[str(node)]["face_rig_head"][0]
    assert outputs["type"] == "temp" and outputs["filename"].endswith(".head")
    wait(bench, node, "panel.shown?.own")
    bench.settle(5)
    assert hint(bench, node) == ""
    return node


def wait(bench, node, what: str):
    bench.page.wait_for_function(
        f"(() => {{ const panel = bench.node({node}).faceRigHead; return {what} }})()"
    )
    bench.settle(5)


def hint(bench, node):
    return bench.js("id => bench.node(id).faceRigHead.hint.textContent", node)


def shown(bench, node) -> dict:
    bench.settle(4)
    return bench.js(SHOWN, node)


def values(bench, node, *names):
    return [bench.value(node, n) for n in names]


def middle(bench, node):
    """Of the canvas in the page."""
    r = bench.js(
        "id => { const r = bench.node(id).faceRigHead.canvas.getBoundingClientRect();"
        " return [r.x + r.width / 2, r.y + r.height / 2, r.width] }",
        node,
    )
    return r


@pytest.fixture(autouse=True)
def rest(bench, node):
    bench.js("id => bench.node(id).faceRigHead.zero()", node)
    bench.show(node)
    yield


def test_the_fitted_face_shows_and_follows_the_sliders(bench, node):
    still = shown(bench, node)
    assert 0.3 < still["cover"] < 0.9 and 0.2 < still["grey"] < 0.9
    for name, value in (("yaw", 30), ("jaw", 15), ("smile", 1), ("gaze_x", 25)):
        bench.set(node, name, value)
        moved = shown(bench, node)
        changed = sum(abs(a - b) > 12 for a, b in zip(still["all"], moved["all"]))
        assert changed > (500 if name == "yaw" else 15), (name, changed)
        if name == "yaw":
            assert moved["middle"] > still["middle"] + 0.02
        bench.set(node, name, 0)
    again = shown(bench, node)
    bench.set(node, "yaw", 20)
    bench.picture("edit_face.png", node, margin=8)  # web/docs/FaceRig_EditFace.jpg
    bench.set(node, "yaw", 0)
    assert again["all"] == still["all"]


def test_a_drag_turns_the_head_in_one_step_of_undo(bench, node):
    steps = "() => app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    bench.page.wait_for_timeout(600)
    still, before, mouse = shown(bench, node), bench.js(steps), bench.page.mouse
    x, y, width = middle(bench, node)
    mouse.move(x, y)
    mouse.down()
    for i in range(1, 9):
        mouse.move(x + 5 * i, y - 2 * i)
    mouse.up()
    bench.settle()
    yaw, pitch, roll = values(bench, node, "yaw", "pitch", "roll")
    assert abs(yaw - 130 * 40 / width) <= 0.5 and abs(pitch - 130 * 16 / width) <= 0.5 and roll == 0
    assert bench.js(steps) == before + 1
    assert shown(bench, node)["middle"] > still["middle"] + 0.02
    bench.undo()
    wait(bench, node, "panel.shown?.own")
    assert values(bench, node, "yaw", "pitch") == [0, 0]
    assert shown(bench, node)["all"] == still["all"]


def test_shift_tilts_alt_moves_the_eyes_and_a_double_click_ends_it(bench, node):
    mouse, keys = bench.page.mouse, bench.page.keyboard
    x, y, width = middle(bench, node)
    keys.down("Shift")
    mouse.move(x + 0.3 * width, y)
    mouse.down()
    mouse.move(x + 0.26 * width, y - 0.15 * width, steps=4)
    mouse.up()
    keys.up("Shift")
    assert abs(bench.value(node, "roll") - 30) < 1.5 and bench.value(node, "yaw") == 0
    keys.down("Alt")
    mouse.move(x, y)
    mouse.down()
    mouse.move(x + 0.1 * width, y + 0.05 * width, steps=4)
    mouse.up()
    keys.up("Alt")
    gaze = values(bench, node, "gaze_x", "gaze_y")
    assert abs(gaze[0] - 13) < 1 and abs(gaze[1] + 6.5) < 1
    mouse.dblclick(x, y)
    assert values(bench, node, "roll", "gaze_x", "gaze_y", "yaw") == [0, 0, 0, 0]


def test_keys_and_presets(bench, node):
    bench.js("id => bench.node(id).faceRigHead.canvas.focus()", node)
    for key in ("ArrowRight", "ArrowRight", "ArrowUp", "PageUp", "Shift+ArrowLeft"):
        bench.page.keyboard.press(key)
    assert values(bench, node, "yaw", "pitch", "roll") == [4.5, 2.5, 2.5]
    assert bench.js("id => bench.node(id).faceRigHead.canvas.getAttribute('aria-valuenow')", node) == "4.5"
    bench.page.get_by_role("button", name="surprised").click()
    assert values(bench, node, "raise_brows", "wide_eyes", "jaw", "yaw") == [1, 0.8, 11, 4.5]
    bench.page.get_by_role("button", name="photo", exact=True).click()
    assert values(bench, node, "raise_brows", "wide_eyes", "jaw", "yaw") == [0, 0, 0, 4.5]
    bench.page.keyboard.press("Tab")
    bench.page.get_by_label("All sliders to 0").click()
    assert values(bench, node, "yaw", "pitch", "roll") == [0, 0, 0]


def test_values_and_size_survive_saving_and_the_panel_is_no_value(bench, node):
    bench.set(node, "yaw", 20)
    bench.set(node, "sneer", 0.5)
    saved = bench.save()
    kept = next(n for n in saved["nodes"] if n["id"] == node)["widgets_values"]
    assert kept[:1] == [20] and kept[15] == 0.5 and len([v for v in kept if v is not None]) == 16
    prompt = bench.prompt()[str(node)]["inputs"]
    assert prompt["yaw"] == 20 and "head" not in prompt
    bench.load(saved)
    assert values(bench, node, "yaw", "sneer") == [20, 0.5]
    bench.show(node)
    wait(bench, node, "panel.shown")
    assert shown(bench, node)["cover"] > 0.3


def test_it_is_drawn_only_when_something_changed(bench, node):
    count = """async ([id, yaws]) => {
        const panel = bench.node(id).faceRigHead, paint = panel.paint
        let n = 0
        panel.paint = function () { n++; return paint.call(panel) }
        const frame = () => new Promise(requestAnimationFrame)
        for (const yaw of yaws) {
            app.canvas.setDirty(true, true)
            bench.widget(id, "yaw").value = yaw
            await frame(); await frame()
        }
        delete panel.paint
        return n
    }"""
    shown(bench, node)
    assert bench.js(count, node, [0, 0, 0, 0]) == 0
    assert 2 <= bench.js(count, node, [0, 5, 5, 10, 10]) <= 3


def test_a_finger_turns_it_too(bench, node):
    x, y, width = middle(bench, node)
    touch = bench.page.context.new_cdp_session(bench.page)
    for kind, dx in (("touchStart", 0), ("touchMove", -10), ("touchMove", -30), ("touchEnd", None)):
        points = [] if dx is None else [{"x": x + dx, "y": y}]
        touch.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    bench.settle()
    assert abs(bench.value(node, "yaw") + 130 * 30 / width) <= 0.5


def test_a_smaller_node_of_an_older_graph_grows(bench, node):
    saved = bench.save()
    for n in saved["nodes"]:
        if n["id"] == node:
            n["size"] = [280, 450]
    bench.load(saved)
    assert bench.js("id => bench.node(id).size[1]", node) > 650


def test_nodes_2_show_the_panel(bench, node):
    bench.setting("Comfy.VueNodes.Enabled", True)
    try:
        bench.show(node, 0.8)
        bench.page.wait_for_function(f"bench.node({node}).faceRigHead.root.clientHeight > 200")
        assert shown(bench, node)["cover"] > 0.3
        x, y, _ = middle(bench, node)
        bench.page.mouse.move(x, y)
        bench.page.mouse.down()
        bench.page.mouse.move(x + 30, y, steps=4)
        bench.page.mouse.up()
        turned = bench.value(node, "yaw")
        assert turned > 8
        bench.picture("edit_face_nodes_2.png")
        bench.undo()  # makes the node anew: its panel takes the place of the old one
        wait(bench, node, "panel.shown && panel.root.clientHeight > 200")
        assert bench.value(node, "yaw") == 0 and bench.page.locator(".face-rig-panel").count() == 1
    finally:
        bench.setting("Comfy.VueNodes.Enabled", False)


def test_themes_sizes_and_no_complaints(bench, node):
    bench.js("id => bench.node(id).faceRigHead.express({ smile: 0.8 })", node)
    bench.set(node, "yaw", 15)
    for theme in ("light", "dark"):
        bench.setting("Comfy.ColorPalette", theme)
        bench.picture(f"edit_face_{theme}.png", node)
    bench.js("id => bench.node(id).setSize([460, 1000])", node)
    bench.show(node, 0.8)
    bench.settle(5)
    assert shown(bench, node)["side"] > 300
    bench.picture("edit_face_large.png", node, scale=0.8)
    assert not bench.complaints()


def test_another_language(bench, node):
    try:
        for language, (expression, name) in {
            "zh": ("大笑", "头部转动"),
            "ko": ("웃음", "머리 돌리기"),
        }.items():
            bench.setting("Comfy.Locale", language)
            bench.page.get_by_role("button", name=expression, exact=True).wait_for()
            label = bench.js("id => bench.node(id).faceRigHead.canvas.ariaLabel", node)
            assert label == name
            bench.picture(f"edit_face_{language}.png", node)
        bench.show(node, 0.6)
        bench.page.get_by_role("button", name=expression, exact=True).click()
        assert bench.value(node, "jaw") == 12
    finally:
        bench.setting("Comfy.Locale", "en")
        bench.page.get_by_role("button", name="laugh", exact=True).wait_for()


def test_a_very_small_node(bench, node):
    size = bench.js("id => bench.node(id).size.slice()", node)
    bench.js("id => { bench.node(id).setSize([100, 50]); app.canvas.setDirty(true, true) }", node)
    bench.settle(10)
    bench.picture("edit_face_small.png", node)
    assert bench.js("id => bench.node(id).faceRigHead.canvas.clientWidth", node) >= 64
    bench.js("([id, w, h]) => bench.node(id).setSize([w, h])", node, *size)


def test_the_first_of_several_faces_shows(bench, node):
    photos = [
        Image.open(bench.base / "input" / f"{n}.jpg").convert("RGB") for n in ("astronaut", "grace_hopper")
    ]
    photos = [p.resize((p.width * 400 // p.height, 400)) for p in photos]
    group = Image.new("RGB", (sum(p.width for p in photos), 400))
    group.paste(photos[0], (0, 0)), group.paste(photos[1], (photos[0].width, 0))
    group.save(bench.base / "input" / "group.jpg")
    bench.load(graphs.edit_face("group.jpg", faces="all", order="left to right"))
    edit = bench.node("FaceRig_EditFace")
    bench.show(edit)
    outputs = bench.run()
    assert len(outputs[str(bench.node("PreviewImage"))]["images"]) == 2
    assert len(outputs[str(edit)]["face_rig_head"]) == 1
    wait(bench, edit, "panel.shown?.own")
    assert 0.3 < shown(bench, edit)["cover"] < 0.9
    bench.picture("edit_face_group.png", edit)
    assert not bench.complaints()


def test_two_workflows_keep_their_own_faces(bench, node):
    bench.load(graphs.edit_face())
    first = bench.node("FaceRig_EditFace")
    bench.set(first, "yaw", 10)
    bench.run()
    wait(bench, first, "panel.shown?.own")
    bench.load(graphs.edit_face("grace_hopper.jpg"))  # in a tab of its own
    second = bench.node("FaceRig_EditFace")
    wait(bench, second, "panel.shown")
    assert bench.value(second, "yaw") == 0 and hint(bench, second) == "Run once to see the face"
    bench.page.locator(".workflow-tabs .p-togglebutton").nth(-2).click()
    wait(bench, first, "panel.shown?.own")
    assert bench.value(first, "yaw") == 10 and bench.page.locator(".face-rig-panel").count() == 1
