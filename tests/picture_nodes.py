"""A picture of every node for its help page: web/docs/*.jpg.

Graphs drawn from code run with the models of the pack in ComfyUI's real page (tests/browser.py); each node
is photographed with its widgets and its preview, one that has none beside the node that shows what it did.
With the Python of ComfyUI, with playwright and Chromium, all nodes or those named:

    COMFYUI_PATH=.../ComfyUI .../python -m tests.picture_nodes [SHLightEdit ...]
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFilter

from tests.browser import open_host
from tests.canvas import Canvas, Node

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "web" / "docs"
ONE, MANY = 430, 640  # px, width of a picture of one node, of several beside each other
WIDE, GAP, MARGIN = 300, 44, 12  # of a node, between and around nodes, in the graph's units
FAST = "fast (20+20)"
BADGES = ("NodeIdBadgeMode", "NodeSourceBadgeMode", "NodeLifeCycleBadgeMode")


class Page(Canvas):
    """A graph to run, and the pictures to take of it by the name of the help page."""

    def __init__(self, schemas: dict):
        super().__init__("pictures", schemas)
        self.column("")
        self.shots: dict[str, tuple[Node, ...]] = {}
        self.runs = True
        self.taller: dict[int, int] = {}

    def shoot(self, *nodes: Node, of: Node | None = None, taller: int = 0) -> None:
        """Picture these nodes beside each other, for the page of the first or `of` another.

        taller: added to the height of the last one, for its preview.
        """
        if taller:
            self.taller[nodes[-1].id] = taller
        self.shots[(of or nodes[0]).type.removeprefix("FaceRig_")] = nodes

    def text(self, source) -> Node:
        made = self.node("PreviewAny", source=source)
        self.taller[made.id] = 130
        return made

    def picture(self, source) -> Node:
        return self.node("PreviewImage", images=source)

    def finish(self) -> dict:
        """The graph for the canvas; what nobody takes goes to a Preview Any, so that it runs."""
        taken = {source.id for n in self.nodes for source, _ in n.links.values()}
        for n in list(self.nodes):
            if n.id not in taken and n.outputs and not n.type.startswith("FaceRig_Train"):
                self.text(n[next(iter(n.outputs))])
        graph = self.ui()
        graph["groups"] = []
        return graph


def face(c: Page, head: Node, photo="astronaut.jpg", size=256):
    """A photo, aligned and fitted: LoadImage, AlignFace and FitToLandmarks."""
    loaded = c.node("LoadImage", image=photo)
    align = c.node("AlignFace", photo=loaded["IMAGE"], size=size)
    marks = align["aligned_landmarks"]
    fit = c.node("FitToLandmarks", face_model=head["face_model"], image=align["image"], landmarks=marks)
    return loaded, align, fit


def portrait(c: Page) -> None:
    head, net = c.node("LoadFaceModel"), c.node("LoadDiFaReli")
    photo, align, fit = face(c, head, size=net["image_size"])
    encoder, judge = c.node("LoadIdentityEncoder"), c.node("LoadShadowEstimator")
    embed = c.node("ArcFaceEmbed", identity_encoder=encoder["identity_encoder"], image=align["image"])
    scalar = c.node("ShadowScalar", shadow_estimator=judge["shadow_estimator"], image=align["image"])
    told = {"model": net["model"], "face_model": head["face_model"], "image": align["image"]}
    told |= {"face_code": fit["face_code"], "embed": embed["embed"], "shadow": scalar["shadow"]}
    own = c.node("DiFaReliCondition", "DiFaReli Condition (as photographed)", **told)
    noise = c.node(
        "DDIMInvert", model=net["model"], conditioning=own["conditioning"], image=align["image"], preset=FAST,
        match_means=True,
    )  # fmt: skip
    lit = c.node(
        "SHLightEdit",
        face_model=head["face_model"],
        face_code=fit["face_code"],
        azimuth=-60.0,
        ambient=0.1,
    )
    new = c.node("DiFaReliCondition", **told, light=lit["light"])
    made = c.node(
        "ConditionedSample", model=net["model"], conditioning=new["conditioning"], noise=noise["noise"]
    )
    pasted = c.node(
        "PasteBack", photo=photo["IMAGE"], edited=made["image"], crop=align["crop"], before=noise["before"],
        mask=own["matte"],
    )  # fmt: skip
    result = c.picture(pasted["photo"])
    c.shoot(head, fit, taller=-60)
    c.shoot(net, noise, taller=-60)
    c.shoot(align)
    c.shoot(fit, taller=-60)
    c.shoot(encoder, embed)
    c.shoot(judge, scalar)
    c.shoot(embed, own, taller=-60)
    c.shoot(scalar)
    c.shoot(new, taller=-60)
    c.shoot(noise, taller=-60)
    c.shoot(lit)
    c.shoot(made, taller=-60)
    c.shoot(pasted, result)


def lights(c: Page) -> None:
    head = c.node("LoadFaceModel")
    _, _, fit = face(c, head)
    seen = {"face_model": head["face_model"], "face_code": fit["face_code"]}
    other = c.node("LoadImage", image="grace_hopper.jpg")
    copied = c.node("LightFromPhoto", face_model=head["face_model"], photo=other["IMAGE"])
    room = c.node("LoadImage", image="room.png")
    around = c.node("LightFromEnvironmentMap", panorama=room["IMAGE"], **seen)
    sheet = c.node("LightPresets", preset="all", **seen)
    left = c.node("LightPresets", preset="split left", **seen)
    golden = c.node("LightPresets", preset="golden hour", **seen)
    mixed = c.node("MixLights", light_a=left["light"], light_b=golden["light"], mode="sequence", frames=8)
    orbit = c.node("LightOrbit", frames=16, **seen)
    c.shoot(copied, taller=-50)
    c.shoot(room, around, of=around, taller=-70)
    c.shoot(sheet, taller=-70)
    c.shoot(mixed, taller=-70)
    c.shoot(orbit)


def faces(c: Page) -> None:
    head = c.node("LoadFaceModel")
    _, align, fit = face(c, head)
    _, _, other = face(c, head, "grace_hopper.jpg")
    model, code = {"face_model": head["face_model"]}, fit["face_code"]
    edited = c.node("EditFace", face_code=code, yaw=20.0, smile=0.5, **model)
    moved = c.node("MovePhoto", image=align["image"], source=code, target=edited["face_code"], **model)
    taken = c.node(
        "Transfer",
        target=code,
        source=other["face_code"],
        light=False,
        pose=True,
        expression=True,
        jaw=True,
        **model,
    )
    rest = c.node("NeutralFace", face_code=code, frontal=True, **model)
    way = c.node("InterpolateFaces", face_a=code, face_b=edited["face_code"], frames=4)
    film = c.node("RenderBuffers", face_code=way["face_code"], **model)
    buffers = c.node("RenderBuffers", face_code=code, **model)
    paint = c.node("LoadImage", image="paint.png")
    painted = c.node(
        "ImageCompositeMasked", destination=paint["IMAGE"], source=buffers["albedo"], mask=paint["MASK"]
    )
    new = c.node("BuffersFromImages", buffers=buffers["buffers"], albedo=painted["IMAGE"], light=fit["light"])
    c.shoot(edited)
    c.shoot(moved)
    c.shoot(taken)
    c.shoot(rest)
    c.shoot(way, film, taller=90)
    c.shoot(buffers, taller=-120)
    c.shoot(new, taller=-120)


def rig(c: Page) -> None:
    head, net = c.node("LoadFaceModel"), c.node("LoadDiffusionRig")
    _, align, fit = face(c, head, size=net["image_size"])
    lit = c.node(
        "SHLightEdit",
        face_model=head["face_model"],
        face_code=fit["face_code"],
        azimuth=-60.0,
        ambient=0.1,
    )
    own, new = (
        c.node(
            "DiffusionRigCondition", model=net["model"], image=align["image"],
            buffers=c.node("RenderBuffers", face_model=head["face_model"], face_code=code)["buffers"],
        )["conditioning"]
        for code in (fit["face_code"], lit["face_code"])
    )  # fmt: skip
    noise = c.node("DDIMInvert", model=net["model"], conditioning=own, image=align["image"], preset=FAST)
    made = c.node("ConditionedSample", model=net["model"], conditioning=new, noise=noise["noise"])
    empty = c.node("EmptyPixelLatent", conditioning=new)
    clip = c.node("ClipDenoised", model=net["model"])
    latent = c.node(
        "KSampler",
        model=clip["model"],
        positive=new,
        negative=new,
        latent_image=empty["latent"],
        seed=8,
        steps=50,
        sampler_name="ddpm",
    )
    vae = c.node("VAELoader", vae_name="pixel_space")
    decoded = c.node("VAEDecode", samples=latent["LATENT"], vae=vae["VAE"])
    c.picture(decoded["IMAGE"])
    sigmas = c.node("GuidedSigmas", model=net["model"])
    numbers = c.text(sigmas["sigmas"])
    c.shoot(net, made, taller=-60)
    c.shoot(new[0], made, taller=-60)
    c.shoot(empty, latent)
    c.shoot(clip, latent)
    c.shoot(sigmas, numbers, taller=50)


def saved(c: Page) -> None:
    head = c.node("LoadFaceModel")
    _, _, fit = face(c, head, "grace_hopper.jpg")
    for node in (
        c.node("SaveLight", light=fit["light"]),
        c.node("SaveFace", face_code=fit["face_code"]),
    ):
        c.shoot(node)


def loaded(c: Page) -> None:
    head = c.node("LoadFaceModel")
    c.shoot(c.node("LoadLight", file="light_00001_.json [output]"), taller=-60)
    known = c.node("LoadFace", file="face_00001_.json [output]", face_model=head["face_model"])
    c.shoot(known)


def film(c: Page) -> None:
    video, head, net = c.node("LoadVideo"), c.node("LoadFaceModel"), c.node("LoadDiFaReli")
    encoder, judge = c.node("LoadIdentityEncoder"), c.node("LoadShadowEstimator")
    frame = c.node("VideoFrame", video=video["VIDEO"], frame=2)
    light = c.node("LightPresets", preset="split left")
    relit = c.node(
        "RelightVideo", video=video["VIDEO"], model=net["model"], face_model=head["face_model"],
        identity_encoder=encoder["identity_encoder"], shadow_estimator=judge["shadow_estimator"],
        light=light["light"], preset=FAST,
    )  # fmt: skip
    frames = c.node("GetVideoComponents", video=video["VIDEO"])
    align = c.node("AlignFace", photo=frames["images"], size=256)
    fit = c.node(
        "FitToLandmarks", face_model=head["face_model"], image=align["image"],
        landmarks=align["aligned_landmarks"],
    )  # fmt: skip
    steady = c.node("SmoothFaces", face_code=fit["face_code"])
    shown = c.node("RenderBuffers", face_model=head["face_model"], face_code=steady["face_code"])
    c.shoot(frame)
    c.shoot(relit)
    c.shoot(steady, shown, taller=90)


def personal(c: Page) -> None:
    head = c.node("LoadFaceModel")
    trained = c.node("TrainPersonalModel", album="album", face_model=head["face_model"], steps=100, batch=2)
    _, _, fit = face(c, head, size=128)
    mean = c.node(
        "MeanShape", face_model=head["face_model"], face_code=fit["face_code"], model=trained["model"]
    )
    shown = c.node("RenderBuffers", face_model=head["face_model"], face_code=mean["face_code"])
    c.shoot(trained, taller=-110)
    c.shoot(mean, shown, taller=-100)


def checked(c: Page) -> None:
    c.shoot(c.node("CheckModels"))


def bare(c: Page) -> None:
    """What needs files that are not the pack's."""
    c.runs = False
    flame = c.node("LoadFaceModel", file="deca_model.tar")
    photo = c.node("LoadImage")
    align = c.node("AlignFace", photo=photo["IMAGE"], size=256)
    marks = align["aligned_landmarks"]
    deca = c.node("DECAEncode", face_model=flame["face_model"], image=align["image"], landmarks=marks)
    parser = c.node("LoadFaceParser", file="download 79999_iter.pth (53 MB, MIT)")
    parts = c.node("FaceParse", face_parser=parser["face_parser"], image=align["image"])
    c.shoot(flame, deca, of=deca)
    c.shoot(parser, parts)
    c.shoot(parts)


# graphs of one row need what those before them have saved
ROWS = [[portrait], [lights], [faces], [rig], [saved, loaded], [checked], [film], [personal], [bare]]


def panorama(path: Path) -> None:
    """A dim room, all around: a large window in front to the right, a lamp behind on the left."""
    picture = Image.new("RGB", (768, 384), (52, 46, 42))
    draw = ImageDraw.Draw(picture)
    draw.rectangle((0, 0, 768, 110), fill=(74, 70, 66))
    draw.rectangle((0, 290, 768, 384), fill=(48, 32, 22))
    draw.rectangle((430, 100, 570, 235), fill=(236, 246, 255))
    for x in (476, 522):
        draw.line((x, 100, x, 235), fill=(90, 80, 70), width=4)
    draw.line((430, 165, 570, 165), fill=(90, 80, 70), width=4)
    draw.ellipse((80, 130, 130, 190), fill=(255, 206, 140))
    picture.filter(ImageFilter.GaussianBlur(2)).save(path)


def stripes(path: Path) -> None:
    """Paint for the cheeks of the aligned astronaut, transparent around."""
    alpha = Image.new("L", (256, 256))
    draw = ImageDraw.Draw(alpha)
    for x, way in ((88, 1), (168, -1)):
        for y in (150, 161):
            draw.line((x - 13, y - 3 * way, x + 13, y + 3 * way), fill=255, width=5)
    picture = Image.new("RGB", alpha.size, (20, 70, 170))
    picture.putalpha(alpha.filter(ImageFilter.GaussianBlur(0.8)))
    picture.save(path)


def video(path: Path, photo: Path) -> None:
    """Six frames of the photo, moving a little."""
    import av

    picture = Image.open(photo).convert("RGB").resize((360, 360), Image.LANCZOS)
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 348, 348, "yuv420p"
        for i in range(6):
            frame = picture.crop((2 * i, 6, 2 * i + 348, 354))
            out.mux(stream.encode(av.VideoFrame.from_image(frame)))
        out.mux(stream.encode())


def write_inputs(folder: Path) -> None:
    """What the graphs ask for in input/ beside the photos; the album is of rendered heads."""
    from training import synth

    panorama(folder / "room.png")
    stripes(folder / "paint.png")
    video(folder / "video.mp4", ROOT / "rig_core" / "assets" / "astronaut.jpg")
    (folder / "album").mkdir()
    seeds = list(range(7000000, 7000008))
    for i, x in enumerate(synth.render(seeds, 160, person=[900100] * len(seeds)).image):
        Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / "album" / f"{i}.png")


_ARRANGE = """([shown, sources, taller, wide, gap]) => {
    for (const n of app.graph.nodes) {  // the wires of the others pass far away
        if (shown.includes(n.id)) continue
        const back = n.inputs.some(i => shown.includes(app.graph.links.get(i.link)?.origin_id))
        n.pos = sources.includes(n.id) ? [-9000, back ? -9000 : -600] : [9000, -600]
    }
    shown.forEach((id, i) => {
        const n = bench.node(id), more = taller[id] ?? 0
        const preview = n.widgets?.find(w => w.name === "$$canvas-image-preview")
        if (preview) preview.computeLayoutSize = () => ({ minHeight: 220 + more, minWidth: 1 })
        n.pos = [i * (wide + gap), 0]
        n.setSize([wide, n.computeSize([wide, 0])[1] + (preview ? 0 : more)])
    })
    app.canvas.deselectAll()
    app.canvas.setDirty(true, true)
}"""
# what a report says of the temporary folder is of no use to a reader
_SHORT = """folder => document.querySelectorAll(".face-rig-text").forEach(field => {
    field.textContent = field.textContent.replaceAll(folder, "")
})"""
_VIEW = """([x, y, scale]) => {
    app.canvas.ds.scale = scale
    app.canvas.ds.offset = [x, y]
    app.canvas.setDirty(true, true)
}"""


def take(bench, page: Page, nodes: tuple[Node, ...]) -> Image.Image:
    """The picture of some nodes of the page's graph."""
    ids = [n.id for n in nodes]
    sources = [source.id for n in nodes for source, _ in n.links.values()]
    width = len(ids) * (WIDE + GAP) - GAP
    scale = (ONE if len(ids) == 1 else MANY) / (width + 2 * MARGIN)
    bench.js(_VIEW, 400, 130, scale)
    for _ in range(2):  # a node knows the height of its preview when it has drawn it
        bench.js(_ARRANGE, ids, sources, page.taller, WIDE, GAP)
        bench.page.wait_for_timeout(500)
        bench.settle()
    rects = [bench.rect(i) for i in ids]
    left, top, around = rects[0]["x"], rects[0]["y"], MARGIN * scale
    right, bottom = rects[-1]["x"] + rects[-1]["width"], top + max(r["height"] for r in rects)
    clip = {"x": left - around, "y": top - around}
    clip |= {"width": right - left + 2 * around, "height": bottom - top + 2 * around}
    picture = Image.open(io.BytesIO(bench.page.screenshot(clip=clip))).convert("RGB")
    assert picture.convert("L").getextrema()[1] > 150, (
        "nothing but the page's background: it has stopped drawing"
    )
    return picture


def save(picture: Image.Image, path: Path) -> None:
    """As a JPEG of 45 kB at the most."""
    for quality in (85, 75, 65, 50):
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality, optimize=True)
        if file.tell() <= 45_000:
            break
    path.write_bytes(file.getvalue())


def write(schemas: dict, wanted: set[str]) -> None:
    """Run the graphs and write the wanted pictures; all where none is named."""
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "ComfyUI"
        (base / "input").mkdir(parents=True)
        write_inputs(base / "input")
        flags = ("--preview-method", "latent2rgb")
        with open_host(base, *flags, width=1600, height=1500) as bench:
            for badge in BADGES:
                bench.setting(f"Comfy.NodeBadge.{badge}", "None")
            for row in ROWS:
                pages = [Page(schemas) for _ in row]
                for draw, page in zip(row, pages, strict=True):
                    draw(page)
                if not any(not wanted or wanted & page.shots.keys() for page in pages):
                    continue
                for draw, page in zip(row, pages, strict=True):
                    begun = time.monotonic()
                    bench.load(page.finish())
                    if page.runs:
                        bench.run(1200)
                        bench.js(_SHORT, f"{folder}/")
                    print(f"{draw.__name__}: {time.monotonic() - begun:.0f} s", flush=True)
                    for name, nodes in page.shots.items():
                        if not wanted or name in wanted:
                            save(take(bench, page, nodes), DOCS / f"FaceRig_{name}.jpg")


def main() -> None:
    from tests.node_pack import Pack

    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        schemas = {k: n.define_schema() for k, n in Pack(monkeypatch, Path(folder)).nodes.items()}
    write(schemas, set(sys.argv[1:]))


if __name__ == "__main__":
    main()
