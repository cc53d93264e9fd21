"""What nodes show when they have run, in ComfyUI's real page: their pictures and their text."""

from __future__ import annotations

import pytest

from tests import graphs
from tests.browser import needs_browser, open_host, tiny_model

pytestmark = needs_browser


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    with open_host(
        tmp_path_factory.mktemp("browser"), "--preview-method", "latent2rgb", width=1600, height=1200
    ) as bench:
        tiny_model(bench.base)
        graph = graphs.relight()
        named = {n["class_type"]: k for k, n in graph.items()}
        judge = {"class_type": "FaceRig_LoadShadowEstimator", "inputs": {}}
        asked = {"shadow_estimator": ["90", 0], "image": [named["FaceRig_AlignFace"], 0]}
        light = {"light": [named["FaceRig_SHLightEdit"], 1]}
        graph |= {
            "90": judge,
            "91": {"class_type": "FaceRig_ShadowScalar", "inputs": asked},
            "92": {"class_type": "FaceRig_SaveLight", "inputs": light},
            "93": {"class_type": "PreviewAny", "inputs": {"source": ["91", 0]}},
        }
        assert not bench.load(graph)
        bench.run(240)
        yield bench
        assert not bench.complaints()


@pytest.mark.parametrize("kind, wide", [("FaceRig_RenderBuffers", 4), ("FaceRig_ConditionedSample", 1)])
def test_a_node_shows_its_result_and_not_the_last_preview(bench, kind, wide):
    node = bench.node(kind)
    bench.show(node)
    bench.page.wait_for_function(
        "id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth", arg=node, timeout=10_000
    )
    shown, preview = bench.js(
        "id => [app.graph.getNodeById(id).imgs.map(i => [i.naturalWidth, i.src]), app.nodePreviewImages[id]]",
        node,
    )
    assert preview is None and [w for w, _ in shown] == [64 * wide]
    assert "type=temp" in shown[0][1]


def test_text_stands_in_the_node_and_not_in_the_graph(bench):
    field = "app.graph.getNodeById(id).widgets.find(w => w.name === 'face_rig_text').element"
    said = [
        bench.js(f"id => {field}.textContent", bench.node(f"FaceRig_{kind}"))
        for kind in ("ShadowScalar", "SaveLight")
    ]
    assert -20 < float(said[0]) < 20
    assert '"format": "face-rig light"' in said[1]
    for node in bench.save()["nodes"]:
        assert not any("face-rig light" in str(v) for v in node.get("widgets_values") or []), node["type"]
    bench.show(bench.node("FaceRig_SaveLight"))
    bench.picture("text.png", bench.node("FaceRig_SaveLight"))
