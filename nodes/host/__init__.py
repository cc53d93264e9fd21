"""All that touches ComfyUI's insides, for the nodes. Only here are comfy.*, folder_paths and server imported.

ComfyUI's pictures are B,H,W,C float 0..1 on the CPU; ours are B,C,H,W. Its nodes run in inference
mode; networks are built and fits are made outside of it, see `gradients`.
"""

from .folders import (
    DEFAULT,
    NO_ALBUM,
    add_model_folder,
    album_fingerprint,
    album_names,
    album_path,
    model_fingerprint,
    model_folders,
    model_names,
    model_path,
    models_fingerprint,
    new_model_path,
    run_path,
)
from .images import chunks, few, image, mask, mask_pictures, pictures, repeat, slices
from .networks import (
    KINDS,
    batches,
    deca,
    denoiser,
    estimator,
    face_model,
    loaded,
    loaded_estimator,
    model,
    picture_size,
)
from .running import (
    Progress,
    device,
    end_prompt,
    gradients,
    head,
    make_room,
    own_random_numbers,
    result,
    say,
    stop_pressed,
    warn,
)
