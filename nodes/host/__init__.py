"""All that touches ComfyUI's insides, for the nodes. Only here are comfy.*, folder_paths and server imported.

ComfyUI's pictures are B,H,W,C float 0..1 on the CPU; ours are B,C,H,W. Its nodes run in inference
mode; networks are built and fits are made outside of it, see `gradients`.
"""

from . import floor
from .denoisers import (
    KINDS,
    batches,
    clipped,
    denoiser,
    empty_latent,
    loaded,
    model,
    picture_size,
    sigmas,
)
from .folders import (
    DEFAULT,
    NO_ALBUM,
    add_model_folder,
    album_fingerprint,
    album_names,
    album_path,
    fetch_entry,
    fetch_model,
    meant,
    missing_model,
    model_fingerprint,
    model_folders,
    model_names,
    model_path,
    models_fingerprint,
    new_model_path,
    offered_names,
    run_path,
)
from .images import (
    check_pictures,
    chunks,
    data_url,
    few,
    image,
    joined,
    mask,
    mask_pictures,
    pictures,
    radiance,
    repeat,
    slices,
)
from .networks import deca, encoder, estimator, face_finder, face_model, inside, loaded_estimator, together
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
from .temporary import temporary
from .texts import check_prefix, check_text, read_text, save_text, text_fingerprint, text_names
from .video import Film, write_video
