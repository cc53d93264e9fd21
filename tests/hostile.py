"""Parts of hostile files."""

import io
import pickle
import zipfile
from collections import OrderedDict

import numpy as np
import torch


class Call:
    """Pickles as a call of f(*args)."""

    def __init__(self, f, *args):
        self.call = f, args

    def __reduce__(self):
        return self.call


def archive(path, data_pkl, members=(), compression=zipfile.ZIP_STORED):
    """A file like torch.save's around any pickle."""
    with zipfile.ZipFile(path, "w", compression) as z:
        z.writestr("archive/data.pkl", data_pkl)
        for name, data in members:
            z.writestr(f"archive/{name}", data)
    return path


def storage_pickle(count, shape, stride=None, offset=0, key="0"):
    """A pickle of one float tensor with these claims about its storage."""
    buffer = io.BytesIO()

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, obj):
            return ("storage", torch.FloatStorage, key, "cpu", count) if isinstance(obj, Storage) else None

    stride = stride or tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))
    call = Call(torch._utils._rebuild_tensor_v2, Storage(), offset, shape, stride, False, OrderedDict())
    Pickler(buffer, 2).dump({"a": call})
    return buffer.getvalue()
