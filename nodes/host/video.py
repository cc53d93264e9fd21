"""The host's VIDEO: its frames one by one, as often as needed, and a new file with the same times and sound.

PyAV belongs to the host and takes time to import, so it is imported where it is used.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from fractions import Fraction

import folder_paths
import torch
from comfy_api.latest import InputImpl
from torch import Tensor

from .running import device

COPIED = {"aac", "mp3", "ac3", "eac3", "opus", "flac", "alac"}  # sound that an mp4 takes as it is
SLACK = 1e-4  # seconds, of a cut's rounding
SPACES = {1: 1, 5: 5, 6: 5, 7: 7}  # a frame's colour space -> that of the conversion, as FFmpeg counts


class Film:
    """A VIDEO to go through more than once.

    rate: frames a second. count: how many frames there probably are, at least 1; only a pass tells.
    frame_bytes: of one frame as it is handed out. times: of the latest pass's frames, in `unit` seconds.
    Raises ValueError, naming the input, for what is no VIDEO or cannot be read.
    """

    def __init__(self, video, name: str):
        if not hasattr(video, "get_components"):
            raise ValueError(f"'{name}' is not a VIDEO: connect Load Video or Create Video")
        self.name, self.space, self.times, self.parts = name, 0, [], None
        held = isinstance(video, InputImpl.VideoFromComponents)
        self.source = None if held else video.get_stream_source()
        # later hosts cut a VIDEO in time or in space without writing a new file
        self.begin, length = getattr(video, "get_active_trim_window", lambda: (0.0, 0.0))()
        self.end = self.begin + length if length else float("inf")
        if self.source is None or not self._read_header(video):
            self.parts = video.get_components()
            self.rate = Fraction(self.parts.frame_rate).limit_denominator(90_000)
            self.unit, self.count = 1 / self.rate, max(1, len(self.parts.images))
            self.frame_bytes = self.parts.images[0].nbytes if len(self.parts.images) else 1

    def _read_header(self, video) -> bool:
        """False where the VIDEO is only a part of the file's pictures."""
        with self._open() as container:
            stream = container.streams.video[0]
            self.rate, self.unit = Fraction(stream.average_rate or 25), stream.time_base
            seconds = min(float(container.duration or 0) / 1e6, self.end) - self.begin
            self.count = max(1, round(seconds * self.rate))
            self.frame_bytes = 3 * stream.width * stream.height
            return sorted(video.get_dimensions()) == sorted((stream.width, stream.height))

    @contextlib.contextmanager
    def _open(self):
        import av

        source = self.source
        if isinstance(source, io.BytesIO):  # two readers of one would move each other's place
            source = io.BytesIO(source.getvalue())
        try:
            container = av.open(source)
        except (av.error.FFmpegError, OSError) as e:
            raise ValueError(f"'{self.name}' cannot be opened as a video: {e}") from e
        with container:
            if not container.streams.video:
                raise ValueError(f"'{self.name}' holds no pictures, only sound")
            yield container

    def frames(self) -> Iterator[Tensor]:
        """The frames [1,3,H,W], upright, on the working device: uint8 of a file, float 0..1 of IMAGE."""
        return map(_picture, self._frames())

    def frame(self, i: int, step: Callable[[], None]) -> Tensor:
        """Frame i, counted from 0, or the last one of a shorter film, as `frames` hands it out.

        Of those before it nothing is made; step() after each. Raises ValueError for a film without frames.
        """
        found = None
        for frame in itertools.islice(self._frames(), i + 1):
            found = frame
            step()
        if found is None:
            raise ValueError(f"'{self.name}' has no frames")
        return _picture(found)

    def _frames(self) -> Iterator:
        """The frames as they are held: PyAV's of a file, else of IMAGE."""
        self.times = []
        if self.parts is None:
            yield from self._decoded()
            return
        for i, image in enumerate(self.parts.images):
            self.times.append(i)
            yield image

    def _decoded(self) -> Iterator:
        import av

        count = 0
        with self._open() as container:
            stream = container.streams.video[0]
            if self.begin:  # to the key frame before; what cannot jump there is read from its beginning
                with contextlib.suppress(av.error.FFmpegError):
                    container.seek(math.floor(self.begin / self.unit), stream=stream)
            decoded = container.decode(stream)
            while True:
                try:
                    frame = next(decoded, None)
                except av.error.FFmpegError as e:
                    raise ValueError(f"'{self.name}' is damaged after frame {len(self.times)}: {e}") from e
                if frame is None:
                    return
                at = count / self.rate if frame.pts is None else frame.pts * self.unit
                count += 1
                if at < self.begin - SLACK:
                    continue
                if at >= self.end - SLACK:
                    return
                time = round((at - Fraction(self.begin)) / self.unit)
                self.times.append(max(time, self.times[-1] + 1) if self.times else time)
                self.space = frame.colorspace
                yield frame


def _picture(frame) -> Tensor:
    """A frame of PyAV as RGB uint8, or one of IMAGE, as [1,3,H,W] on the working device."""
    if isinstance(frame, Tensor):
        return frame[None, ..., :3].movedim(-1, 1).to(device())
    x = torch.from_numpy(frame.to_ndarray(format="rgb24"))
    # as a phone held upright says; degrees against the clock
    x = x.rot90(round(getattr(frame, "rotation", 0) / 90))
    return x.movedim(-1, 0)[None].contiguous().to(device())


def write_video(film: Film, frames: Iterator[Tensor], crf: int):
    """A VIDEO of the frames [1,3,H,W] 0..1, with the times and the sound of a film that they are made of.

    A new mp4 in the host's temporary folder; nothing is left when a frame cannot be made, or the user stops.
    crf: quality of H.264, 0 is the best; colours have half the resolution, as players want. Returns the VIDEO
    and the file's name.
    """
    import av

    folder = folder_paths.get_temp_directory()
    os.makedirs(folder, exist_ok=True)
    handle, path = tempfile.mkstemp(".mp4", "face_rig_", folder)
    os.close(handle)
    try:
        with av.open(path, "w", format="mp4") as out, contextlib.ExitStack() as stack:
            stream, sound = None, _Sound(film, out, stack)
            for i, x in enumerate(frames):
                stream = stream or _video_stream(out, film, x.shape[2:], crf)
                sound.write(film.times[i] * film.unit)
                frame = _frame(x, stream, film.space)
                frame.pts, frame.time_base = film.times[i], film.unit
                out.mux(stream.encode(frame))
            out.mux(stream.encode(None))
            sound.write(float("inf"))
    except BaseException:
        os.unlink(path)
        raise
    return InputImpl.VideoFromFile(path), os.path.basename(path)


def _video_stream(out, film: Film, size, crf: int):
    stream = out.add_stream("h264", rate=film.rate)
    stream.height, stream.width = size
    # half of the colours' resolution wants even sides
    stream.pix_fmt = "yuv420p" if size[0] % 2 == size[1] % 2 == 0 else "yuv444p"
    stream.options = {"crf": str(crf)}
    stream.codec_context.time_base = film.unit
    if film.space in SPACES:
        stream.codec_context.colorspace = film.space
    return stream


def _frame(x: Tensor, stream, space: int):
    import av

    array = (x[0].clamp(0, 1) * 255).round().byte().movedim(0, -1).contiguous().cpu().numpy()
    frame = av.VideoFrame.from_ndarray(array, format="rgb24")
    return frame.reformat(format=stream.pix_fmt, dst_colorspace=SPACES.get(space))


class _Sound:
    """The sound of a film on its way into a file: packets as they are where an mp4 takes them, else AAC."""

    def __init__(self, film: Film, out, stack: contextlib.ExitStack):
        self.out, self.packets, self.next = out, iter(()), None
        if film.parts is not None:
            if film.parts.audio:
                waves = _heard(_waves(film.parts.audio), 0, math.inf)
                self.packets = _encoded(out, waves, int(film.parts.audio["sample_rate"]))
            return
        container = stack.enter_context(film._open())
        if not container.streams.audio:
            return
        given = container.streams.audio[0]
        if given.codec_context.name in COPIED and not film.begin:
            stream = out.add_stream_from_template(given)
            self.packets = _copied(container, given, stream, film.end)
        else:
            rate = given.codec_context.sample_rate
            self.packets = _encoded(out, _heard(container.decode(given), film.begin, film.end), rate)

    def write(self, until) -> None:
        """Write what is heard before a time in seconds, so that sound and pictures lie beside each other."""
        while True:
            self.next = self.next or next(self.packets, None)
            if self.next is None or self.next.dts * self.next.time_base > until:
                return
            self.out.mux(self.next)
            self.next = None


def _copied(container, given, stream, end: float):
    for packet in container.demux(given):
        if packet.dts is None or packet.dts * packet.time_base >= end:
            continue
        packet.stream = stream
        yield packet


def _heard(frames, begin: float, end: float):
    """Of frames of sound those within the cut, and when each is heard in the new film, in seconds.

    One without a time follows the one before it.
    """
    at = 0.0
    for frame in frames:
        at = at if frame.time is None else frame.time
        if begin <= at < end:
            yield at - begin, frame
        at += frame.samples / frame.sample_rate


def _encoded(out, frames, rate: int):
    """AAC of (seconds, frame): without gaps, from where the first one is heard."""
    stream, at = out.add_stream("aac", rate=rate), None

    def packets():
        nonlocal at
        for seconds, frame in frames:
            at = round(seconds * rate) if at is None else at
            frame.pts, frame.time_base = at, Fraction(1, rate)
            at += frame.samples
            yield from stream.encode(frame)
        yield from stream.encode(None)

    return packets()


def _waves(audio: dict):
    """Frames of sound, a second each, of the host's AUDIO; one or two channels."""
    import av

    wave, rate = audio["waveform"][0, :2].float().cpu(), int(audio["sample_rate"])
    for part in wave.split(rate, 1):
        layout = "mono" if len(part) == 1 else "stereo"
        frame = av.AudioFrame.from_ndarray(part.contiguous().numpy(), format="fltp", layout=layout)
        frame.sample_rate = rate
        yield frame
