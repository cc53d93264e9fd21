"""The pack's workflows, drawn from code: `python -m tests.draw_workflows` writes workflows/ and tests/api/.

Thumbnails are made by the workflows themselves, see tests/test_host_workflows.py.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from string import Template

import pytest

from tests.canvas import Canvas, text

ROOT = Path(__file__).resolve().parents[1]
NOTES = ROOT / "tests" / "notes"
DIFFUSION_RIG = {
    "name": "model_stage1.pt",
    "url": "https://drive.google.com/file/d/1lnFLNGguvQ150unuOXJqbXiVQtJz0jli/view?usp=sharing",
    "directory": "face_rig",
}
DIFARELI = "https://github.com/diffusion-face-relighting/difareli_code"
FLAME = [{"name": "deca_model.tar", "url": "https://github.com/yfeng95/DECA", "directory": "face_rig"}] + [
    {"name": name, "url": "https://flame.is.tue.mpg.de/download.php", "directory": "face_rig"}
    for name in ("generic_model.pkl", "FLAME_texture.npz", "FLAME_masks.pkl")
]


class Face:
    """A photo's face on the canvas: aligned, fitted, described."""

    def __init__(self, c: Canvas, photo, size, fit="FitToLandmarks", face_model=None, **align):
        self.photo, self.face_model = photo, face_model
        c.column(f"{len(c.columns) + 1} · Find the face")
        self.align = c.node("AlignFace", photo=photo, size=size, **align)
        self.image = self.align["image"]
        self.fit = c.node(
            fit, face_model=face_model, image=self.image, landmarks=self.align["aligned_landmarks"]
        )
        self.code = self.fit["face_code"]


def loaders(c: Canvas, kind: str, image="astronaut.jpg", models=(), head_models=(), **files):
    """The first column: photo, head and denoiser. -> photo, face_model, model, image_size."""
    c.column("1 · Your photo, the models")
    photo = c.node("LoadImage", image=image)["IMAGE"]
    head = {"file": files.pop("head")} if "head" in files else {}
    face_model = c.node("LoadFaceModel", models=head_models, **head)["face_model"]
    model = c.node(kind, models=models, **files)
    return photo, face_model, model["model"], model["image_size"]


def describe(c: Canvas, face: Face, encoder: dict, shadow: dict) -> dict:
    """Identity and shadow of a face, as DiFaReli Condition takes them."""
    encoder = c.node("LoadIdentityEncoder", **encoder)["identity_encoder"]
    judge = c.node("LoadShadowEstimator", **shadow)["shadow_estimator"]
    embed = c.node("ArcFaceEmbed", identity_encoder=encoder, image=face.image)["embed"]
    scalar = c.node("ShadowScalar", shadow_estimator=judge, image=face.image)["shadow"]
    return {"embed": embed, "shadow": scalar}


def difareli(
    c: Canvas, face: Face, model, light, told=None, cast=True, preset="balanced (quad33 ab2)", **edit
):
    """Under its own light to noise, under the new one back -> photos. light(code) draws that light."""
    if told is None:
        c.column("3 · Who it is")
        told = describe(c, face, {}, {})
    told |= {"model": model, "face_model": face.face_model, "image": face.image, "cast_shadow": cast}
    c.column("4 · The photo as noise (once)")
    own = c.node("DiFaReliCondition", "Condition (as photographed)", face_code=face.code, **told)
    noise = c.node(
        "DDIMInvert",
        model=model,
        conditioning=own["conditioning"],
        image=face.image,
        preset=preset,
        match_means=True,
    )
    c.column("5 · The light: play here")
    lit = light(face.code)
    c.column("6 · The photo again")
    new = c.node("DiFaReliCondition", "Condition (edited)", face_code=face.code, light=lit, **told, **edit)
    made = c.node("ConditionedSample", model=model, conditioning=new["conditioning"], noise=noise["noise"])
    return c.node(
        "PasteBack",
        photo=face.photo,
        edited=made["image"],
        crop=face.align["crop"],
        before=noise["before"],
        mask=own["matte"],
    )["photo"]


def save(c: Canvas, images, name: str, fps: float | None = None) -> None:
    c.column(f"{len(c.columns) + 1} · Result")
    c.node("SaveImage", images=images, filename_prefix=f"face_rig/{name}")
    if fps:
        film = c.node("CreateVideo", images=images, fps=fps)
        c.node("SaveVideo", video=film["VIDEO"], filename_prefix=f"face_rig/{name}")


def lamp(c: Canvas, face_model, **widgets):
    return lambda code: c.node("SHLightEdit", face_model=face_model, face_code=code, **widgets)["light"]


def relight_a_portrait(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiFaReli")
    face = Face(c, photo, size, face_model=face_model)
    light = lamp(c, face_model, azimuth=60.0, elevation=25.0, intensity=1.3, ambient=0.15)
    save(c, difareli(c, face, model, light), "relit")


def copy_the_light_of_a_photo(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiFaReli")
    other = c.node("LoadImage", "Load Image (the light)", image="grace_hopper.jpg")["IMAGE"]
    face = Face(c, photo, size, face_model=face_model)

    def light(code):
        return c.node("LightFromPhoto", face_model=face_model, photo=other)["light"]

    save(c, difareli(c, face, model, light), "copied_light")


def light_orbit_to_frames(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiFaReli")
    face = Face(c, photo, size, face_model=face_model)

    def light(code):
        return c.node("LightOrbit", face_model=face_model, face_code=code, frames=16)["light"]

    save(c, difareli(c, face, model, light), "orbit", fps=12.0)


def shadow_strength(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiFaReli")
    face = Face(c, photo, size, face_model=face_model)
    photos = difareli(c, face, model, lamp(c, face_model), shadow_change=-6.0, strengths=5)
    save(c, photos, "shadow")


def rig_condition(c: Canvas, face: Face, model, code, what: str):
    """Render Buffers and DiffusionRig Condition for a code -> what to paint, where the head is."""
    buffers = c.node("RenderBuffers", f"Render Buffers ({what})", face_model=face.face_model, face_code=code)
    told = c.node(
        "DiffusionRigCondition",
        f"Condition ({what})",
        model=model,
        image=face.image,
        buffers=buffers["buffers"],
    )
    return told["conditioning"], buffers["mask"]


def paint(c: Canvas, face: Face, model, code):
    """A DiffusionRig relights the face: its own code to noise, the lit one back -> photos."""
    c.column("3 · The photo as noise (once)")
    own, mask = rig_condition(c, face, model, code, "as photographed")
    noise = c.node("DDIMInvert", model=model, conditioning=own, image=face.image, preset="custom")
    c.column("4 · The light: play here")
    lit = c.node("SHLightEdit", face_model=face.face_model, face_code=code)["face_code"]
    new, _ = rig_condition(c, face, model, lit, "relit")
    c.column("5 · The photo again")
    made = c.node(
        "ConditionedSample", model=model, conditioning=new, noise=noise["noise"], unedited=own, guidance=1.5
    )
    return c.node(
        "PasteBack",
        photo=face.photo,
        edited=made["image"],
        crop=face.align["crop"],
        before=noise["before"],
        mask=mask,
    )["photo"]


def relight_with_diffusionrig(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiffusionRig")
    face = Face(c, photo, size, face_model=face_model)
    save(c, paint(c, face, model, face.code), "relit")


def pose_and_expression(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiffusionRig")
    face = Face(c, photo, size, face_model=face_model)
    c.column("3 · Pose and expression: play here")
    code = c.node("EditFace", face_model=face_model, face_code=face.code, yaw=12.0, smile=0.6)["face_code"]
    moved = c.node("MovePhoto", face_model=face_model, image=face.image, source=face.code, target=code)
    c.column("4 · The moved photo as noise")
    own, _ = rig_condition(c, face, model, code, "moved")
    noise = c.node(
        "DDIMInvert",
        model=model,
        conditioning=own,
        image=moved["moved"],
        hidden=moved["hidden"],
        preset="custom",
    )
    c.column("5 · The light: play here")
    lit = c.node("SHLightEdit", face_model=face_model, face_code=code, mix=0.0)["face_code"]
    new, _ = rig_condition(c, face, model, lit, "edited")
    c.column("6 · The photo again")
    made = c.node(
        "ConditionedSample", model=model, conditioning=new, noise=noise["noise"], unedited=own, guidance=1.0
    )
    pasted = c.node(
        "PasteBack",
        photo=photo,
        edited=made["image"],
        crop=face.align["crop"],
        before=noise["before"],
        motion=moved["motion"],
    )
    save(c, pasted["photo"], "posed")


def several_faces_in_a_group_photo(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiFaReli", image="group.jpg")
    face = Face(c, photo, size, face_model=face_model, faces="all", order="left to right")
    save(c, difareli(c, face, model, lamp(c, face_model, azimuth=-50.0)), "group")


def train_and_use_a_personal_model(c: Canvas) -> None:
    c.column("1 · An album of one person")
    face_model = c.node("LoadFaceModel")["face_model"]
    trained = c.node("TrainPersonalModel", album="album", name="my_person", face_model=face_model)
    c.node(
        "SaveImage", "Save Image (album)", images=trained["album"], filename_prefix="face_rig/personal_album"
    )
    c.node(
        "SaveImage", "Save Image (sheet)", images=trained["sheet"], filename_prefix="face_rig/personal_sheet"
    )
    photo = c.node("LoadImage", "Load Image (a photo to relight)", image="astronaut.jpg")["IMAGE"]
    model = trained["model"]
    face = Face(c, photo, trained["image_size"], face_model=face_model)
    code = c.node("MeanShape", face_model=face_model, face_code=face.code, model=model)["face_code"]
    save(c, paint(c, face, model, code), "personal_relit")


def official_diffusionrig(c: Canvas) -> None:
    photo, face_model, model, size = loaders(
        c,
        "LoadDiffusionRig",
        models=[DIFFUSION_RIG],
        head_models=FLAME,
        file="model_stage1.pt",
        head="deca_model.tar",
    )
    face = Face(c, photo, size, fit="DECAEncode", face_model=face_model)
    save(c, paint(c, face, model, face.code), "official_diffusionrig")


def official_difareli(c: Canvas) -> None:
    files = [
        {"name": n, "url": DIFARELI, "directory": "face_rig"}
        for n in ("ImgCond_model.pt", "ImgEncoder_model.pt")
    ]
    photo, face_model, model, size = loaders(
        c, "LoadDiFaReli", models=files, head_models=FLAME, file="ImgCond_model.pt", head="deca_model.tar"
    )
    face = Face(c, photo, size, fit="DECAEncode", face_model=face_model)
    c.column("3 · Who it is")
    arc, diffae = "BEST_checkpoint_r18.tar", "last.ckpt"
    told = describe(c, face, {"file": arc}, {"file": diffae})
    for node, name, url in (
        (told["embed"], arc, "https://github.com/foamliu/InsightFace-v2/releases"),
        (told["shadow"], diffae, "https://github.com/phizaz/diffae"),
    ):
        loader = next(iter(node[0].links.values()))[0]
        loader.models = [{"name": name, "url": url, "directory": "face_rig"}]
    loader.models += [{"name": "shadow_cls_weight.pkl", "url": DIFARELI, "directory": "face_rig"}]
    parser = c.node("LoadFaceParser", file="79999_iter.pth", models=[PARSER])["face_parser"]
    told["head"] = c.node("FaceParse", face_parser=parser, image=face.image)["mask"]
    photos = difareli(c, face, model, lamp(c, face_model), told, cast=False, preset="official 1000")
    save(c, photos, "official_difareli")


PARSER = {
    "name": "79999_iter.pth",
    "url": "https://huggingface.co/ManyOtherFunctions/face-parse-bisent/resolve/main/79999_iter.pth",
    "directory": "face_rig",
}


def stock_ksampler(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiffusionRig")
    face = Face(c, photo, size, face_model=face_model)
    c.column("3 · What to paint")
    lit = c.node("SHLightEdit", face_model=face_model, face_code=face.code)["face_code"]
    told, _ = rig_condition(c, face, model, lit, "relit")
    c.column("4 · ComfyUI's own sampler")
    empty = c.node("EmptyPixelLatent", conditioning=told)["latent"]
    clipped = c.node("ClipDenoised", model=model)["model"]
    sampled = c.node(
        "KSampler",
        model=clipped,
        positive=told,
        negative=told,
        latent_image=empty,
        seed=11,
        steps=40,
        sampler_name="dpmpp_2m_sde",
        scheduler="karras",
    )["LATENT"]
    vae = c.node("VAELoader", vae_name="pixel_space")["VAE"]
    fresh = c.node("VAEDecode", "VAE Decode (from noise)", samples=sampled, vae=vae)["IMAGE"]
    c.node("SaveImage", "Save Image (from noise)", images=fresh, filename_prefix="face_rig/ksampler")
    c.column("5 · Inversion with stock nodes")
    own, mask = rig_condition(c, face, model, face.code, "as photographed")
    sigmas = c.node("GuidedSigmas", model=model, steps=50)["sigmas"]
    euler, silent = c.node("KSamplerSelect")["SAMPLER"], c.node("DisableNoise")["NOISE"]
    pixels = c.node("VAEEncode", pixels=face.image, vae=vae)["LATENT"]
    c.column("6 · … and back")
    there = c.node(
        "SamplerCustomAdvanced",
        "Sampler (photo to noise)",
        noise=silent,
        sampler=euler,
        latent_image=pixels,
        guider=c.node("BasicGuider", "Guider (as photographed)", model=model, conditioning=own)["GUIDER"],
        sigmas=c.node("FlipSigmas", sigmas=sigmas)["SIGMAS"],
    )
    back = c.node(
        "SamplerCustomAdvanced",
        "Sampler (noise to photo)",
        noise=silent,
        sampler=euler,
        latent_image=there["output"],
        guider=c.node("BasicGuider", "Guider (relit)", model=model, conditioning=told)["GUIDER"],
        sigmas=sigmas,
    )
    made = c.node("VAEDecode", "VAE Decode (of the photo)", samples=back["output"], vae=vae)["IMAGE"]
    c.column("7 · Result")
    pasted = c.node("PasteBack", photo=photo, edited=made, crop=face.align["crop"], mask=mask)["photo"]
    c.node("SaveImage", images=pasted, filename_prefix="face_rig/stock_inversion")


def personal_identity_transfer(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiffusionRig")
    face = Face(c, photo, size, face_model=face_model)
    c.column("3 · The person's shape")
    code = c.node("MeanShape", face_model=face_model, face_code=face.code, model=model)["face_code"]
    told, mask = rig_condition(c, face, model, code, "the person")
    c.column("4 · Paint from noise")
    made = c.node(
        "ConditionedSample", model=model, conditioning=told, steps=50, solver="ddpm", preset="custom", seed=11
    )
    pasted = c.node(
        "PasteBack",
        photo=photo,
        edited=made["image"],
        crop=face.align["crop"],
        mask=mask,
        mode="replace",
        reach=0.03,
    )
    save(c, pasted["photo"], "identity")


def personal_appearance_mixing(c: Canvas) -> None:
    photo, face_model, model, size = loaders(c, "LoadDiffusionRig")
    other = c.node("LoadImage", "Load Image (appearance)", image="grace_hopper.jpg")["IMAGE"]
    face = Face(c, photo, size, face_model=face_model)
    look = c.node("AlignFace", "Align Face (appearance)", photo=other, size=size)["image"]
    c.column("3 · Two conditions")
    code = c.node("MeanShape", face_model=face_model, face_code=face.code, model=model)["face_code"]
    buffers = c.node("RenderBuffers", face_model=face_model, face_code=code)["buffers"]
    own = c.node(
        "DiffusionRigCondition", "Condition (as it is)", model=model, image=face.image, buffers=buffers
    )
    mixed = c.node("DiffusionRigCondition", "Condition (mixed)", model=model, image=look, buffers=buffers)
    c.column("4 · Paint from the same noise")
    how = {"model": model, "steps": 50, "solver": "ddpm", "preset": "custom", "seed": 11}
    pair = [
        c.node("ConditionedSample", f"Conditioned Sample ({what})", conditioning=told["conditioning"], **how)[
            "image"
        ]
        for what, told in (("as it is", own), ("mixed", mixed))
    ]
    c.column("5 · Result")
    both = c.node("ImageStitch", image1=pair[0], image2=pair[1])["IMAGE"]
    c.node("SaveImage", images=both, filename_prefix="face_rig/mixed")


def relight_a_video(c: Canvas) -> None:
    c.column("1 · Your video, the models")
    video = c.node("LoadVideo")["VIDEO"]
    face_model = c.node("LoadFaceModel")["face_model"]
    model = c.node("LoadDiFaReli")
    encoder = c.node("LoadIdentityEncoder")["identity_encoder"]
    judge = c.node("LoadShadowEstimator")["shadow_estimator"]
    c.column("2 · One frame of it")
    frame = c.node("VideoFrame", video=video)["image"]
    face = Face(c, frame, model["image_size"], face_model=face_model)
    c.column("4 · The light: play here")
    light = lamp(c, face_model)(face.code)
    c.column("5 · The film")
    lit = c.node(
        "RelightVideo", video=video, model=model["model"], face_model=face_model, identity_encoder=encoder,
        shadow_estimator=judge, light=light, preset="fast (20+20)",
    )  # fmt: skip
    c.node("SaveVideo", video=lit["relit"], filename_prefix="face_rig/relit")


WORKFLOWS = {
    "Relight a portrait": relight_a_portrait,
    "Relight with DiffusionRig": relight_with_diffusionrig,
    "Copy the light of a photo": copy_the_light_of_a_photo,
    "Light orbit to frames": light_orbit_to_frames,
    "Shadow strength": shadow_strength,
    "Pose and expression": pose_and_expression,
    "Several faces in a group photo": several_faces_in_a_group_photo,
    "Train and use a personal model": train_and_use_a_personal_model,
    "Official DiffusionRig": official_diffusionrig,
    "Official DiFaReli": official_difareli,
    "Stock KSampler": stock_ksampler,
    "Personal identity transfer": personal_identity_transfer,
    "Personal appearance mixing": personal_appearance_mixing,
    "Relight a video": relight_a_video,
}


def note(name: str) -> str:
    """What a workflow's note says; $PHOTO and the like stand for the parts that several share."""
    sections = re.split(r"^## (\w+)\n", (NOTES / "parts.md").read_text(encoding="utf-8"), flags=re.M)[1:]
    parts = {k: v.strip() for k, v in zip(sections[::2], sections[1::2], strict=True)}
    return Template((NOTES / f"{name}.md").read_text(encoding="utf-8")).substitute(parts)


def draw(schemas: dict) -> dict[str, Canvas]:
    """Every workflow by name. schemas: node id -> Schema."""
    drawn = {}
    for name, make in WORKFLOWS.items():
        drawn[name] = c = Canvas(name, schemas)
        make(c)
        c.note(note(name))
    return drawn


def main() -> None:
    from tests.node_pack import Pack

    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        pack = Pack(monkeypatch, Path(folder))
        for name, c in draw({k: n.define_schema() for k, n in pack.nodes.items()}).items():
            (ROOT / "workflows" / f"{name}.json").write_text(text(c.ui()), encoding="utf-8")
            (ROOT / "tests" / "api" / f"{name}.json").write_text(text(c.api()), encoding="utf-8")


if __name__ == "__main__":
    main()
