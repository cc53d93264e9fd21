"""The oldest ComfyUI that the pack works in. Imported before anything else of the host, by both __init__.py.

An older one gets one line that says so: it shows what the pack's entry point raises without a traceback.
"""

from __future__ import annotations

import re

FLOOR = (0, 3, 64)
NEEDED = ("io", "ui", "ComfyExtension")  # of comfy_api.latest


def lacking() -> str:
    """What this ComfyUI lacks for the pack, as a sentence for its user; "" for nothing."""
    found, missing = _version(), _missing()
    if found and _numbers(found) < FLOOR:
        missing = missing or "it is older"
    if not missing:
        return ""
    here = f"this is v{found}" if found else "this is another or an unknown version"
    floor = ".".join(map(str, FLOOR))
    return f"Face Rig needs ComfyUI v{floor} or newer, {here} ({missing}): update ComfyUI and restart it"


def _version() -> str:
    try:
        from comfyui_version import __version__
    except ImportError:
        return ""
    return str(__version__)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def _missing() -> str:
    try:
        from comfy_api import latest
    except ImportError as e:
        return str(e)
    names = [name for name in NEEDED if not hasattr(latest, name)]
    return f"comfy_api.latest has no {', '.join(names)}" if names else ""


if _LACKING := lacking():
    raise ImportError(_LACKING)
