"""FLAME's and DECA's files: what is found where, and the head that comes out of them."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from rig_core import checkpoints, conditions, files, flame_files
from rig_core.estimators.deca import DECA
from rig_core.files import CheckpointError
from rig_core.heads import FaceModel
from rig_core.heads.flame import Flame
from rig_core.heads.open_head import OpenHead
from tests import official_files, python2_pickle
from tests.official_files import official  # noqa: F401 fixture

GOLDEN = Path(__file__).parent / "golden"
NEEDED = ("generic_model.pkl", "landmark_embedding.npy", "head_template.obj")
OPTIONAL = ("FLAME_texture.npz", "FLAME_masks.pkl", "uv_face_mask.png")


@pytest.fixture(scope="module")
def few():
    """A head of 282 vertices as Flame.from_tensors takes it, with a texture of 256 px and three regions."""
    t = load_file(GOLDEN / "flame_synthetic.safetensors")
    head = {k.split(".")[1]: v for k, v in t.items() if k.startswith(("flame.", "lmk."))}
    head |= {"uv": t["uv.vt"], "uv_faces": t["uv.faces"]}
    g = torch.Generator().manual_seed(7)
    mean, dirs = torch.rand(256, 256, 3, generator=g) * 255, torch.randn(256, 256, 3, 4, generator=g)
    regions = {"face": slice(0, 90), "neck": slice(90, 150), "boundary": slice(140, 170)}
    regions |= {"scalp": slice(170, 260), "left_eyeball": slice(0, 5), "right_eyeball": slice(5, 10)}
    for name, part in regions.items():
        head[f"mask.{name}"] = torch.zeros(282)
        head[f"mask.{name}"][part] = 1
    return head | {"texture_mean": mean, "texture_dirs": dirs}


@pytest.fixture(scope="module")
def small(few, tmp_path_factory):
    """Its files; the mask of the skin is the upper half of the texture."""
    folder = tmp_path_factory.mktemp("flame")
    skin = torch.zeros(256, 256)
    skin[:128] = 1
    official_files.write_flame(folder, few, skin)
    return folder


def linked(source, folder, names, under=""):
    """Some of the files in another folder, in a sub-folder of it for those that `under` is given for."""
    for name in names:
        place = folder / under
        place.mkdir(parents=True, exist_ok=True)
        os.link(source / name, place / name)
    return folder


def line(call, *args):
    """The message of the error that it must raise: one line."""
    with pytest.raises(CheckpointError) as e:
        call(*args)
    assert "\n" not in str(e.value)
    return str(e.value)


# --------------------------------------------------------------------------------------------- the tensors


def expected(t):
    """What must come out for a head of `write_flame`, but for the skin."""
    step = len(t["texture_mean"]) // 256
    neck = torch.maximum(t["mask.neck"], t["mask.boundary"])
    mean, dirs = t["texture_mean"][::step, ::step], t["texture_dirs"][::step, ::step, :, :50]
    return t | {"texture_mean": mean, "texture_dirs": dirs, "mask.neck": neck}


def check(found, wanted):
    assert found.keys() - wanted.keys() == {"mask.skin"} and not wanted.keys() - found.keys()
    for k, v in wanted.items():
        if k == "uv":  # six decimals in the file
            torch.testing.assert_close(found[k], v.float(), atol=6e-7, rtol=0)
        else:
            assert torch.equal(found[k], v.long() if not v.is_floating_point() else v.float()), k
            assert found[k].dtype in (torch.float32, torch.int64)


def test_every_tensor_of_the_published_layout(official):  # noqa: F811
    found = flame_files.tensors(official)
    check(found, expected(official_files.head()))
    assert (len(found["v_template"]), len(found["f"]), len(found["uv"])) == (5023, 9976, 5118)
    assert found["shapedirs"].shape == (5023, 3, 400) and found["posedirs"].shape == (5023, 3, 36)
    assert found["texture_dirs"].shape == (256, 256, 3, 50)
    assert found["dynamic_lmk_faces_idx"].shape == (79, 17)
    # the skin of the picture is the face less the eyes: the vertices say so as well
    skin, face = found["mask.skin"], found["mask.face"]
    assert (skin * face).sum() / (skin + face).clamp(max=1).sum() > 0.9
    assert not (skin * (found["mask.left_eyeball"] + found["mask.right_eyeball"])).any()
    nose = found["v_template"][:, 2].argmax()
    back = found["v_template"][:, 2].argmin()
    assert skin[nose] == 1 and skin[back] == 0


@pytest.mark.parametrize("year", [2020, 2023])
def test_chumpy_and_plain_arrays(few, tmp_path, year):
    official_files.write_flame(tmp_path, few, year=year)
    check(flame_files.tensors(tmp_path), expected(few))
    assert [p.name for p in tmp_path.glob("*.pkl") if "mask" not in p.name] == [
        {2020: "generic_model.pkl", 2023: "flame2023.pkl"}[year]
    ]


def test_the_head_is_that_of_the_tensors(small, few):
    a, b = checkpoints.load_face_model(small).head, Flame.from_tensors(expected(few))
    g = torch.Generator().manual_seed(1)
    shape, exp, tex = (torch.randn(2, n, generator=g) for n in (100, 50, 4))
    pose = torch.randn(2, 6, generator=g) * 0.2
    verts = a.verts(shape, exp, pose)
    assert torch.equal(verts, b.verts(shape, exp, pose))
    assert torch.equal(a.landmarks(verts, pose), b.landmarks(verts, pose))
    assert torch.equal(a.albedo(tex), b.albedo(tex))
    part = conditions.face_part(a)
    corners = few["mask.face"][few["f"]].sum(1)
    assert len(part) == int(corners.sum()) and (corners == 2).any()  # once per corner in the mask


def test_rows_of_landmarks_may_be_lists(small, few, tmp_path):
    folder = linked(small, tmp_path, ("generic_model.pkl", "head_template.obj"))
    marks = {k: v.numpy() for k, v in few.items() if "_lmk_" in k}
    marks |= {k: list(v) for k, v in marks.items() if k.startswith("dynamic")}
    (folder / "landmark_embedding.npy").write_bytes(python2_pickle.dumps(marks))
    found = flame_files.tensors(folder)
    for k in marks:
        assert torch.equal(found[k].double(), few[k].double())


def test_albedo_of_the_basel_face_model(small, few, tmp_path):
    folder = linked(small, tmp_path, NEEDED)
    scaled = {"MU": few["texture_mean"].double() / 255, "PC": few["texture_dirs"].double() / 255}
    np.savez(folder / "FLAME_albedo_from_BFM.npz", **{k: v.flatten(0, 2).numpy() for k, v in scaled.items()})
    found = flame_files.tensors(folder)
    assert torch.equal(found["texture_mean"], few["texture_mean"])
    assert torch.equal(found["texture_dirs"], few["texture_dirs"])
    linked(small, tmp_path, ["FLAME_texture.npz"])
    assert flame_files.find(folder)["texture"].name == "FLAME_texture.npz"  # as DiffusionRig was trained
    chosen = flame_files.find(folder / "FLAME_albedo_from_BFM.npz")
    assert (
        chosen["texture"].name == "FLAME_albedo_from_BFM.npz" and chosen["model"].name == "generic_model.pkl"
    )


def test_what_is_optional(small, few, tmp_path):
    bare = flame_files.tensors(linked(small, tmp_path, NEEDED))
    assert not [k for k in bare if k.startswith(("texture", "mask"))]
    head = Flame.from_tensors(bare)
    assert torch.equal(head.masks["skin"], torch.ones(282)) and list(head.masks) == ["skin"]
    assert conditions.face_part(head) is head.faces
    with pytest.raises(RuntimeError, match="put FLAME_texture.npz beside it"):
        head.albedo(torch.zeros(1, 50))
    eyes = few["mask.left_eyeball"] + few["mask.right_eyeball"]
    linked(small, tmp_path, ["FLAME_masks.pkl"])
    assert torch.equal(flame_files.tensors(tmp_path)["mask.skin"], 1 - eyes)
    lists = {"face": np.arange(5), "lips": np.arange(0)}
    (tmp_path / "FLAME_masks.pkl").unlink()
    (tmp_path / "FLAME_masks.pkl").write_bytes(python2_pickle.dumps(lists))
    found = flame_files.tensors(tmp_path)
    assert found["mask.face"].sum() == 5 and not found["mask.lips"].any() and found["mask.skin"].all()
    (tmp_path / "FLAME_masks.pkl").unlink()
    linked(small, tmp_path, ["uv_face_mask.png"])
    found = flame_files.tensors(tmp_path)
    assert [k for k in found if k.startswith("mask")] == ["mask.skin"]
    corner_v = torch.zeros(282).index_put_((few["f"].flatten(),), few["uv"][few["uv_faces"].flatten(), 1])
    sure = (corner_v - 0.5).abs() > 0.02
    assert torch.equal(found["mask.skin"][sure], (corner_v > 0.5).float()[sure])  # the first row is v = 1


# ---------------------------------------------------------------------------------------- files and folders


def test_folders_as_people_keep_them(small, few, tmp_path):
    data = tmp_path / "data"  # DECA's: the model unpacked into a folder of its own
    linked(small, data, ("landmark_embedding.npy", "head_template.obj", *OPTIONAL))
    linked(small, data, ["generic_model.pkl"], "FLAME2020")
    for path in (data, data / "FLAME2020", data / "FLAME2020" / "generic_model.pkl", data / OPTIONAL[0]):
        check(flame_files.tensors(path), expected(few))
    here = linked(small, tmp_path / "models", [*NEEDED, *OPTIONAL], "flame")
    check(flame_files.tensors(here), expected(few))
    assert flame_files.find(tmp_path / "models").keys() == {
        "model",
        "landmarks",
        "template",
        "texture",
        "masks",
        "skin",
    }
    female = here / "flame" / "female_model.pkl"
    os.link(small / "generic_model.pkl", female)
    assert flame_files.find(female)["model"] == female
    assert flame_files.find(here)["model"].name == "generic_model.pkl"


def test_face_models(official, small, few, tmp_path):  # noqa: F811
    for path in (None, files.ASSETS / "open_head.safetensors"):
        model = checkpoints.load_face_model(path)
        assert isinstance(model, FaceModel) and isinstance(model.head, OpenHead) and model.encoder is None
    model = checkpoints.load_face_model(small)
    assert isinstance(model.head, Flame) and model.encoder is None
    folder = linked(small, tmp_path, NEEDED)
    os.link(official / "deca_model.tar", folder / "deca_model.tar")
    want = official_files.deca_weights()["layers.2.bias"]
    files.save(tmp_path / "head.safetensors", flame_files.tensors(small), {"kind": "flame"})
    for name in ("", "generic_model.pkl", "deca_model.tar", "head.safetensors"):
        model = checkpoints.load_face_model(folder / name)
        assert isinstance(model.head, Flame) and isinstance(model.encoder, DECA)
        assert torch.equal(model.encoder.layers[2].bias, want)
        assert model.head.has_texture == (name == "head.safetensors")
    (folder / "deca_model.tar").unlink()
    with pytest.raises(CheckpointError, match="expected an open head, found kind 'identity'"):
        checkpoints.load_face_model(files.ASSETS / "identity.safetensors")


def test_converted_files_are_the_same(official, small, few, tmp_path):  # noqa: F811
    files.save(tmp_path / "flame.safetensors", flame_files.tensors(small), {"kind": "flame"})
    weights = checkpoints.deca_tensors(official / "deca_model.tar")
    files.save(tmp_path / "deca.safetensors", weights, {"kind": "deca"})
    check(flame_files.tensors(tmp_path), expected(few))
    for name in ("", "flame.safetensors", "deca.safetensors"):
        model = checkpoints.load_face_model(tmp_path / name)
        assert torch.equal(model.head.template, few["v_template"].float()) and model.head.has_texture
        assert torch.equal(model.encoder.layers[2].bias, official_files.deca_weights()["layers.2.bias"])
    (tmp_path / "deca.safetensors").rename(tmp_path / "other.safetensors")
    model = checkpoints.load_face_model(tmp_path / "other.safetensors")
    assert isinstance(model.encoder, DECA)
    (tmp_path / "other.safetensors").unlink()
    assert checkpoints.load_face_model(tmp_path).encoder is None


# ------------------------------------------------------------------------------------------------ and errors


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("generic_model.pkl", "register at https://flame.is.tue.mpg.de"),
        ("landmark_embedding.npy", "https://github.com/yfeng95/DECA"),
        ("head_template.obj", "https://github.com/yfeng95/DECA"),
    ],
)
def test_what_is_missing_is_named(small, tmp_path, name, where):
    folder = linked(small, tmp_path, [n for n in NEEDED if n != name])
    text = line(checkpoints.load_face_model, folder)
    assert text.startswith(f"{folder}: {name} (") and where in text and "for research only" in text


def test_files_in_each_others_place(small, few, tmp_path):
    texts = {
        "generic_model.pkl": ("FLAME_masks.pkl", "expected FLAME's head model, but it lacks v_template"),
        "landmark_embedding.npy": ("generic_model.pkl", "expected DECA's landmarks on FLAME, but it lacks"),
        "head_template.obj": ("landmark_embedding.npy", "not FLAME's head_template.obj"),
        "FLAME_texture.npz": ("landmark_embedding.npy", "expected a texture space"),
        "FLAME_masks.pkl": ("generic_model.pkl", "holds odd numbers"),
        "uv_face_mask.png": ("generic_model.pkl", "not a picture"),
    }
    for i, (name, (other, text)) in enumerate(texts.items()):
        folder = linked(small, tmp_path / str(i), [n for n in (*NEEDED, *OPTIONAL) if n != name])
        os.link(small / other, folder / name)
        assert line(checkpoints.load_face_model, folder).startswith(f"{folder / name}: ") and text in line(
            checkpoints.load_face_model, folder
        )
    for name in ("a.jpg", "a.pt"):
        (tmp_path / name).write_bytes(b"x")
        assert "not one of FLAME's files" in line(checkpoints.load_face_model, tmp_path / name)


def test_numbers_that_do_not_fit(small, few, tmp_path):
    def folder(**changed):
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        official_files.write_flame(place, few | changed)
        return place

    one = few["f"].clone()
    one[0] = one[0].roll(1)
    place = folder()
    official_files._write_obj(place / "head_template.obj", few | {"f": one})
    assert "its triangles are not those of generic_model.pkl" in line(checkpoints.load_face_model, place)
    text = line(checkpoints.load_face_model, folder(weights=few["weights"][:-1]))
    assert "generic_model.pkl: not a usable FLAME head: FLAME's weights has shape (281, 5)" in text
    text = line(checkpoints.load_face_model, folder(shapedirs=few["shapedirs"][..., :150]))
    assert "wanted (282, 3, at least 350)" in text
    far = few["static_lmk_faces_idx"].clone()
    far[3] = 9000
    text = line(checkpoints.load_face_model, folder(static_lmk_faces_idx=far))
    assert "static_lmk_faces_idx counts to 9000, there are only 560" in text
    lists = {"face": np.arange(300)}
    place = folder()
    (place / "FLAME_masks.pkl").write_bytes(python2_pickle.dumps(lists, 0))
    text = line(checkpoints.load_face_model, place)
    assert "'face' holds no vertices of a head of 282" in text and "not FLAME_masks_face-id.pkl" in text
    Image.new("L", (1, 1)).save(place / "uv_face_mask.png")
    (place / "FLAME_masks.pkl").unlink()
    assert not flame_files.tensors(place)["mask.skin"].any()
    broken = few["v_template"].clone()
    broken[3, 1] = float("nan")
    text = line(checkpoints.load_face_model, folder(v_template=broken))
    assert "generic_model.pkl: 'v_template' holds numbers that are not finite" in text
    for arrays in (
        {"mean": np.zeros(3), "tex_dir": np.zeros((3, 4))},
        {"mean": np.zeros(7), "tex_dir": np.zeros(9)},
    ):
        np.savez(place / "FLAME_texture.npz", **arrays)
        assert "a texture space of odd sizes" in line(checkpoints.load_face_model, place)
    cut = (place / "generic_model.pkl").read_bytes()
    (place / "generic_model.pkl").write_bytes(cut[: len(cut) // 2])
    assert "damaged or cut pickle" in line(checkpoints.load_face_model, place)
