"""Lights and faces through files, Transfer and its kin, and exchanged buffers, inside the real ComfyUI."""

from __future__ import annotations

import json

import torch

from tests.host_comfy import *  # noqa: F403 the fixture host
from tests.host_comfy import SIZE, marks

pytestmark = marks


def node(kind: str, **inputs) -> dict:
    return {"class_type": kind, "inputs": inputs}


def graph(text: str) -> dict:
    """A face from text is turned to the camera in three frames, lit by a light from a file, and saved."""
    model, face, light, new = ["1", 0], ["2", 0], ["5", 0], ["8", 0]
    parts = dict.fromkeys(("light", "expression", "jaw", "shape", "albedo", "camera"), False)
    return {
        "1": node("FaceRig_LoadFaceModel", file="default (in the pack)"),
        "2": node("FaceRig_LoadFace", file="(none: from text)", text=text, face_model=model),
        "3": node(
            "FaceRig_LightPresets",
            preset="golden hour",
            intensity=1.0,
            mirror=True,
            face_model=model,
            face_code=face,
        ),
        "4": node("FaceRig_SaveLight", light=["3", 0], filename_prefix="face_rig/evening"),
        "5": node("FaceRig_LoadLight", file="(none: from text)", text=["4", 0]),
        "6": node("FaceRig_NeutralFace", face_model=model, face_code=face, frontal=True, straight_gaze=True),
        "7": node("FaceRig_InterpolateFaces", face_a=face, face_b=["6", 0], frames=3, easing="linear"),
        "8": node(
            "FaceRig_Transfer",
            face_model=model,
            target=face,
            source=["7", 0],
            pose=True,
            strength=1.0,
            **parts,
        ),
        "9": node("FaceRig_RenderBuffers", face_model=model, face_code=new, size=0),
        "10": node(
            "FaceRig_BuffersFromImages", recompute=True, buffers=["9", 0], albedo=["9", 3], light=light
        ),
        "11": node("SaveImage", images=["10", 1], filename_prefix="lit"),
        "12": node("FaceRig_SaveFace", face_code=new, filename_prefix="face_rig/turned"),
        "13": node("EmptyImage", width=128, height=64, batch_size=1, color=0x808080),
        "14": node(
            "FaceRig_LightFromEnvironmentMap",
            panorama=["13", 0],
            encoding="sRGB",
            view="from the sitter",
            yaw=0.0,
            pitch=0.0,
            exposure=0.0,
        ),
        "15": node("FaceRig_SaveLight", light=["14", 0], filename_prefix="face_rig/grey"),
    }


def test_a_graph_of_files_and_edits_runs_through_the_api(host):
    head = host.node("LoadFaceModel", file="default (in the pack)")[0].head
    code = head.mean_code(1, (SIZE, SIZE))
    code = code.replace(pose=code.pose + 0.1)
    prompt = graph(host.core.readable.face_json(code))
    ok, messages, outputs = host.run(prompt)
    assert ok, messages[-1]
    folder = host.base / "output" / "face_rig"
    saved = (folder / "evening_00001_.json").read_text()
    assert outputs["4"]["text"][0].endswith(saved) and len(outputs["11"]["images"]) == 3
    light = host.core.readable.read_light(saved)
    assert host.core.sh.direction(light, head.light_mean)[0, 0] < -0.4  # mirrored: from the left
    grey = host.core.readable.read_light((folder / "grey_00001_.json").read_text())
    up = torch.tensor([0.0, 1.0, 0.0]).view(1, 3, 1, 1)
    linear = ((128 / 255 + 0.055) / 1.055) ** 2.4  # sRGB
    assert abs(float(host.core.sh.shade(up, grey).mean()) - linear ** (1 / 2.2)) < 1e-3
    faces = host.core.readable.read_face((folder / "turned_00001_.json").read_text(), head)
    assert (
        len(faces) == 3
        and faces.pose[2, :3].abs().max() < 1e-6
        and (faces.pose[:, 3:] - 0.1).abs().max() < 1e-6
    )
    entry = host.nodes.NODE_CLASS_MAPPINGS["FaceRig_LoadLight"].GET_NODE_INFO_V1()["input"]["required"]
    kind, about = entry["file"]
    offered = about["options"] if kind == "COMBO" else kind
    assert {"evening_00001_.json [output]", "turned_00001_.json [output]"} <= set(offered)


def test_errors_name_the_node_and_the_field(host):
    head = host.node("LoadFaceModel", file="default (in the pack)")[0].head
    text = host.core.readable.face_json(head.mean_code(1, (SIZE, SIZE)))
    prompt = graph(text.replace('"open"', '"flame"'))
    ok, messages, _ = host.run(prompt)
    assert not ok and messages[-1][1]["node_type"] == "FaceRig_LoadFace"
    assert "'text': 'head' is 'flame', expected 'open'" in messages[-1][1]["exception_message"]
    prompt["4"]["inputs"]["filename_prefix"] = "../evening"
    _, _, _, errors = host.loop.run_until_complete(host.execution.validate_prompt("test", prompt, None))
    assert "'filename_prefix' is '../evening'" in json.dumps(errors["4"])
    assert not (host.base / "evening_00001_.json").exists()
