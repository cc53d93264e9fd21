"""The light ball in ComfyUI's real page: drag, undo, presets, the head after a run, themes."""

from __future__ import annotations

import base64
import io
import math

import numpy as np
import pytest
import torch
from PIL import Image

from rig_core import light_prior, sh
from tests import graphs
from tests.browser import needs_browser, open_host, tiny_model

pytestmark = needs_browser
EDGE = 1.45  # half the canvas in radii of the ball


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with open_host(tmp_path_factory.mktemp("browser"), touch=True) as bench:
        tiny_model(bench.base)
        yield bench


@pytest.fixture
def ball(bench):
    """The graph freshly loaded, SH Light Edit in the middle of the page."""
    assert not bench.load(graphs.relight())
    ball = Ball(bench, bench.node("FaceRig_SHLightEdit"))
    yield ball
    assert not bench.complaints()


class Ball:
    """Hands for the light ball of a node."""

    def __init__(self, bench, node: int):
        self.bench, self.node, self.mouse = bench, node, bench.page.mouse
        bench.show(node)

    def panel(self, expression: str):
        """Evaluate over `panel`, the node's LightBall."""
        return self.bench.js(
            f"id => {{ const panel = bench.node(id).faceRigBall; return {expression} }}", self.node
        )

    def at(self, x: float, y: float) -> tuple[float, float]:
        """A place in the page of a point in radii from the ball's centre, y up."""
        box = self.panel(
            "(({x, y, width, height}) => [x, y, width, height])(panel.canvas.getBoundingClientRect())"
        )
        return box[0] + box[2] / 2 * (1 + x / EDGE), box[1] + box[3] / 2 * (1 - y / EDGE)

    def drag(self, *points, steps: int = 4):
        self.mouse.move(*self.at(*points[0]))
        self.mouse.down()
        for p in points[1:]:
            self.mouse.move(*self.at(*p), steps=steps)
        self.mouse.up()
        self.bench.settle()

    def press(self, *keys: str):
        for key in keys:
            self.bench.page.keyboard.press(key)
        self.bench.page.wait_for_timeout(250)

    def values(self, *names: str) -> list:
        return [self.bench.value(self.node, n) for n in names]

    def angles(self) -> list:
        return self.values("azimuth", "elevation")


def angles_of(x: float, y: float) -> tuple[int, int]:
    """Azimuth and elevation of a point on the ball, whole degrees."""
    z = math.sqrt(1 - x * x - y * y)
    return round(math.degrees(math.atan2(x, z))), round(math.degrees(math.asin(y)))


def test_a_drag_aims_and_is_one_step_for_undo(bench, ball):
    steps = "app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    assert ball.angles() == [50, 20]
    before = bench.js(steps)
    ball.drag((0, 0), (0.3, 0.3), (-0.5, 0.6))
    assert ball.angles() == pytest.approx(angles_of(-0.5, 0.6), abs=1)
    first = ball.angles()
    ball.drag((-0.5, 0.6), (0.7, -0.2))
    assert ball.angles() == pytest.approx(angles_of(0.7, -0.2), abs=1)
    assert bench.js(steps) == before + 2
    bench.undo()
    assert ball.angles() == first
    bench.undo()
    assert ball.angles() == [50, 20]
    bench.undo("Control+y")
    assert ball.angles() == first
    # beyond the rim is behind: the direction goes on over the edge of the ball
    ball.drag((0.9, 0), (1.19, 0))
    azimuth, elevation = ball.angles()
    assert azimuth == pytest.approx(150, abs=2) and abs(elevation) <= 1
    bench.picture("light_ball_behind.png", ball.node)


def test_wheel_shift_and_keys(bench, ball):
    scale = bench.js("app.canvas.ds.scale")
    bench.page.wait_for_timeout(350)
    ball.mouse.move(*ball.at(0.2, 0.1))
    ball.mouse.wheel(0, -300)
    bench.settle()
    assert ball.values("intensity") == [1.15] and bench.js("app.canvas.ds.scale") == scale
    bench.page.wait_for_timeout(600)
    bench.undo()
    assert ball.values("intensity") == [1.0]
    ball.mouse.move(*ball.at(-1.42, 1.42))  # the panel beside the ball
    ball.mouse.wheel(0, -100)
    bench.settle()
    assert ball.values("intensity") == [1.0] and bench.js("app.canvas.ds.scale") > scale
    bench.show(ball.node)
    bench.js(  # a zoom that began elsewhere goes on over the ball
        """([id, [x, y]]) => {
            const wheel = () => new WheelEvent("wheel", {
                clientX: x, clientY: y, deltaY: -100, bubbles: true, cancelable: true })
            app.canvas.canvas.dispatchEvent(wheel())
            bench.node(id).faceRigBall.canvas.dispatchEvent(wheel())
        }""",
        ball.node, list(ball.at(0.2, 0.1)),
    )  # fmt: skip
    zoomed = bench.js("app.canvas.ds.scale")
    assert ball.values("intensity") == [1.0] and zoomed > 1.15
    bench.show(ball.node)

    bench.page.keyboard.down("Shift")
    ball.drag((0, 0), (0.5, 0.5))
    bench.page.keyboard.up("Shift")
    assert ball.values("softness") == [0.6] and ball.angles() == [50, 20]

    ball.panel("panel.canvas.focus()")
    ball.press("ArrowRight", "ArrowUp", "Shift+ArrowUp", "+", "+", "-")
    assert ball.angles() == [55, 26] and ball.values("intensity") == [1.05]
    assert bench.js("document.activeElement.ariaValueText") == "55 degrees right, 26 degrees above"
    ball.press(*["ArrowRight"] * 26)
    assert ball.angles() == [-175, 26]
    bench.page.wait_for_timeout(500)
    bench.undo()
    assert ball.angles() in ([180, 26], [-180, 26], [175, 26])  # a press or two, as quick as the page is
    bench.settle(10)
    ball.press("ArrowDown")  # the ball that undo made anew has the keyboard
    assert ball.values("elevation") == [21]


def test_touch_aims(bench, ball):
    page = bench.page.context.new_cdp_session(bench.page)
    for kind, point in (("touchStart", (0, 0)), ("touchMove", (0.2, 0.2)), ("touchMove", (0.4, -0.3))):
        x, y = ball.at(*point)
        page.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": [{"x": x, "y": y}]})
    page.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    bench.settle()
    assert ball.angles() == pytest.approx(angles_of(0.4, -0.3), abs=1)


def test_presets_colours_and_ambient(bench, ball):
    panel = bench.page.locator(".face-rig-panel")
    panel.locator("select").select_option("golden hour")
    bench.settle()
    wanted = light_prior.PRESETS["golden hour"]
    lamp = ["azimuth", "elevation", "softness", "intensity", "ambient"]
    assert ball.values(*lamp, "red", "green", "blue") == [*wanted[:5], *wanted.colour]
    bench.picture("light_ball_golden_hour.png", ball.node)
    bench.undo()
    assert ball.values(*lamp, "blue") == [50, 20, 0.1, 1, 0.25, 1]
    panel.locator("button[title='Colour: candle']").click()
    assert ball.values("red", "green", "blue") == [1, 0.6, 0.28]
    panel.locator("input[type=color]").fill("#ff8000")
    bench.settle()
    assert ball.values("red", "green", "blue") == pytest.approx([1, (128 / 255) ** 2.2, 0], abs=0.006)
    panel.locator("input[type=range]").fill("0.6")
    assert ball.values("ambient") == [0.6]
    bench.undo()  # from within the slider
    assert ball.values("ambient") == [0.25]
    # typed values show too: the name of the light that they are
    for name, value in zip(lamp, wanted):
        bench.set(ball.node, name, value)
    for name, value in zip(("red", "green", "blue"), wanted.colour):
        bench.set(ball.node, name, value)
    bench.settle()
    assert panel.locator("select").input_value() == "golden hour"


def python_light(about: dict, lamp: dict, mix: float, mode: str):
    light, mean, std = (torch.tensor(about[k]).reshape(9, 3) for k in ("light", "mean", "std"))
    new = light_prior.edit(light[None], **lamp, mean=mean, std=std, raw=mode == "raw")
    return sh.interpolate(light[None], new, torch.tensor([mix]))


def pixels(ball: Ball, picture: str) -> np.ndarray:
    """[size,size,4] of what the panel last shaded."""
    got = ball.panel(
        f"(c => [c.width, ...c.getContext('2d').getImageData(0, 0, c.width, c.width).data])({picture}.canvas)"
    )
    return np.array(got[1:], float).reshape(got[0], got[0], 4)


def test_the_head_of_the_photo_after_a_run_shows_pythons_light(bench, ball):
    outputs = bench.run()
    about = outputs[str(ball.node)]["face_rig_light"][0]
    saved = [i["filename"] for i in outputs[str(bench.node("SaveImage"))]["images"]]
    bench.page.wait_for_function("id => bench.node(id).faceRigBall.picture", arg=ball.node)
    bench.show(ball.node)
    bench.picture("light_ball_head.png", ball.node, scale=1.25)
    bench.show(ball.node)

    sheet = np.asarray(Image.open(io.BytesIO(base64.b64decode(about["sheet"].split(",")[1]))), float) / 255
    normal, albedo, cover = (torch.from_numpy(x).permute(2, 0, 1)[None] for x in np.split(sheet, 3))
    normal = torch.nn.functional.normalize(normal * 2 - 1, dim=1)
    whole = (cover[0, 0] > 0.99).numpy()
    assert whole.mean() > 0.3

    def compare(mix=1.0, mode="model range"):
        names = ("azimuth", "elevation", "intensity", "ambient", "softness")
        lamp = dict(zip(names, ball.values(*names))) | {"colour": ball.values("red", "green", "blue")}
        light = python_light(about, lamp, mix, mode).double()
        want = (albedo * sh.shade(normal, light)).clamp(0, 1)[0].permute(1, 2, 0).numpy() * 255
        got = pixels(ball, "panel.picture")
        assert np.abs(got[whole][:, :3] - want[whole]).max() <= 1.01
        return got

    first = compare()
    ball.drag((0, 0), (-0.8, 0.2))
    second = compare()
    left, right = slice(0, 64), slice(64, 128)
    brightness = [p[:, s, :3].sum() / p[:, s, 3].sum() for p in (first, second) for s in (left, right)]
    assert brightness[0] < brightness[1] and brightness[2] > brightness[3]  # the lamp went to the left
    bench.set(ball.node, "mix", 0.3)
    bench.settle()
    compare(mix=0.3)
    bench.set(ball.node, "mix", 1.0)
    bench.set(ball.node, "mode", "raw")
    bench.settle()
    compare(mode="raw")
    bench.set(ball.node, "mode", "model range")

    # what is seen before a run is what the node renders: its own picture of the ball
    bench.page.locator(".face-rig-view").click()
    bench.settle()
    outputs = bench.run()
    again = [i["filename"] for i in outputs[str(bench.node("SaveImage"))]["images"]]
    assert again != saved and (bench.base / "output" / "face_rig" / again[0]).is_file()
    name = outputs[str(ball.node)]["images"][0]["filename"]
    node_ball = np.asarray(Image.open(bench.base / "temp" / name).convert("RGB"), float)
    shown = pixels(ball, "panel.shown")
    shown = np.asarray(Image.fromarray(shown[..., :3].astype(np.uint8)).resize((128, 128), Image.BOX), float)
    y, x = np.mgrid[-1:1:128j, -1:1:128j]
    inside = x * x + y * y < 0.8
    assert np.abs(shown - node_ball)[inside].max() < 6 and node_ball[inside].std() > 15
    bench.page.locator(".face-rig-view").click()

    # undo makes the node anew: the head is still there
    ball.drag((0, 0), (0.3, 0.3))
    bench.undo()
    bench.page.wait_for_function("id => bench.node(id).faceRigBall.picture", arg=ball.node)
    seconds = ball.panel(
        "(() => { const t = performance.now(); for (let i = 0; i < 60; i++) "
        "{ bench.node(id).widgets[0].value = i; panel.paint() } return (performance.now() - t) / 60000 })()"
    )
    assert seconds < 1 / 60, seconds


def test_a_graph_is_the_same_with_and_without_the_ball(bench, ball):
    bench.load(bench.save())
    inputs = bench.prompt()[str(ball.node)]["inputs"]
    assert inputs["azimuth"] == 50 and "light_ball" not in inputs
    ball.drag((0, 0), (0.2, -0.4))
    graph = bench.save()
    values = next(n for n in graph["nodes"] if n["id"] == ball.node)["widgets_values"]
    assert values[:2] == ball.angles() and values[2:] == [1, 0.25, 0.1, 1, 1, 1, 1, "model range"]
    bench.load(graph)
    assert ball.angles() == values[:2]
    assert bench.save()["nodes"] == graph["nodes"]


def test_copies_collapsed_and_wired(bench, ball):
    bench.js(
        "id => { app.canvas.selectNode(bench.node(id)); app.canvas.copyToClipboard(); "
        "app.canvas.pasteFromClipboard() }",
        ball.node,
    )
    bench.settle()
    copy = Ball(bench, bench.node("FaceRig_SHLightEdit", 1))
    copy.drag((0, 0), (-0.3, 0.1))
    assert copy.angles() == pytest.approx(angles_of(-0.3, 0.1), abs=1) and ball.angles() == [50, 20]
    bench.js("id => bench.node(id).collapse()", copy.node)
    bench.settle()
    assert not copy.panel("panel.visible()")
    bench.js("id => bench.node(id).collapse()", copy.node)
    bench.settle(10)
    assert copy.panel("panel.visible()")
    bench.js("id => app.graph.remove(bench.node(id))", copy.node)
    bench.settle()

    ball = Ball(bench, ball.node)
    bench.js(
        """id => {
            const p = LiteGraph.createNode("PrimitiveFloat"), n = bench.node(id)
            app.graph.add(p)
            p.pos = [n.pos[0] - 300, n.pos[1]]
            p.connect(0, n, n.inputs.findIndex(i => i.name === "azimuth"))
        }""",
        ball.node,
    )
    bench.settle()
    ball.drag((0, 0), (0.5, 0.6))
    assert ball.angles() == [50, angles_of(0.5, 0.6)[1]]  # a wired angle stays
    bench.js(
        "id => { const n = bench.node(id); "
        "n.disconnectInput(n.inputs.findIndex(i => i.name === 'azimuth')) }",
        ball.node,
    )
    light = "n.inputs.findIndex(i => i.name === 'light')"
    source = bench.node("FaceRig_FitToLandmarks")
    bench.js(
        f"([id, from]) => {{ const n = bench.node(id); bench.node(from).connect(1, n, {light}) }}",
        ball.node,
        source,
    )
    bench.settle()
    ball.drag((0, 0), (-0.5, 0.1))
    assert ball.values("azimuth") == [50] and ball.panel("panel.canvas.ariaDisabled") == "true"


def test_the_orbit_plays_and_is_aimed(bench):
    bench.load(graphs.orbit())
    ball = Ball(bench, bench.node("FaceRig_LightOrbit"))
    start, arc, frames = ball.values("start", "arc", "frames")
    ball.drag((0, 0), (-0.6, 0.3))
    azimuth, elevation = angles_of(-0.6, 0.3)
    assert ball.values("start", "elevation") == pytest.approx([azimuth, elevation], abs=1)
    assert ball.values("arc", "frames") == [arc, frames]
    bench.picture("light_orbit.png", ball.node, scale=1.25)  # web/docs/FaceRig_LightOrbit.jpg
    bench.page.locator(".face-rig-play").click()
    bench.page.wait_for_function("id => bench.node(id).faceRigBall.frame >= 2", arg=ball.node)
    bench.page.locator(".face-rig-play").click()
    bench.page.wait_for_function(
        "document.querySelector('.face-rig-play').title === 'Play the orbit'", timeout=3000
    )
    box = bench.page.locator(".face-rig-scrub").bounding_box()
    ball.mouse.move(box["x"] + box["width"] - 1, box["y"] + box["height"] / 2)
    bench.settle()
    assert bench.page.locator(".face-rig-number").inner_text() == f"{frames} / {frames}"
    assert not bench.complaints()


def test_themes_sizes_and_nodes_2(bench, ball):
    width, height = bench.js("id => bench.node(id).size.slice()", ball.node)
    bench.js("id => { bench.node(id).setSize([420, 900]); app.canvas.setDirty(true, true) }", ball.node)
    bench.settle(10)
    assert ball.panel("panel.canvas.clientWidth") > 300
    bench.js("([id, w, h]) => bench.node(id).setSize([w, h])", ball.node, width, height)
    assert bench.js("LGraphCanvas.link_type_colors.SH_LIGHT") == "#f2c94c"
    for theme in ("light", "dark"):
        bench.setting("Comfy.ColorPalette", theme)
        bench.settle(10)
        bench.picture(f"light_ball_{theme}.png", ball.node)
        assert bench.js("LGraphCanvas.link_type_colors.SH_LIGHT") == "#f2c94c"
    bench.show(ball.node)
    bench.setting("Comfy.VueNodes.Enabled", True)
    try:
        bench.page.wait_for_function("id => bench.node(id).faceRigBall.root.isConnected", arg=ball.node)
        bench.settle(20)
        bench.picture("light_ball_nodes_2.png")
        ball.drag((0, 0), (-0.3, -0.2))
        assert ball.angles() == pytest.approx(angles_of(-0.3, -0.2), abs=1)
        bench.undo()  # makes the node anew: the panel of the new one is the one that shows
        assert ball.angles() == [50, 20]
        ball.drag((0, 0), (0.4, 0.1))
        assert ball.angles() == pytest.approx(angles_of(0.4, 0.1), abs=1)
        assert bench.page.locator(".face-rig-panel").count() == 1
    finally:
        bench.setting("Comfy.VueNodes.Enabled", False)
    bench.settle(10)
    assert ball.panel("panel.visible()")


def test_a_reload_of_the_page_keeps_the_light(bench, ball):
    ball.drag((0, 0), (0.1, 0.5))
    angles = ball.angles()
    bench.page.wait_for_timeout(1500)  # the page stores its draft
    bench.open()
    bench.page.wait_for_timeout(1000)
    assert Ball(bench, bench.node("FaceRig_SHLightEdit")).angles() == angles


def test_light_follows_the_language_of_the_page(bench, ball):
    texts = {
        "zh": ("伦勃朗光", "光的方向"),
        "ko": ("렘브란트", "빛의 방향"),
        "fr": ("rembrandt", "Direction of the light"),
    }
    panel = bench.page.locator(".face-rig-panel")
    try:
        for language, (preset, direction) in texts.items():
            bench.setting("Comfy.Locale", language)
            bench.page.get_by_text(preset, exact=True).wait_for(state="attached")
            assert panel.locator("canvas").get_attribute("aria-label") == direction
            bench.picture(f"light_ball_{language}.png", bench.node("FaceRig_SHLightEdit"))
    finally:
        bench.setting("Comfy.Locale", "en")
    panel.locator("select").select_option("rim")
    assert ball.angles() == [150, 30]


def test_nothing_goes_on_in_a_removed_node(bench):
    bench.load(graphs.orbit())
    ball = Ball(bench, bench.node("FaceRig_LightOrbit"))
    bench.page.locator(".face-rig-play").click()
    bench.page.wait_for_function("id => bench.node(id).faceRigBall.frame >= 2", arg=ball.node)
    frames = bench.js(
        """async id => {
            const panel = bench.node(id).faceRigBall, original = requestAnimationFrame
            app.graph.remove(panel.node)
            await new Promise(ok => setTimeout(ok, 100))
            let asked = 0
            panel.paint = panel.changed = () => asked++
            window.requestAnimationFrame = f => (String(f).includes("frame") && asked++, original(f))
            await new Promise(ok => setTimeout(ok, 400))
            window.requestAnimationFrame = original
            return [asked, panel.root.isConnected, panel.drag ?? null]
        }""",
        ball.node,
    )
    assert frames == [0, False, None]
    assert not bench.complaints()


def test_the_orbits_softness_has_names(bench):
    bench.load(graphs.orbit())
    ball = Ball(bench, bench.node("FaceRig_LightOrbit"))
    panel = bench.page.locator(".face-rig-panel")
    where = ball.values("start", "arc", "elevation", "frames")
    panel.locator("select").select_option("softbox")
    assert ball.values("softness", "intensity", "ambient") == [0.6, 1, 0.3]
    assert ball.values("start", "arc", "elevation", "frames") == where
    bench.set(ball.node, "softness", 0.5)
    bench.settle()
    assert panel.locator("select").input_value() == ""
    bench.undo()
    assert ball.values("softness") == [0.1]


def test_a_small_node_and_a_sharp_screen(bench, ball):
    size = bench.js("id => bench.node(id).size.slice()", ball.node)
    bench.js("id => { bench.node(id).setSize([120, 60]); app.canvas.setDirty(true, true) }", ball.node)
    bench.settle(10)
    bench.picture("light_ball_small.png", ball.node)
    inside = (
        "[panel.canvas, panel.row.root].every(e => e.getBoundingClientRect().right <= bench.rect(id).x + "
    )
    assert ball.panel(inside + "bench.rect(id).width)") and ball.panel("panel.canvas.clientWidth") == 64
    bench.js("([id, w, h]) => bench.node(id).setSize([w, h])", ball.node, *size)
    bench.show(ball.node)
    bench.settle(10)
    wide = ball.panel("[panel.canvas.clientWidth, panel.canvas.width]")
    assert wide[0] == wide[1] > 150
    page = bench.page.context.new_cdp_session(bench.page)
    screen = {"width": 1600, "height": 1000, "deviceScaleFactor": 2, "mobile": False}
    page.send("Emulation.setDeviceMetricsOverride", screen)
    bench.js("app.canvas.setDirty(true, true)")
    bench.settle(10)
    try:
        assert ball.panel("[panel.canvas.clientWidth, panel.canvas.width]") == [wide[0], 2 * wide[0]]
        ball.drag((0, 0), (0.3, 0.2))
        assert ball.angles() == pytest.approx(angles_of(0.3, 0.2), abs=1)
    finally:
        page.send("Emulation.clearDeviceMetricsOverride")
    bench.settle(10)
