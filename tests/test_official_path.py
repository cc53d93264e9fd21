"""The official files as they are downloaded, from file to relit picture: by rig_core, and by the nodes.

What comes out must equal what the same tensors give that never were in a file, so that a file which is
ignored or mistaken for another one shows.
"""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from rig_core import buffers, checkpoints, conditions, pipeline
from rig_core.denoisers.rig import RigConfig
from rig_core.estimators import deca, identity, landmark_fit, landmarks, parsing, shadow
from rig_core.heads.flame import Flame
from tests import official_files
from tests.golden_files import FOLDER, small_relight, small_rig
from tests.node_pack import *  # noqa: F403 the fixtures
from tests.official_files import official  # noqa: F401 fixture
from tests.test_shadow import encoder, published  # noqa: F401 fixtures

STEPS = "quad3"


@pytest.fixture(scope="module")
def folder(official, published, tmp_path_factory):  # noqa: F811
    """All official files side by side."""
    place = tmp_path_factory.mktemp("models")
    for path in (*official.iterdir(), *published.iterdir()):
        os.link(path, place / path.name)
    official_files.write_diffusion_rig(place)
    official_files.write_difareli(place)
    official_files.write_arcface(place)
    official_files.write_parser(place)
    yield place
    shutil.rmtree(place)


@pytest.fixture(scope="module")
def flame(folder):
    """Head and DECA of the files."""
    return checkpoints.load_face_model(folder / "generic_model.pkl")


@pytest.fixture(scope="module")
def direct():
    """The same head, DECA and denoisers without files."""
    t = official_files.head()
    t = t | {"mask.neck": torch.maximum(t["mask.neck"], t["mask.boundary"])}
    t |= {k: t[k][::2, ::2] for k in ("texture_mean", "texture_dirs")}
    net = deca.DECA()
    net.load_state_dict(official_files.deca_weights())
    rig, relight = small_rig(), small_relight()
    return SimpleNamespace(head=Flame.from_tensors(t), encoder=net.eval(), rig=rig, relight=relight)


@pytest.fixture(scope="module")
def photo(direct):
    """A photo [1,3,200,260] of the head, and its landmarks [1,68,2]."""
    head = direct.head
    code = head.mean_code(1, (200, 260))
    g = torch.Generator().manual_seed(8)
    code = code.replace(shape=torch.randn(1, 100, generator=g) * 0.5, tex=torch.randn(1, 50, generator=g))
    b = buffers.render(head, code)
    background = torch.linspace(0.25, 0.55, 260).expand(1, 3, 200, 260)
    points = head.landmarks(head.verts(code.shape, code.exp, code.pose), code.pose)
    points = buffers.to_pixels(buffers.to_image(points, code), code.size)
    return (b.rendered * b.mask + background * (1 - b.mask)).clamp(0, 1), points


def lit(code):
    """Two other lights, strong ones: random networks answer faintly."""
    lights = code.light.repeat(2, 1, 1)
    lights[0, 1] += 2.5
    lights[1] *= 0.4
    return lights


def same_code(a, b):
    for name in ("shape", "tex", "exp", "pose", "cam", "light", "crop"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), atol=1e-6, rtol=1e-6)


def alike(a, b):
    """Pictures of samplers: rounding grows at single pixels, so the mean counts."""
    assert a.shape == b.shape and (a - b).abs().mean() < 5e-5 and (a - b).abs().max() < 0.1


def where(crop, photo):
    """Pixels of the photo in the crop's square, [1,1,H,W]."""
    h, w = photo.shape[2:]
    y, x = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
    at = crop.apply_points(torch.stack([x, y], -1).float().view(1, -1, 2))
    return ((at > -0.5) & (at < crop.size - 0.5)).all(-1).view(1, 1, h, w)


def test_diffusion_rig(folder, flame, direct, photo):
    rig, meta = checkpoints.load_rig(folder / "model050000.pt")
    assert meta["head"] == "flame" and rig.config.image_size == 64

    def relit(head, net, rig):
        portrait = pipeline.estimate(head, photo[0], 64, photo[1], encoder=net)
        target = portrait.code.expand(2).replace(light=lit(portrait.code))
        edit = pipeline.paint(rig, head, portrait, target, STEPS, guidance=3)
        return portrait, edit, pipeline.paste(photo[0], portrait, edit)

    portrait, edit, out = relit(*flame, rig)
    wanted = relit(direct.head, direct.encoder, direct.rig)
    same_code(portrait.code, wanted[0].code)
    assert portrait.code.size == (64, 64) and portrait.code.head == "flame"
    torch.testing.assert_close(out, wanted[2], atol=1e-4, rtol=0)
    outside = ~where(portrait.crop, photo[0]).expand_as(out)
    assert torch.equal(out[outside], photo[0].expand_as(out)[outside])
    assert (out - photo[0]).abs().amax((1, 2, 3)).min() > 5e-3 and not torch.equal(out[0], out[1])
    # the code is DECA's, not a fit to the landmarks, and its render lies on the face
    points = portrait.crop.apply_points(photo[1])
    same_code(portrait.code, deca.encode(flame.encoder, portrait.image, points))
    fitted = pipeline.estimate(flame.head, photo[0], 64, photo[1]).code
    assert (fitted.shape - portrait.code.shape).abs().max() > 0.05
    shown, truth = (buffers.render(flame.head, c).mask for c in (portrait.code, fitted))
    assert (shown * truth).sum() / (shown + truth).clamp(max=1).sum() > 0.85


def test_a_turn_in_the_photo(folder, flame, photo):
    head, net = flame
    rig, _ = checkpoints.load_rig(folder / "model050000.pt")
    portrait = pipeline.estimate(head, photo[0], 64, photo[1], encoder=net)
    target = pipeline.turn(head, portrait.code, yaw=15.0, jaw=8.0)
    edit = pipeline.paint(rig, head, portrait, target, STEPS, guidance=1)
    assert edit.grid is not None and edit.image.shape == (1, 3, 64, 64)
    middle = [
        buffers.to_image(head.centre(head.verts(c.shape, c.exp, c.pose))[:, None], c)[0, 0, :2]
        for c in (portrait.code, target)
    ]
    torch.testing.assert_close(*middle, atol=1e-5, rtol=0)  # still in the middle of the picture
    assert torch.isfinite(pipeline.paste(photo[0], portrait, edit)).all()


def test_the_face_is_found_without_landmarks(flame, photo):
    portrait = pipeline.estimate(flame.head, photo[0], 128, encoder=flame.encoder)
    assert len(landmarks.find_faces(photo[0])[0]) == 1
    middle = portrait.crop.apply_points(photo[1])[0, 17:].mean(0)
    assert (middle - 64).norm() < 20


@pytest.fixture(scope="module")
def described(folder, flame, photo):
    """Portrait and subject at 256 px, by the official files."""
    head, net = flame
    portrait = pipeline.estimate(head, photo[0], 256, photo[1], encoder=net)
    nets = (
        checkpoints.load_identity(folder / "BEST_checkpoint_r18.tar"),
        checkpoints.load_shadow(folder / "last.ckpt"),
        checkpoints.load_parser(folder / "79999_iter.pth"),
    )
    return portrait, pipeline.describe(head, portrait, *nets), nets


def test_subject(described, published, encoder):  # noqa: F811
    portrait, subject, (recognise, judge, parser) = described
    torch.manual_seed(5)
    face = identity.ArcFace(identity.ArcFaceConfig(32, 4, (1, 1, 1, 1), 512)).eval().requires_grad_(False)
    torch.testing.assert_close(subject.embed, identity.embed(face, portrait.image), atol=1e-5, rtol=1e-5)
    assert subject.embed.shape == (1, 512)
    torch.manual_seed(6)
    labels = parsing.parse(parsing.BiSeNet().eval(), portrait.image)
    assert torch.equal(subject.matte, parsing.head_mask(labels))
    weight = checkpoints.load_shadow(published / "last.ckpt").weight
    want = shadow.project(encoder(portrait.image * 2 - 1), weight)
    torch.testing.assert_close(subject.shadow, want, atol=1e-3, rtol=1e-3)
    hidden = subject.matte.expand(-1, 3, -1, -1) > 0.5
    assert (subject.background[hidden] == -1).all() and (subject.background[~hidden] > -1).any()


def test_difareli_below_256(folder, flame, direct, photo, described):
    head = flame.head
    denoiser, meta = checkpoints.load_relight(folder / "ImgCond_ema_0.9999_085000.pt")
    assert meta["head"] == "flame" and denoiser.config.image_size == 32 and denoiser.config.cond_dim == 672
    portrait, subject, _ = described
    small = pipeline.shrink(portrait, subject, 32)
    lights = lit(portrait.code)

    def relit(denoiser, head):
        noise = pipeline.to_noise(denoiser, head, *small, steps=STEPS, cast=False)
        edit = pipeline.relight(denoiser, head, *small, lights, noise=noise, cast=False)
        return pipeline.paste(photo[0], small[0], edit)

    out = relit(denoiser, head)
    torch.testing.assert_close(out, relit(direct.relight, direct.head), atol=1e-4, rtol=0)
    assert out.shape == (2, 3, 200, 260) and (out - photo[0]).abs().amax((1, 2, 3)).min() > 0.01
    # the reference is the published part of the face alone, drawn at 256
    spatial, vector = pipeline.relight_inputs(denoiser, head, *small, lights, cast=False)
    assert spatial.shape == (2, 6, 32, 32) and vector.shape == (1, 672)
    bare = Flame.from_tensors({k: v for k, v in official_files.head().items() if not k.startswith("mask.")})
    part, whole = (conditions.draw(h, portrait.code, 256).mask for h in (head, bare))
    assert 0.3 < part.sum() / whole.sum() < 0.75
    drawn = conditions.shading_reference(head, portrait.code.replace(light=lights[:1]), 32)
    torch.testing.assert_close(spatial[:1, :3], drawn)
    code = portrait.code
    want = torch.cat([code.shape, code.pose, code.exp, code.cam, subject.embed, subject.shadow], 1)
    torch.testing.assert_close(vector, want)
    assert torch.equal(spatial[:1, 3:], small[1].background)


# -------------------------------------------------------------------------------------------------- the nodes


@pytest.fixture(scope="module")
def installed(pack, folder):
    """The files in the host's model folder."""
    place = pack.host.folder / "models" / "face_rig"
    for path in folder.iterdir():
        os.link(path, place / path.name)
    yield place
    for path in folder.iterdir():
        (place / path.name).unlink()


def picture(x):
    return x.permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def face_model(pack, installed):
    assert {"generic_model.pkl", "deca_model.tar"} <= set(
        pack.nodes["FaceRig_LoadFaceModel"].define_schema().inputs[0].options
    )
    return pack.run("LoadFaceModel", file="deca_model.tar")[0]


def aligned(pack, face_model, photo, size):
    """Image, crop, code, light, overlay of the nodes."""
    image, crop, points, _ = pack.run("AlignFace", photo=picture(photo[0]), size=size, landmarks=photo[1])
    return image, crop, *pack.run("DECAEncode", face_model=face_model, image=image, landmarks=points)


def test_nodes_of_diffusion_rig(pack, installed, face_model, direct, photo):
    model, size = pack.run("LoadDiffusionRig", file="model050000.pt")
    image, crop, code, light, overlay = aligned(pack, face_model, photo, size)
    portrait = pipeline.estimate(direct.head, photo[0], 64, photo[1], encoder=direct.encoder)
    same_code(code, portrait.code)
    assert torch.equal(light, code.light)
    b = buffers.render(direct.head, portrait.code)
    shown = portrait.image + b.mask * (b.rendered - portrait.image)
    torch.testing.assert_close(overlay, picture(shown.clamp(0, 1)), atol=1e-4, rtol=0)
    assert face_model.encoder in pack.host.loaded  # the host knows of DECA
    target = code.expand(2).replace(light=lit(code))
    made = [pack.run("RenderBuffers", face_model=face_model, face_code=c)[0] for c in (code, target)]
    own, new = (pack.run("DiffusionRigCondition", model=model, image=image, buffers=m)[0] for m in made)
    how = {"model": model, "steps": 3, "spacing": "quad", "preset": "custom"}
    noise, before = pack.run("DDIMInvert", conditioning=own, image=image, **how)
    out = pack.run("ConditionedSample", conditioning=new, noise=noise, model=model)[0]
    near = pipeline.near(b.mask)[:, 0]
    back = pack.run(
        "PasteBack", photo=picture(photo[0]), edited=out, crop=crop, before=before, mask=near, reach=0.0
    )[0]
    want = portrait.code.expand(2).replace(light=lit(portrait.code))
    edit = pipeline.paint(direct.rig, direct.head, portrait, want, STEPS, guidance=1)
    alike(out, picture(edit.image))
    pasted = pipeline.paste(photo[0], portrait, edit)
    alike(back, picture(pasted))


def test_nodes_of_difareli_below_256(pack, installed, face_model, direct, photo, described):
    model, size = pack.run("LoadDiFaReli", file="ImgCond_ema_0.9999_085000.pt")
    assert size == 256 and model.model.diffusion_model.net.config.image_size == 32
    image, crop, code, _, _ = aligned(pack, face_model, photo, size)
    portrait, subject, _ = described
    same_code(code, portrait.code)
    recognise = pack.run("LoadIdentityEncoder", file="BEST_checkpoint_r18.tar")[0]
    judge = pack.run("LoadShadowEstimator", file="last.ckpt")[0]
    parser = pack.run("LoadFaceParser", file="79999_iter.pth")[0]
    told = {
        "model": model,
        "face_model": face_model,
        "face_code": code,
        "image": image,
        "embed": pack.run("ArcFaceEmbed", identity_encoder=recognise, image=image)[0],
        "shadow": pack.run("ShadowScalar", shadow_estimator=judge, image=image)[0],
        "head": pack.run("FaceParse", face_parser=parser, image=image)[0],
        "cast_shadow": False,
    }
    own, matte = pack.run("DiFaReliCondition", **told)
    new = pack.run("DiFaReliCondition", light=lit(code), **told)[0]
    small = pipeline.shrink(portrait, subject, 32)
    torch.testing.assert_close(matte, small[1].matte[:, 0])
    spatial, vector = pipeline.relight_inputs(direct.relight, direct.head, *small, lit(code), cast=False)
    fields = new[0][1]
    torch.testing.assert_close(fields["relight_spatial"], spatial, atol=2e-4, rtol=0)
    torch.testing.assert_close(fields["relight_vector"], vector, atol=1e-3, rtol=1e-3)
    how = {"model": model, "steps": 3, "spacing": "quad", "preset": "custom", "match_means": True}
    noise, before = pack.run("DDIMInvert", conditioning=own, image=image, **how)
    assert noise["samples"].shape == (1, 3, 32, 32) and before.shape == (1, 32, 32, 3)
    out = pack.run("ConditionedSample", conditioning=new, noise=noise, model=model)[0]
    found = pipeline.to_noise(direct.relight, direct.head, *small, steps=STEPS, cast=False)
    edit = pipeline.relight(direct.relight, direct.head, *small, lit(code), noise=found, cast=False)
    alike(out, picture(edit.image))
    back = pack.run("PasteBack", photo=picture(photo[0]), edited=out, crop=crop, before=before, mask=matte)[0]
    assert back.shape == (2, 200, 260, 3) and (back - picture(photo[0])).abs().max() > 0.01
    with pytest.raises(ValueError, match="'image' is of 64 x 64 pixels, this DiFaReli works at 256 x 256"):
        pack.run("DiFaReliCondition", **told | {"image": image[:, ::4, ::4]})


def test_the_loader_sees_files_that_come_and_go(pack, installed, face_model):
    node = pack.nodes["FaceRig_LoadFaceModel"]
    before = node.fingerprint_inputs(file="generic_model.pkl")
    assert node.fingerprint_inputs(file="generic_model.pkl") == before
    path = installed / "deca_model.tar"
    shutil.move(path, installed / "kept")
    try:
        assert node.fingerprint_inputs(file="generic_model.pkl") != before
        model = pack.run("LoadFaceModel", file="generic_model.pkl")[0]
        assert model.encoder is None and model.head.name == "flame"
    finally:
        shutil.move(installed / "kept", path)
    assert node.fingerprint_inputs(file="generic_model.pkl") == before


def test_encode_without_deca_says_what_to_do(pack, head, scene, face):
    for model in (head, pack.run("LoadFaceModel")[0]):
        with pytest.raises(ValueError, match="'face_model' has no DECA: put deca_model.tar beside"):
            pack.run("DECAEncode", face_model=model, image=face[0], landmarks=face[2])


def test_fit_to_landmarks_works_on_flame_too(pack, installed, face_model, flame, photo):
    image, _, points, _ = pack.run("AlignFace", photo=picture(photo[0]), size=128, landmarks=photo[1])
    code, _, overlay = pack.run("FitToLandmarks", face_model=face_model, image=image, landmarks=points)
    assert code.head == "flame" and code.pose[:, :3].abs().max() < 0.05
    seen = landmark_fit.residual(flame.head, code, points)
    assert seen[:, 17:].median() < 0.5 and seen[:, :17].median() < 2  # px of 128
    inside = buffers.render(flame.head, code).mask[0, 0] > 0
    assert inside.float().mean() > 0.3 and (overlay - image)[0][inside].abs().mean() < 0.06


def test_encode_many_faces_and_a_head_without_texture(pack, installed, face_model, photo):
    image, _, points, _ = pack.run("AlignFace", photo=picture(photo[0]), size=64, landmarks=photo[1])
    dark = torch.cat([image, image * 0.5])
    code, light, overlay = pack.run(
        "DECAEncode", face_model=face_model, image=dark, landmarks=points.expand(2, -1, -1)
    )
    assert len(code) == 2 and light.shape == (2, 9, 3) and overlay.shape == (2, 64, 64, 3)
    assert (code.shape[0] - code.shape[1]).abs().max() > 1e-3
    bare = {k: v for k, v in official_files.head().items() if not k.startswith(("texture", "mask"))}
    head = pack.core.heads.flame.Flame.from_tensors(bare)
    grey = pack.run("DECAEncode", face_model=face_model._replace(head=head), image=dark[:1], landmarks=points)
    same_code(grey[0], code[0])
    assert (grey[2] - overlay[:1]).abs().max() > 0.05
    spread = (grey[2][0] - grey[2][0].mean(-1, keepdim=True)).abs().amax(-1)
    mask = pack.core.buffers.render(head, grey[0], albedo=torch.ones(1, 3, 8, 8)).mask[0, 0] > 0
    assert (
        spread[mask].median()
        < 0.05
        < (overlay[0] - overlay[0].mean(-1, keepdim=True)).abs().amax(-1)[mask].median()
    )


@pytest.mark.slow
def test_the_published_256_px_model(official, tmp_path, photo):  # noqa: F811
    """Every key of the full-size denoiser, on buffers of the head: one evaluation."""
    table = json.loads((FOLDER / "diffrig_256.json").read_text())
    shapes = {k: v[0] if isinstance(v[0], list) else v for k, v in table.get("state_dict", table).items()}
    torch.save(official_files.recipe(shapes, 11), tmp_path / "model050000.pt")
    rig, meta = checkpoints.load_rig(tmp_path / "model050000.pt")
    (tmp_path / "model050000.pt").unlink()
    assert rig.config == RigConfig() and meta["head"] == "flame"
    head, net = checkpoints.load_face_model(official)
    portrait = pipeline.estimate(head, photo[0], rig.config.image_size, photo[1], encoder=net)
    b = buffers.render(head, portrait.code)
    condition = rig.condition(b.stack(), portrait.image * 2 - 1)
    other = rig.condition(b.replace(rendered=b.rendered * 0.7).stack(), portrait.image * 2 - 1)
    x, t = torch.randn(1, 3, 256, 256, generator=torch.Generator().manual_seed(2)), torch.tensor([400])
    with torch.no_grad():
        eps, answer = rig(x, t, condition), rig(x, t, other)
    assert torch.isfinite(eps).all() and (eps - answer).abs().max() > 1e-4
