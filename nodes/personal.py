"""Models of one person: Train Personal Model, Mean Shape."""

import time
from pathlib import Path

import torch
from comfy_api.latest import io, ui

from ..rig_core import album, checkpoints, data, personal, pipeline, train
from ..rig_core.denoisers.rig import DiffusionRig
from . import host, sockets
from .loaders import FILES


class TrainPersonalModel(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_TrainPersonalModel",
            display_name="Train Personal Model",
            category="Face Rig/personal",
            description=(
                "Teaches a DiffusionRig one person from some 20 photos (its stage 2). The model appears in "
                "Load DiffusionRig. Stop keeps what is done; the same name with 'resume' goes on."
            ),
            **sockets.aliases("fine-tune", "finetune", "lora", "identity", "album", "train"),
            inputs=[
                io.Combo.Input(
                    "album",
                    options=host.album_names(),
                    default=host.album_names()[0],
                    tooltip=(
                        "Folder below input/ with some 20 photos of the person, in various light and poses. "
                        "Those that are no use are left out, with the reason."
                    ),
                ),
                io.String.Input(
                    "name",
                    default="my_person",
                    tooltip="Name of the new model in models/face_rig: letters, digits, - and _.",
                ),
                sockets.FaceModel.Input(
                    "face_model",
                    tooltip="The head of the base: the default one, or DECA/FLAME for published models.",
                ),
                io.Combo.Input(
                    "base",
                    options=host.model_names(),
                    default=host.DEFAULT,
                    tooltip="The DiffusionRig to start from. " + FILES,
                ),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100_000,
                    step=50,
                    tooltip="Of training; 0 takes what suits the base (as published 5000, the default 600).",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=0.01,
                    step=0.00001,
                    round=0.000001,
                    tooltip="0 takes what suits the base (published: 0.00001). Less changes the model less.",
                ),
                io.Int.Input(
                    "batch",
                    default=4,
                    min=1,
                    max=64,
                    tooltip="Photos a step; 4 as published. More needs memory.",
                ),
                io.Int.Input(
                    "rank",
                    default=0,
                    min=0,
                    max=64,
                    tooltip=(
                        "0 trains the whole denoiser. Above 0 low-rank adapters of that rank: a small file "
                        "that needs its base beside it. Good: 6."
                    ),
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**31 - 1,
                    control_after_generate=False,  # a new seed at every run would train again
                    tooltip="Seed of the training.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=True,
                    tooltip="Go on with a stopped training of that name instead of refusing.",
                ),
            ],
            outputs=[
                io.String.Output(display_name="model_name", tooltip="The file's name in models/face_rig."),
                io.Image.Output(display_name="sheet", tooltip="A photo, and it under four lights."),
                io.Image.Output(display_name="album", tooltip="Photos taken and left out, with the reasons."),
                io.Model.Output(display_name="model", tooltip="The personal model, loaded: use it at once."),
                io.Int.Output(display_name="image_size", tooltip="The size for Align Face."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, name=None):
        try:
            if name is not None:  # it is unknown when another node gives it
                host.new_model_path(name)
        except ValueError as e:
            return str(e)
        return True

    @classmethod
    def fingerprint_inputs(cls, album, base, **others):
        return host.album_fingerprint(album) + host.model_fingerprint(base)

    @classmethod
    def execute(cls, album, name, face_model, base, steps, learning_rate, batch, rank, seed, resume):
        path, out, file = host.new_model_path(name), host.run_path(name), host.model_path(base, widget="base")
        check_new(path, (out / train.STATE).exists(), resume)
        if rank and file and Path(file).parent != path.parent:
            raise ValueError(f"'rank': adapters need their base beside them: move {file} into {path.parent}")
        with host.gradients(), host.own_random_numbers():
            rig, meta = checkpoints.load_rig(file)
            head, size, device = host.head(face_model), rig.config.image_size, host.device()
            personal.check_head(head, meta)
            found = gather(host.album_path(album), face_model, size)
            usual = personal.usual(rig, rank)
            config = train.Config(
                steps=steps or usual[0], lr=learning_rate or usual[1], warmup=50, ema=0.99, seed=seed,
                precision=train.fast_precision(device), save_minutes=5, log_every=10,
                sample_every=max(50, (steps or usual[0]) // 6),
            )  # fmt: skip
            recipe = personal.Recipe(batch, rank, others=personal.learned_from_others(meta))
            host.make_room()
            expected = personal.forecast(config, recipe, checkpoints.load_rig(file)[0], device)
            watch = Watch(config.steps, expected, cls.hidden)
            personal.fit(
                config, recipe, rig, head, found.images, found.codes, out, path, device, resume,
                about={"person": name, "base": Path(file or "").name, "album": found.names},
                on_sample=watch.sample, on_step=watch.step, stop=watch.stop,
            )  # fmt: skip
        if watch.stopped:
            host.end_prompt()
        with host.gradients():
            model = host.model(*checkpoints.load_rig(path, base=file))
        sheet = host.image(watch.sheet[None])
        shown = ui.PreviewImage(sheet, cls=cls)
        return io.NodeOutput(path.name, sheet, host.image(found.sheet[None]), model, size, ui=shown)


def check_new(path, begun: bool, resume: bool) -> None:
    """Raise FileExistsError for the name of another model, or of a training not to go on with."""
    if begun and not resume:
        raise FileExistsError(
            f"'name': the training of {path.stem} has begun: switch 'resume' on, or take another name"
        )
    if path.exists() and not begun:
        raise FileExistsError(
            f"'name': models/face_rig has a {path.name} that was not trained here: take another name"
        )


def gather(folder, face_model, size) -> album.Album:
    """The portraits of an album folder, with the host's bar."""
    files, device = album.paths(folder), host.device()
    progress, head, net = host.Progress(len(files)), host.head(face_model), host.deca(face_model)
    host.together(host.encoder(face_model))  # the photos stay on the CPU, and so does what finds their faces

    def fit(images, points):
        return pipeline.encode(head, images.to(device), points.to(device), net)

    photos = [(p.name, lambda p=p: data.read_photo(p)) for p in files]
    recognise = checkpoints.load_identity()
    return album.gather(photos, size, recognise, fit, callback=lambda *_: progress.step(), head=head)


class Watch:
    """Shows a training on its node: the bar, the loss, the time left, the last sample sheet."""

    def __init__(self, steps: int, expected: personal.Forecast, hidden):
        self.progress, self.steps = host.Progress(steps), steps
        self.node = getattr(hidden, "unique_id", None)
        self.sheet, self.losses, self.began, self.stopped = None, [], None, False
        minutes, gigabytes = steps * expected.seconds / 60, expected.bytes / 2**30
        host.say(f"{steps} steps, about {minutes:.0f} min and {gigabytes:.1f} GiB", self.node)

    def step(self, step, loss):
        self.began = self.began or (step, time.monotonic())
        self.stopped |= not self.progress.show(step)
        self.losses.append(loss.mean())
        if len(self.losses) == 10 or step == self.steps:  # reading the loss makes the device wait
            loss, self.losses = torch.stack(self.losses).mean().item(), []
            first, since = self.began
            left = (self.steps - step) * (time.monotonic() - since) / max(step - first, 1) / 60
            host.say(f"step {step} of {self.steps}, loss {loss:.4f}, {left:.0f} min left", self.node)

    def stop(self) -> bool:
        self.stopped |= host.stop_pressed()
        return self.stopped

    def sample(self, sheet, step):
        self.sheet = sheet
        self.stopped |= not self.progress.show(step, sheet[None] * 2 - 1)
        if not self.began:
            host.say(f"finished before, at step {step}: raise 'steps' to go on", self.node)


class MeanShape(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="FaceRig_MeanShape",
            display_name="Mean Shape",
            category="Face Rig/personal",
            description=(
                "Gives faces the shape that a personal model has learned from its album. Put it right after "
                "the fit, before edits. With a general model the face stays as it is."
            ),
            **sockets.aliases("identity", "personal", "stage 2"),
            inputs=[
                sockets.FaceModel.Input("face_model", tooltip="The one that the face was fitted with."),
                sockets.FaceCode.Input(
                    "face_code", tooltip="Of the person, or of whoever is to become them."
                ),
                io.Model.Input("model", tooltip="The personal model, from Load DiffusionRig."),
            ],
            outputs=[
                sockets.FaceCode.Output(
                    display_name="face_code", tooltip="The same face in the model's shape."
                )
            ],
        )

    @classmethod
    def execute(cls, face_model, face_code, model):
        host.denoiser(model, DiffusionRig)
        shape = model.model.meta.get("mean_shape")
        head = host.head(face_model)
        face_code.require_head(head)
        if shape is None:
            host.warn("Mean Shape: this model has none, it is of no person; the face stays as it is")
        else:
            personal.check_head(head, model.model.meta)
        code = personal.with_shape(head, face_code.to(host.device()), shape)
        return io.NodeOutput(host.result(code))
