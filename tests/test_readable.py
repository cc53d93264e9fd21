"""Lights and faces as JSON: exact both ways, and what is wrong is named."""

from __future__ import annotations

import json
import tracemalloc

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rig_core import checkpoints, readable
from rig_core.face import FaceCode

FLOATS = st.floats(-1e6, 1e6, width=32)


@pytest.fixture(scope="module")
def head():
    return checkpoints.load_head()


@pytest.fixture
def code(head):
    generator = torch.Generator().manual_seed(0)
    mean = head.mean_code(2, (96, 128))
    noise = {
        n: v + torch.randn(v.shape, generator=generator) / 7
        for n, v in vars(mean).items()
        if n in ("shape", "tex", "exp", "pose", "light")
    }
    return mean.replace(**noise, crop=mean.crop * torch.tensor([[1.1], [0.7], [1.0]]))


def same(a: FaceCode, b: FaceCode) -> bool:
    return all(
        torch.equal(v, getattr(b, n)) if isinstance(v, torch.Tensor) else v == getattr(b, n)
        for n, v in vars(a).items()
    )


def edited(text: str, *path, to=None, drop=False) -> str:
    """The JSON with the entry at path set, or left out."""
    data = at = json.loads(text)
    for key in path[:-1]:
        at = at[key]
    if drop:
        del at[path[-1]]
    else:
        at[path[-1]] = to
    return json.dumps(data)


@settings(max_examples=60, deadline=None)
@given(st.lists(FLOATS, min_size=27, max_size=27))
def test_any_light_comes_back_exactly(values):
    light = torch.tensor(values, dtype=torch.float32).reshape(1, 9, 3)
    assert torch.equal(readable.read_light(readable.light_json(light)), light)


def test_a_light_reads_well():
    light = torch.zeros(2, 9, 3)
    light[0, 0], light[0, 4, 1], light[1, 8, 2] = 3.65, 0.1, -1 / 3
    data = json.loads(readable.light_json(light))
    assert data["format"] == "face-rig light" and data["version"] == 1
    assert "red, green, blue" in data["convention"] and "display space" in data["convention"]
    assert list(data["lights"][0]) == ["1", "x", "y", "z", "xy", "xz", "yz", "x2-y2", "3z2-1"]
    assert data["lights"][0]["1"] == [3.65] * 3  # no digits that a float32 does not have
    assert data["lights"][0]["xy"] == [0.0, 0.1, 0.0]
    assert abs(data["lights"][1]["3z2-1"][2] + 1 / 3) < 1e-8


def test_faces_come_back_exactly(head, code):
    text = readable.face_json(code)
    assert same(readable.read_face(text, head), code) and same(readable.read_face(text), code)
    data = json.loads(text)
    assert data["head"] == "open" and data["size"] == {"height": 96, "width": 128}
    assert list(data["faces"][1]) == ["shape", "tex", "exp", "pose", "cam", "light", "crop"]
    assert max(map(len, text.splitlines())) < 1200 and len(text.splitlines()) < 70


def test_a_note_and_a_byte_order_do_not_matter(code):
    text = readable.face_json(code)
    shuffled = json.dumps({"note": "window, left"} | dict(reversed(json.loads(text).items())))
    assert same(readable.read_face(shuffled), code)


@pytest.mark.parametrize(
    "path,to,said",
    [
        (("lights", 1, "y"), [1, 2], r"'lights' 2, 'y' must be 3 numbers, found 2"),
        (("lights", 0, "1"), 3.6, r"'lights' 1, '1' must be 3 numbers, found 3.6"),
        (("lights", 0, "xz"), [0, "a", 0], r"'xz', number 2 must be within 1000000 of 0, found \"a\""),
        (("lights", 0, "xz"), [0, 0, 1e7], r"'xz', number 3 must be within 1000000 of 0, found 10000000.0"),
        (("lights", 0, "xz"), [True, 0, 0], r"'xz', number 1 .* found true"),
        (("lights", 0, "xz"), [0, 10**400, 0], r"'xz', number 2 must be within"),
        (("lights", 0, "xz"), [0, float("nan"), 0], r"NaN, which is no number"),
        (("lights", 0, "xz"), [0, float("-inf"), 0], r"-Infinity, which is no number"),
        (("lights",), [], r"'lights' must be a list with at least one entry, found \[\]"),
        (("lights",), {"1": []}, r"'lights' must be a list"),
        (("lights", 0), [1, 2, 3], r"'lights' 1 must be an object"),
        (("format",), "face-rig face", r"'format' must be \"face-rig light\".*use Load Face"),
        (("format",), ["x"], r"'format' must be"),
        (("version",), 2, r"'version' is 2, this Face Rig reads 1"),
    ],
)
def test_a_wrong_light_is_named(path, to, said):
    text = edited(readable.light_json(torch.ones(2, 9, 3)), *path, to=to)
    with pytest.raises(ValueError, match=said):
        readable.read_light(text)


@pytest.mark.parametrize(
    "path,to,said",
    [
        (("head",), "flam", r"'head' must be flame or open, found \"flam\""),
        (("head",), "flame", r"'head' is 'flame', expected 'open'"),
        (("size",), [96, 128], r"'size' must be an object"),
        (("size", "width"), 0, r"'size', 'width' must be a whole number of pixels, found 0"),
        (("size", "height"), 96.5, r"'size', 'height' must be a whole number"),
        (("size", "height"), True, r"'size', 'height' must be a whole number"),
        (("faces", 1, "shape"), [0.0] * 3, r"'faces' 2, 'shape' must be 57 numbers, found 3"),
        (("faces", 0, "pose"), None, r"'faces' 1, 'pose' must be 8 numbers, found null"),
        (("faces", 0, "cam"), [0, 0, 0], r"'faces' 1, 'cam' must begin with a scale above 0"),
        (("faces", 1, "light", "z"), [1], r"'faces' 2, 'light', 'z' must be 3 numbers, found 1"),
        (("faces", 0, "crop"), [[1, 0, 0]], r"'faces' 1, 'crop' must be 3 rows of 3 numbers"),
        (("faces", 0, "crop", 1), [0, 1], r"'faces' 1, 'crop', row 2 must be 3 numbers, found 2"),
        (("faces", 0, "crop", 2), [0, 0, 2], r"'crop', row 3 must be 0, 0, 1"),
        (("faces", 0, "crop", 1), [1.75 * 1.1, 0, 3], r"'crop' must not flatten the picture"),
    ],
)
def test_a_wrong_face_is_named(head, code, path, to, said):
    with pytest.raises(ValueError, match=said):
        readable.read_face(edited(readable.face_json(code), *path, to=to), head)


def test_without_a_head_the_faces_still_have_to_agree(code):
    text = readable.face_json(code)
    with pytest.raises(ValueError, match="'faces' 2, 'shape' must be 57 numbers, found 3"):
        readable.read_face(edited(text, "faces", 1, "shape", to=[0.0] * 3))
    with pytest.raises(ValueError, match="'faces' 1, 'pose' must be at least 6 numbers, found 2"):
        readable.read_face(edited(text, "faces", 0, "pose", to=[0.0] * 2))
    with pytest.raises(ValueError, match="'faces' 2 has no 'exp'"):
        readable.read_face(edited(text, "faces", 1, "exp", drop=True))
    with pytest.raises(ValueError, match="the file has no 'head'"):
        readable.read_face(edited(text, "head", drop=True))


@pytest.mark.parametrize("text", ["", "no json", "[1, 2", "[" * 100_000, "\x00", '{"format": 1', "9" * 5000])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(ValueError, match="no JSON of a light|'format' must be"):
        readable.read_light(text)


def test_what_could_not_be_read_is_not_written(code):
    with pytest.raises(ValueError, match="NaN"):
        readable.light_json(torch.full((1, 9, 3), float("nan")))
    with pytest.raises(ValueError, match="'light' holds NaN or a number beyond 1000000"):
        readable.light_json(torch.full((1, 9, 3), 2e6))
    with pytest.raises(ValueError, match="'exp' holds NaN"):
        readable.face_json(code.replace(exp=code.exp / 0))


def test_a_huge_value_is_shown_by_its_beginning_only():
    for value in ([[]] * 300_000, {"a": [1.5] * 300_000}, "x" * 300_000):
        tracemalloc.start()
        said = readable._shown(value)
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert said == json.dumps(value)[:37] + "..." and most < 700_000
    assert readable._shown([0, 0, 2]) == "[0, 0, 2]" and readable._shown(None) == "null"
