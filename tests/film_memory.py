"""How much memory a long film takes: python -m tests.film_memory [FRAMES] [SIDE] [EVERY]

Writes a film with a face in it, and takes it through Relight Video's passes: read, the face found in every
EVERY-th frame, aligned, pasted back at full resolution, written. A constant gain stands in for the networks,
whose memory is the same for every frame. Prints one line of JSON. Needs PyAV, as the host's Python has it.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import host_double

ROOT = Path(__file__).resolve().parents[1]


def write_clip(path: Path, n: int, side: int) -> None:
    """The portrait of the assets wanders to and fro in n frames."""
    import av

    photo = Image.open(ROOT / "rig_core" / "assets" / "astronaut.jpg").convert("RGB")
    room = side // 32
    photo = np.asarray(photo.resize((side + 2 * room, side + 2 * room)))
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.height = stream.width = side
        stream.pix_fmt, stream.options = "yuv420p", {"preset": "ultrafast", "crf": "20"}
        for i in range(n):
            y, x = (round(room + (room - 1) * np.sin(i / period)) for period in (17, 29))
            array = np.ascontiguousarray(photo[y : y + side, x : x + side])
            out.mux(stream.encode(av.VideoFrame.from_ndarray(array, format="rgb24")))
        out.mux(stream.encode(None))


def peak() -> float:
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main(n: int = 10_000, side: int = 512, every: int = 100) -> dict:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        folder = Path(folder)
        write_clip(folder / "clip.mp4", n, side)
        host_double.install(patch, folder)
        root, extension = host_double.load_pack(patch)
        asyncio.run(extension.get_node_list())
        shot, align = (sys.modules[f"{root.__name__}.rig_core.{m}"] for m in ("shot", "align"))
        landmarks = sys.modules[root.__name__ + ".rig_core.estimators.landmarks"]
        video = sys.modules[root.__name__ + ".nodes.host.video"]
        find, points_of, count = landmarks.find_faces, landmarks.find_landmarks, [0, 0]
        last = [None, None]

        def sometimes(f, k):
            def g(*args):
                if count[k] % every == 0:
                    last[k] = f(*args)
                count[k] += 1
                return last[k]

            return g

        patch.setattr(landmarks, "find_faces", sometimes(find, 0))
        patch.setattr(landmarks, "find_landmarks", sometimes(points_of, 1))

        def describe(frame, row, known, *_):
            photo = align.check_image(frame)
            image = known.crop[row].apply(photo).clamp(0, 1)
            return shot._Told(image, known.crop[row], torch.ones_like(image[:, :1]), image, image)

        patch.setattr(shot, "_describe", describe)
        patch.setattr(
            shot, "_paint", lambda model, told, *_: [(t.image, (t.image * 1.15).clamp(0, 1)) for t in told]
        )

        class File:
            get_components = None

            def get_stream_source(self):
                return str(folder / "clip.mp4")

            def get_dimensions(self):
                return side, side

        film, start, before = video.Film(File(), "video"), time.time(), peak()
        tracked = shot.track(film.frames())
        crop = align.ffhq_crop(shot.motion.smooth(tracked.points, 2.0), 128)
        for _ in shot._faces(film.frames(), torch.arange(n), crop, None):
            pass
        known = shot.Survey(torch.arange(n), crop, None, torch.zeros(n, 512), torch.zeros(n, 1))
        frames = shot.relight(film.frames(), known, None, None, shadow_change=1.0, batch=16)
        made = video.write_video(film, frames, 20)[0].get_stream_source()
        seconds = round(time.time() - start, 1)
        import av

        with av.open(made) as written:
            assert written.streams.video[0].frames == n
    return {"frames": n, "side": side, "peak_mb": peak(), "before_mb": before, "seconds": seconds}


if __name__ == "__main__":
    print(json.dumps(main(*map(int, sys.argv[1:]))))
