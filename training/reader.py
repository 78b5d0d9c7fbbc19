"""Reads the shards of torch.distributed.checkpoint without running what someone planted in them.

Two parts of them are pickles, and a pickle can name any function of Python and have it called: `.metadata`, the list
of what is where, and values that are no tensors, such as a learning rate. torch reads both without looking. Here the
first may name the classes below and nothing else, and the second goes through torch's own `weights_only` unpickler,
as tensors do.
"""

import pickle

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint._nested_dict import set_element
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

METADATA = "torch.distributed.checkpoint.metadata"
ALLOWED = {  # all that `.metadata` of torch 2.11 and 2.13 names; classes that hold values and do nothing
    ("collections", "OrderedDict"),
    ("pathlib", "Path"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # its name in Python 3.13
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *((METADATA, name) for name in ("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata")),
    *((METADATA, name) for name in ("ChunkStorageMetadata", "TensorProperties", "StorageMeta")),
    (METADATA, "_MEM_FORMAT_ENCODING"),
}


class ListUnpickler(pickle.Unpickler):
    """Raises UnpicklingError for every name that is not allowed, before it is looked up."""

    def find_class(self, module, name):
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not dtype and (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint of this project has in it")
        return super().find_class(module, name)


class Reader(FileSystemReader):
    def read_metadata(self, *args, **kwargs) -> Metadata:
        with self.fs.create_stream(self.fs.concat_path(self.path, ".metadata"), "rb") as file:
            found = ListUnpickler(file).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError(".metadata is not a list of shards")
        for info in (found.storage_data or {}).values():
            if "/" in info.relative_path:
                raise pickle.UnpicklingError(f"it names {info.relative_path}, outside of the checkpoint")
        found.storage_meta = found.storage_meta or StorageMeta()
        found.storage_meta.load_id = self.load_id
        return found


class Planner(DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        name = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, name, torch.load(value, weights_only=True))
