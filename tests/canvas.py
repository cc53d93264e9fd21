"""Workflows drawn from code: the canvas file that the template browser shows, and its twin for the API.

A `Canvas` holds nodes in columns; `node` takes inputs by name, links as (node, output name). Sockets and
widgets of our nodes come from their schemas, those of ComfyUI's from STOCK.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass, field

WIDTH, GAP, TOP = 320, 60, 120
SEED = "control_after_generate"
# type: ({socket: type}, {widget: default}, {output: type}); SEED stands for the widget that a seed brings along
STOCK = {
    "LoadImage": ({}, {"image": "astronaut.jpg", "upload": "image"}, {"IMAGE": "IMAGE", "MASK": "MASK"}),
    "SaveImage": ({"images": "IMAGE"}, {"filename_prefix": "face_rig/picture"}, {}),
    "PreviewImage": ({"images": "IMAGE"}, {}, {}),
    "PreviewAny": ({"source": "*"}, {}, {}),
    "ImageCompositeMasked": (
        {"destination": "IMAGE", "source": "IMAGE", "mask": "MASK?"},
        {"x": 0, "y": 0, "resize_source": False},
        {"IMAGE": "IMAGE"},
    ),
    "GetVideoComponents": ({"video": "VIDEO"}, {}, {"images": "IMAGE", "audio": "AUDIO", "fps": "FLOAT"}),
    "LoadVideo": ({}, {"file": "video.mp4", "upload": "image"}, {"VIDEO": "VIDEO"}),
    "CreateVideo": ({"images": "IMAGE", "audio": "AUDIO?"}, {"fps": 12.0}, {"VIDEO": "VIDEO"}),
    "SaveVideo": (
        {"video": "VIDEO"},
        {"filename_prefix": "face_rig/film", "format": "auto", "codec": "auto"},
        {},
    ),
    "ImageStitch": (
        {"image1": "IMAGE", "image2": "IMAGE?"},
        {"direction": "right", "match_image_size": True, "spacing_width": 0, "spacing_color": "white"},
        {"IMAGE": "IMAGE"},
    ),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"},
        {
            "seed": 0,
            SEED: "fixed",
            "steps": 20,
            "cfg": 1.0,
            "sampler_name": "euler",
            "scheduler": "normal",
            "denoise": 1.0,
        },
        {"LATENT": "LATENT"},
    ),
    "VAELoader": ({}, {"vae_name": "pixel_space"}, {"VAE": "VAE"}),
    "VAEEncode": ({"pixels": "IMAGE", "vae": "VAE"}, {}, {"LATENT": "LATENT"}),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, {}, {"IMAGE": "IMAGE"}),
    "DisableNoise": ({}, {}, {"NOISE": "NOISE"}),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, {}, {"GUIDER": "GUIDER"}),
    "KSamplerSelect": ({}, {"sampler_name": "euler"}, {"SAMPLER": "SAMPLER"}),
    "FlipSigmas": ({"sigmas": "SIGMAS"}, {}, {"SIGMAS": "SIGMAS"}),
    "SamplerCustomAdvanced": (
        {
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        {},
        {"output": "LATENT", "denoised_output": "LATENT"},
    ),
}
# height of what a node shows below its widgets
SHOWS = {
    "LoadImage": 300,
    "SaveImage": 380,
    "PreviewImage": 300,
    "SaveVideo": 380,
    "LoadVideo": 300,
    "FaceRig_SHLightEdit": 290,
    "FaceRig_LightOrbit": 280,
    "FaceRig_EditFace": 300,
}


@dataclass
class Node:
    """One node: what it is, where it is, what goes in."""

    id: int
    type: str
    column: int
    sockets: dict[str, str]
    widgets: dict
    types: dict[str, str]
    outputs: dict[str, str]
    links: dict[str, tuple[Node, str]]
    title: str | None = None
    models: list[dict] = field(default_factory=list)

    def __getitem__(self, output: str) -> tuple[Node, str]:
        if output not in self.outputs:
            raise KeyError(f"{self.type} has no output {output}, only {', '.join(self.outputs)}")
        return self, output

    @property
    def height(self) -> int:
        shown = SHOWS.get(self.type, 0 if self.type.startswith("FaceRig_Load") else 200)
        return 50 + 22 * max(len(self.sockets), len(self.outputs)) + 26 * len(self.widgets) + shown


class Canvas:
    """A workflow being drawn. schemas: node id -> Schema of our nodes."""

    def __init__(self, name: str, schemas: dict):
        self.name, self.schemas = name, schemas
        self.nodes: list[Node] = []
        self.columns: list[str] = []
        self.notes: list[str] = []

    def column(self, title: str) -> None:
        """What follows stands in a new column, in a frame with this title."""
        self.columns.append(title)

    def note(self, text: str) -> None:
        """Markdown above the graph."""
        self.notes.append(text)

    def node(self, type: str, title: str | None = None, models=(), **inputs) -> Node:
        """A node of ComfyUI by its type, one of ours without the prefix."""
        ours = "FaceRig_" + type
        if ours in self.schemas:
            sockets, widgets, outputs = _of_schema(self.schemas[ours])
            type = ours
        else:
            sockets, widgets, outputs = ({**part} for part in STOCK[type])
        types = {k: v.rstrip("?") for k, v in sockets.items()}
        links = {k: v for k, v in inputs.items() if isinstance(v, tuple)}
        unknown = inputs.keys() - sockets.keys() - widgets.keys()
        assert not unknown, f"{type} has no {unknown}"
        for k, v in inputs.items():
            if k not in links:
                assert k in widgets, f"{k} of {type} is a socket"
                widgets[k] = v
        needed = {k for k, v in sockets.items() if not v.endswith("?")}
        assert needed <= links.keys(), f"{type} lacks {needed - links.keys()}"
        made = Node(
            len(self.nodes) + 1, type, len(self.columns) - 1, sockets, widgets, types, outputs, links, title,
            list(models),
        )  # fmt: skip
        self.nodes.append(made)
        return made

    def api(self) -> dict:
        """The graph as the API takes it."""
        graph = {}
        for n in self.nodes:
            values = {k: v for k, v in n.widgets.items() if not k.endswith(SEED) and k != "upload"}
            values |= {
                k: [str(source.id), list(source.outputs).index(out)] for k, (source, out) in n.links.items()
            }
            graph[str(n.id)] = {"class_type": n.type, "inputs": values}
        return graph

    def ui(self) -> dict:
        """The graph as the canvas saves it."""
        links, nodes, places = [], [], self._places()
        outgoing: dict[tuple[int, str], list[int]] = {}
        for n in self.nodes:
            inputs = []
            for name in [*n.sockets, *(k for k in n.links if k in n.widgets)]:
                entry = {"name": name, "type": n.types.get(name) or self._type(n, name), "link": None}
                if n.sockets.get(name, "").endswith("?"):
                    entry["shape"] = 7
                if name in n.widgets:
                    entry["widget"] = {"name": name}
                if name in n.links:
                    source, out = n.links[name]
                    entry["link"] = len(links) + 1
                    outgoing.setdefault((source.id, out), []).append(len(links) + 1)
                    links.append(
                        [
                            len(links) + 1,
                            source.id,
                            list(source.outputs).index(out),
                            n.id,
                            len(inputs),
                            source.outputs[out],
                        ]
                    )
                inputs.append(entry)
            properties = {"Node name for S&R": n.type}
            if n.type.startswith("FaceRig_"):
                properties["cnr_id"] = "face-rig"
            if n.models:
                properties["models"] = n.models
            drawn = {
                "id": n.id,
                "type": n.type,
                "pos": places[n.id],
                "size": [WIDTH, n.height],
                "flags": {},
                "order": n.id - 1,
                "mode": 0,
                "inputs": inputs,
                "outputs": [],
                "properties": properties,
                "widgets_values": list(n.widgets.values()),
            }
            if n.title:
                drawn["title"] = n.title
            nodes.append((n, drawn))
        for n, drawn in nodes:
            drawn["outputs"] = [
                {"name": k, "type": v, "links": outgoing.get((n.id, k))} for k, v in n.outputs.items()
            ]
        drawn = [d for _, d in nodes] + self._notes(len(nodes))
        return {
            "id": str(uuid.uuid5(uuid.NAMESPACE_URL, "face-rig/" + self.name)),
            "revision": 0,
            "last_node_id": len(drawn),
            "last_link_id": len(links),
            "nodes": drawn,
            "links": links,
            "groups": self._groups(places),
            "config": {},
            "extra": {"ds": {"scale": 0.55, "offset": [60, 560]}},
            "version": 0.4,
        }

    def _type(self, node: Node, name: str) -> str:
        inputs = (
            {i.id: i.io_type for i in self.schemas[node.type].inputs} if node.type in self.schemas else {}
        )
        return inputs.get(name, "STRING")

    def _places(self) -> dict[int, list[int]]:
        below = [TOP] * len(self.columns)
        places = {}
        for n in self.nodes:
            places[n.id] = [20 + n.column * (WIDTH + GAP), below[n.column]]
            below[n.column] += n.height + 50
        return places

    def _notes(self, order: int) -> list[dict]:
        drawn, x = [], 20
        for i, text in enumerate(self.notes):
            height = 90 + sum(22 * (1 + len(line) // 80) for line in text.splitlines())
            drawn.append(
                {
                    "id": order + i + 1,
                    "type": "MarkdownNote",
                    "pos": [x, TOP - 90 - height],
                    "size": [640, height],
                    "flags": {},
                    "order": order + i,
                    "mode": 0,
                    "title": "Read me",
                    "inputs": [],
                    "outputs": [],
                    "properties": {},
                    "widgets_values": [text],
                    "color": "#432",
                    "bgcolor": "#653",
                }
            )
            x += 680
        return drawn

    def _groups(self, places) -> list[dict]:
        groups = []
        for i, title in enumerate(self.columns):
            inside = [n for n in self.nodes if n.column == i]
            bottom = max(places[n.id][1] + n.height for n in inside)
            box = [20 + i * (WIDTH + GAP) - 15, TOP - 75, WIDTH + 30, bottom - TOP + 95]
            groups.append(
                {
                    "id": i + 1,
                    "title": title,
                    "bounding": box,
                    "color": "#3f789e",
                    "font_size": 22,
                    "flags": {},
                }
            )
        return groups


def _of_schema(schema) -> tuple[dict, dict, dict]:
    sockets, widgets = {}, {}
    for i in schema.inputs:
        if i.widget:
            widgets[i.id] = i.default if i.default is not None or not i.options else i.options[0]
            if i.control_after_generate:
                widgets[i.id + ":" + SEED] = "fixed"
        else:
            sockets[i.id] = i.io_type + "?" * bool(i.optional)
    return sockets, widgets, {o.display_name: o.io_type for o in schema.outputs}


def text(graph: dict) -> str:
    """JSON with a node or a link on each line."""
    lines = []
    for key, value in graph.items():
        if isinstance(value, (list, dict)) and key in ("nodes", "links", "groups"):
            inside = ",\n  ".join(json.dumps(v, ensure_ascii=False) for v in value)
            lines.append(f" {json.dumps(key)}: [\n  {inside}\n ]" if value else f" {json.dumps(key)}: []")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"
