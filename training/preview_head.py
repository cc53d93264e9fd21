"""The open head's mean face for the page: `python -m training.preview_head` writes web/heads/open.head.

Edit Face shows it until its own face was fitted. Run it again when the open head changes.
"""

from __future__ import annotations

from pathlib import Path

from rig_core import checkpoints, preview_mesh

PATH = Path(__file__).resolve().parents[1] / "web" / "heads" / "open.head"


def main():
    head = checkpoints.load_head()
    data = preview_mesh.pack(head, head.mean_code(1, 256))
    PATH.parent.mkdir(parents=True, exist_ok=True)
    PATH.write_bytes(data)
    print(f"{PATH}: {len(data)} bytes")


if __name__ == "__main__":
    main()
