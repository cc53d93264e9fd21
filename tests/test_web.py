"""The page's modules under node.js: its light is Python's, its words are in three languages."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from rig_core import checkpoints, light_prior, sh

ROOT = Path(__file__).resolve().parents[1]
JS = ROOT / "web" / "js"
NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="install node.js to test the page's modules without a page")


def javascript(expression: str, given=None):
    """The value of an expression over `m` (all exports of sh.js and presets.js) and `given`."""
    urls = [
        "data:text/javascript;base64," + base64.b64encode((JS / f).read_bytes()).decode()
        for f in ("sh.js", "presets.js")
    ]
    script = f"""
        import {{ readFileSync }} from "node:fs";
        const m = {{ ...await import("{urls[0]}"), ...await import("{urls[1]}") }};
        const given = JSON.parse(readFileSync(0, "utf8"));
        const plain = (k, v) => ArrayBuffer.isView(v) ? [...v] : v;
        console.log(JSON.stringify({expression}, plain));
    """
    command = [NODE, "--input-type=module", "-e", script]
    run = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def lamps(n: int, seed: int = 0) -> list[dict]:
    g = np.random.default_rng(seed)
    found = []
    for _ in range(n):
        lamp = {"azimuth": g.uniform(-180, 180), "elevation": g.uniform(-90, 90)}
        lamp |= {"intensity": g.uniform(0, 4), "ambient": g.uniform(0.02, 2), "softness": g.uniform(0, 1)}
        found.append({**lamp, "colour": g.uniform(0, 2, 3).tolist()})
    edge = {"azimuth": 180.0, "elevation": 0.0, "intensity": 0.0, "ambient": 0.25, "softness": 1.0}
    return [*found, {**edge, "colour": [1, 1, 1]}]


def photos(n: int, seed: int = 1):
    """Lights, and priors of colour, as heads have them."""
    g = torch.Generator().manual_seed(seed)
    mean, std = (
        torch.tensor(v, dtype=torch.float64)[:, None] for v in (light_prior.DECA_MEAN, light_prior.DECA_STD)
    )
    mean = mean + 0.05 * torch.randn(9, 3, generator=g)
    std = std * (0.7 + 0.6 * torch.rand(9, 3, generator=g))
    return mean + 1.5 * std * torch.randn(n, 9, 3, generator=g), mean, std


def test_the_light_of_the_ball_is_the_light_of_the_node():
    asked = lamps(40)
    light, mean, std = photos(len(asked))
    for raw in (False, True):
        given = {"lamps": [{**a, "raw": raw} for a in asked]}
        given |= {k: v.flatten(-2).tolist() for k, v in (("light", light), ("mean", mean), ("std", std))}
        found = javascript(
            "given.lamps.map((l, i) => m.edit(given.light[i], l, given.mean, given.std))", given
        )
        for l, a, got in zip(light, asked, found):
            want = light_prior.edit(l[None], **a, mean=mean, std=std, raw=raw)
            torch.testing.assert_close(
                torch.tensor(got, dtype=torch.float64).reshape(1, 9, 3), want, atol=1e-7, rtol=1e-6
            )
            single = light_prior.edit(l[None].float(), **a, mean=mean.float(), std=std.float(), raw=raw)
            torch.testing.assert_close(torch.tensor(got).reshape(1, 9, 3), single, atol=1e-5, rtol=1e-5)


def test_the_mix_with_the_photos_light_and_the_orbit():
    light, mean, std = photos(2)
    got = javascript("m.mix(...given, 0.3)", light.flatten(1).tolist())
    want = sh.interpolate(light[:1], light[1:], torch.tensor([0.3]))
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64).reshape(1, 9, 3), want)
    for n, start, arc in ((5, -90, 180), (6, 10, -360), (1, 20, 50), (4, -180, 360)):
        given = [light[0].flatten().tolist(), mean.flatten().tolist(), std.flatten().tolist()]
        frames = f"Array.from({{length: {n}}}, (_, i) => m.orbitAzimuth(i, {n}, {start}, {arc}))"
        lamp = "{azimuth, elevation: 15, softness: 0.2}"
        got = javascript(f"{frames}.map(azimuth => m.edit(given[0], {lamp}, given[1], given[2]))", given)
        want = light_prior.orbit(light[:1], n, start, arc, softness=0.2, mean=mean, std=std)
        torch.testing.assert_close(
            torch.tensor(got, dtype=torch.float64).reshape(n, 9, 3), want, atol=1e-7, rtol=1e-6
        )


def test_shading_painting_and_directions():
    light, _, _ = photos(1)
    normals = sh.fibonacci(50)
    got = javascript(
        "given.n.map(n => m.shade(...n, given.l))", {"n": normals.tolist(), "l": light.flatten().tolist()}
    )
    want = sh.basis(normals) @ light[0]
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), want)
    assert javascript("m.CONSTANTS") == pytest.approx(sh.CONSTANTS)

    painted = "(() => { const { normals, cover } = m.ball(64), out = new Uint8ClampedArray(64 * 64 * 4); "
    painted += "m.paint(out, m.basisOf(normals), 0.5, cover, given); return out })()"
    picture = torch.tensor(javascript(painted, light.flatten().tolist())).reshape(64, 64, 4)
    at = (torch.arange(64, dtype=torch.float64) * 2 + 1) / 64 - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    inside = x * x + y * y < 0.9
    normal = torch.stack([x, y, (1 - x * x - y * y).clamp_min(0).sqrt()])[None]
    want = (sh.shade(normal, light)[0] * 127.5).clamp(0, 255).permute(1, 2, 0)
    assert (picture[..., :3] - want)[inside].abs().max() <= 0.51
    assert (picture[..., 3][inside] == 255).all() and (picture[0, 0] == 0).all()

    angles = [[50, 20], [-170, -60], [0, 0], [120, 89]]
    got = javascript("given.map(a => m.fromAngles(...a))", angles)
    a, e = torch.tensor(angles, dtype=torch.float64).T
    torch.testing.assert_close(torch.tensor(got, dtype=torch.float64), sh.from_angles(a, e))
    back = javascript("given.map(a => m.toAngles(m.fromAngles(...a)))", angles)
    torch.testing.assert_close(torch.tensor(back), torch.tensor(angles).float(), atol=1e-4, rtol=0)


def test_presets_and_the_prior_before_a_run_are_pythons():
    want = {k: {**p._asdict(), "colour": list(p.colour)} for k, p in light_prior.PRESETS.items()}
    assert javascript("m.PRESETS") == want
    head = checkpoints.load_head()
    for name, values in (("MEAN", head.light_mean), ("STD", head.light_std)):
        found = torch.tensor(javascript(f"m.{name}")).reshape(9, 3)
        torch.testing.assert_close(found, values.mean(1, keepdim=True).expand(9, 3), atol=0.006, rtol=0)


def test_modules_are_harmless_by_themselves():
    """The page imports every module; those of no extension must only define."""
    for file in sorted(JS.glob("*.js")):
        text = file.read_text(encoding="utf-8")
        for line in text.splitlines():
            if line.startswith("import "):
                assert line.split('"')[1].startswith(("./", "../../../scripts/")), f"{file.name}: {line}"
        assert "http://" not in text and "https://" not in text, file.name


def words() -> dict[str, list[str]]:
    """English text: Chinese, Korean. words.js asks the page for its language; here there is none."""
    source = (JS / "words.js").read_text(encoding="utf-8")
    table = source[source.index("const WORDS = ") + len("const WORDS = ") : source.index("};\n") + 1]
    table = re.sub(r"^\s*//.*$", "", table, flags=re.M)
    return json.loads(re.sub(r",(\s*[\]}])", r"\1", table))


def test_every_word_is_in_three_languages_and_is_said():
    table, said = words(), set()
    for file in JS.glob("*.js"):
        for call in re.findall(r"\bsay\((.*?)\)", file.read_text(encoding="utf-8"), re.S):
            said |= set(re.findall(r'"((?:[^"\\]|\\.)+)"', call))
    named = "[m.PRESETS, m.SOFTNESS, m.COLOURS, m.EXPRESSIONS].flatMap(Object.keys)"
    said |= set(javascript(named))
    assert said == table.keys()
    for english, others in table.items():
        assert len(others) == 2 and len({english, *others}) == 3, english
        for text, script in zip(others, ("[\u4e00-\u9fff]", "[\uac00-\ud7a3]")):
            assert re.search(script, text), text
            assert sorted(re.findall(r"\{\w+\}", text)) == sorted(re.findall(r"\{\w+\}", english)), text


def test_a_language_that_is_not_there_is_english():
    source = (JS / "words.js").read_text(encoding="utf-8")
    source = re.sub(r"^import .*$", "const app = undefined", source, flags=re.M)
    url = "data:text/javascript;base64," + base64.b64encode(source.encode()).decode()
    script = f"""
        const {{ translate }} = await import("{url}")
        const asked = [["Pause", "ko"], ["Pause", "zh-TW"], ["Pause", undefined], ["not there", "zh"]]
        const named = translate("Colour: {{name}}", "zh", {{name: 7}})
        console.log(JSON.stringify([...asked.map(a => translate(...a)), named]))
    """
    run = subprocess.run(
        [NODE, "--input-type=module", "-e", script], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == ["일시 정지", "Pause", "Pause", "not there", "颜色：7"]
