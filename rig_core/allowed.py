"""The names that a pickle may mention. They are only ever compared: nothing of them is imported or called."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .opcodes import Refused

STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}
NAMES = {
    "collections.OrderedDict",
    "collections.defaultdict",
    "builtins.dict",
    "builtins.object",
    "builtins.set",
    "builtins.frozenset",
    "builtins.bytes",
    "builtins.bytearray",
    "copyreg._reconstructor",
    "copyreg.__newobj__",
    "_codecs.encode",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.core.numeric._frombuffer",
    "torch.Size",
    "torch.device",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage._load_from_bytes",
    "torch.nn.backends.thnn._get_thnn_function_backend",  # an attribute of modules before PyTorch 1.2
    *STORAGES,
}
CHUMPY = {"chumpy.ch.Ch", "chumpy.reordering.Select"}
SPARSE = {  # the modules have been renamed, the classes have got a twin
    f"scipy.sparse.{module}{kind}.{kind}_{form}": kind
    for module in ("", "_")
    for kind in ("csc", "csr", "coo")
    for form in ("matrix", "array")
}
RECORDS = {  # a network pickled whole, beside its optimiser
    "torch.nn.parallel.data_parallel.DataParallel",
    "torch.nn.modules.activation.PReLU",
    "torch.nn.modules.activation.Sigmoid",
    "torch.nn.modules.batchnorm.BatchNorm1d",
    "torch.nn.modules.batchnorm.BatchNorm2d",
    "torch.nn.modules.container.Sequential",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.dropout.Dropout",
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.pooling.AdaptiveAvgPool2d",
    "torch.nn.modules.pooling.MaxPool2d",
    "models.ResNet",
    "models.IRBlock",
    "models.SEBlock",
    "models.ArcMarginModel",
    "optimizer.InsightFaceOptimizer",
    "torch.optim.adam.Adam",
    "torch.optim.sgd.SGD",
}
MADE = RECORDS | CHUMPY | SPARSE.keys()  # classes whose objects become records of their attributes
INERT = "pytorch_lightning.callbacks."  # classes whose names are keys of old Lightning checkpoints
RENAMED = {
    "numpy._core.": "numpy.core.",
    "__builtin__.": "builtins.",
    "copy_reg.": "copyreg.",
    "torch.cuda.": "torch.",
}


@dataclass(frozen=True, slots=True)
class Name:
    """A global that the pickle mentions; only ever compared."""

    name: str


def allowed(name: str) -> Name:
    """Raises Refused with a name that is not on the list."""
    for old, new in RENAMED.items():
        name = new + name[len(old) :] if name.startswith(old) else name
    if name not in NAMES and name not in MADE and not name.startswith(INERT):
        raise Refused(f"'{name}'")
    return Name(name)
