"""Tensors and objects on the wire, and files by digest.

A *payload* is JSON whose leaves may also be tensors or bytes. ``codec`` writes one as a safetensors
file, ``PayloadStore`` keeps it where another process can fetch it by a ``Reference``, ``pack`` and
``unpack`` choose between the two, and ``replicate`` brings the files of a model version to a site.
Nothing here pickles. ::

    envelope = pack(value, cap_bytes=limit, store=store)   # JSON: the value itself, or {"$ref": …}
    value = unpack(envelope, [store])
"""

from fabric.config import EndpointStore, FileStore, RedisStore, StoreConfig
from fabric.payloads.codec import Bounds, RawTensor, decode, encode
from fabric.payloads.envelope import pack, unpack
from fabric.payloads.manifest import FileSource, Manifest
from fabric.payloads.replicate import replicate
from fabric.payloads.store import PayloadStore, Reference

__all__ = [
    "Bounds",
    "EndpointStore",
    "FileSource",
    "FileStore",
    "Manifest",
    "PayloadStore",
    "RawTensor",
    "RedisStore",
    "Reference",
    "StoreConfig",
    "decode",
    "encode",
    "pack",
    "replicate",
    "unpack",
]
