"""The English strings of the nodes, out of their schemas: `python -m tests.write_locales` writes locales/en/.

A translation has the same keys; tests/test_locales.py says what one lacks.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LOCALES = ROOT / "locales"


def node_defs(schemas: dict) -> dict:
    """nodeDefs.json of the host: titles, descriptions, labels and tooltips. schemas: node id -> Schema."""
    return {
        node_id: {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {i.id: {"name": i.id, "tooltip": i.tooltip} for i in schema.inputs},
            "outputs": {
                str(k): {"name": o.display_name, "tooltip": o.tooltip} for k, o in enumerate(schema.outputs)
            },
        }
        for node_id, schema in sorted(schemas.items())
    }


def categories(schemas: dict) -> dict:
    """main.json of the host: the menus that the nodes stand in, and the title over our templates.

    The host knows the templates by the pack's folder: that of a clone, or of the registry.
    """
    parts = {part for s in schemas.values() for part in s.category.split("/")}
    return {
        "nodeCategories": {part: part for part in sorted(parts)},
        "templateWorkflows": {"category": {"face_rig": "Face Rig", "face-rig": "Face Rig"}},
    }


def text(strings: dict) -> str:
    return json.dumps(strings, ensure_ascii=False, indent=1) + "\n"


def main() -> None:
    from tests.node_pack import Pack

    (LOCALES / "en").mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as monkeypatch, tempfile.TemporaryDirectory() as folder:
        pack = Pack(monkeypatch, Path(folder))
        schemas = {k: n.define_schema() for k, n in pack.nodes.items()}
        for name, strings in (("nodeDefs", node_defs(schemas)), ("main", categories(schemas))):
            (LOCALES / "en" / f"{name}.json").write_text(text(strings), encoding="utf-8")


if __name__ == "__main__":
    main()
