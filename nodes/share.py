"""Lights and faces as readable files: Save Light, Load Light, Save Face, Load Face."""

from comfy_api.latest import io, ui

from ..rig_core import readable
from . import host, sockets
from .buffers import preview
from .light_sources import output

FILE = (
    "A .json file below input/, or one that was saved into output/face_rig (marked [output]). Press R after "
    "adding one."
)
TEXT = "The JSON itself, pasted or from another node. Where it is not empty, it counts and not 'file'."
SHOWN = 4000  # characters of a long file that a node shows


def _saved(text: str, prefix: str):
    name = host.save_text(prefix, text)
    return io.NodeOutput(text, ui=ui.PreviewText(f"output/{name}\n\n{text[:SHOWN]}"))


def _prefix(default: str):
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip=(
            "Name of the file in output/, folders with /; a number is added, nothing is overwritten. "
            "Those in face_rig/ show in the Load nodes."
        ),
    )


def _prefix_error(filename_prefix):
    """True, or what is wrong with the name before anything runs."""
    try:
        if filename_prefix is not None:  # it is unknown when another node gives it
            host.check_prefix(filename_prefix)
    except ValueError as e:
        return str(e)
    return True


def _sources():
    names = host.text_names()
    return io.Combo.Input("file", options=names, default=names[0], tooltip=FILE)


def _pasted():
    return io.String.Input("text", multiline=True, default="", optional=True, tooltip=TEXT)


def _read(file: str, text: str, read):
    """What `read` makes of the text, or of the file. Raises ValueError that names the one and the field."""
    pasted = bool(text and text.strip())
    try:
        return read(host.check_text(text) if pasted else host.read_text(file))
    except ValueError as e:
        where = "'text'" if pasted else f"'file' ({file})"
        raise e if str(e).startswith("'file'") else ValueError(f"{where}: {e}") from e


def _fingerprint(file, text):
    return text if text and text.strip() else host.text_fingerprint(file)


class SaveLight(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_SaveLight",
            display_name="Save Light",
            category="Face Rig/share",
            description="Writes a light as a JSON file that you can read, edit and send to others.",
            **sockets.aliases("export light", "light to json", "write"),
            inputs=[
                sockets.SHLight.Input("light", tooltip="One or many, all into one file."),
                _prefix("face_rig/light"),
            ],
            outputs=[io.String.Output(display_name="json", tooltip="The text of the file.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return _prefix_error(filename_prefix)

    @classmethod
    def execute(cls, light, filename_prefix):
        return _saved(readable.light_json(light), filename_prefix)


class LoadLight(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadLight",
            display_name="Load Light",
            category="Face Rig/share",
            description="Reads a light from a JSON file of Save Light, or from pasted text.",
            **sockets.aliases("import light", "light from json", "read"),
            inputs=[_sources(), _pasted()],
            outputs=[
                sockets.SHLight.Output(
                    display_name="light", tooltip="The lights of the file: for SH Light Edit, Mix Lights."
                ),
                io.Image.Output(display_name="ball", tooltip="A grey ball under each light."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file=None, text=None):
        return _fingerprint(file or "", text)

    @classmethod
    def execute(cls, file, text=""):
        return output(_read(file, text, readable.read_light), cls)


class SaveFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_SaveFace",
            display_name="Save Face",
            category="Face Rig/share",
            description="Writes face codes as a JSON file that you can read, edit and send to others.",
            **sockets.aliases("export face code", "face to json", "write"),
            inputs=[
                sockets.FaceCode.Input("face_code", tooltip="One or many, all into one file."),
                _prefix("face_rig/face"),
            ],
            outputs=[io.String.Output(display_name="json", tooltip="The text of the file.")],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, filename_prefix=None):
        return _prefix_error(filename_prefix)

    @classmethod
    def execute(cls, face_code, filename_prefix):
        return _saved(readable.face_json(face_code), filename_prefix)


class LoadFace(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_LoadFace",
            display_name="Load Face",
            category="Face Rig/share",
            description="Reads face codes from a JSON file of Save Face, or from pasted text.",
            **sockets.aliases("import face code", "face from json", "read"),
            inputs=[
                _sources(),
                sockets.FaceModel.Input(
                    "face_model",
                    optional=True,
                    tooltip="With it the file is checked against the head, and the faces are shown.",
                ),
                _pasted(),
            ],
            outputs=[
                sockets.FaceCode.Output(
                    display_name="face_code", tooltip="The faces, in the frame of the photo they came from."
                ),
                sockets.SHLight.Output(display_name="light", tooltip="Their lights alone."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, file=None, text=None, face_model=None):
        return _fingerprint(file or "", text)

    @classmethod
    def execute(cls, file, face_model=None, text=""):
        head = None if face_model is None else host.head(face_model)
        code = _read(file, text, lambda t: readable.read_face(t, head))
        shown = None if head is None else ui.PreviewImage(preview(head, code), cls=cls)
        return io.NodeOutput(host.result(code), host.result(code.light), ui=shown)
