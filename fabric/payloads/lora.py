"""LoRA adapters as data: PEFT's two files read strictly, and the one file we keep of them.

An adapter is, for some linear layers, two factors and a scale: the layer's weight becomes
``W + scale * up @ down``. Nothing of an upload is believed: every shape is checked against the
configuration, and reading allocates no more than a small multiple of what came.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from fabric.errors import AdapterInvalid, PayloadError
from fabric.payloads.codec import Bounds, RawTensor, decode, encode, read_safetensors

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_RANK = 512
MAX_CONFIG_BYTES = 2**20

_FORMAT = "lora/1"
_PREFIX = "base_model.model."
_TENSOR = re.compile(r"(?P<layer>[A-Za-z0-9_.]{1,256})\.lora_(?P<side>[AB])\.weight")
_PATTERN = re.compile(r"\^?[A-Za-z0-9_.]{1,256}")
_EXPONENTS = {"F32": ("<u4", 0x7F800000), "F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80)}
"""By type: how numpy reads it as integers, and the bits that only infinities and NaN have all."""

_INFORMATIVE = frozenset(
    {
        *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "lora_dropout", "fan_in_fan_out", "megatron_core", "runtime_config"),
        *("exclude_modules", "layers_to_transform", "layers_pattern", "qalora_group_size"),
    }
)
"""Fields that say nothing about what is computed from the tensors."""
_READ = frozenset(
    {
        *("peft_type", "r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"),
        *("use_rslora", "bias", "init_lora_weights"),
    }
)
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")
"""Initialisations that leave the model's own weights as they were."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraLayer:
    """What one layer's weight [outputs, inputs] gets: ``scale * up @ down``.

    ``down`` has the shape [rank, inputs], ``up`` [outputs, rank].
    """

    down: RawTensor
    up: RawTensor
    scale: float

    @property
    def rank(self) -> int:
        """The inner size of the two factors."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """An adapter: its layers by their names in the model."""

    layers: Mapping[str, LoraLayer]

    @property
    def rank(self) -> int:
        """The largest rank of a layer."""
        return max(layer.rank for layer in self.layers.values())

    def to_bytes(self) -> bytes:
        """Return the adapter as one file; the same adapter gives the same bytes."""
        layers = {
            name: {"down": layer.down, "up": layer.up, "scale": layer.scale}
            for name, layer in self.layers.items()
        }
        return encode({"format": _FORMAT, "layers": layers})


def digest_of(data: bytes) -> str:
    """Return ``blake3:<hex>`` of an adapter's one file."""
    from blake3 import blake3  # the SDK reads adapters without it

    return f"blake3:{blake3(data).hexdigest()}"


def read_lora(name: str, data: bytes) -> Lora:
    """Return the adapter that ``Lora.to_bytes`` wrote.

    Args:
        name: What errors call it.
        data: The file.

    Raises:
        AdapterInvalid: It is not such a file.
    """
    refuse = _Refusal(name)
    try:
        value = decode(data)
    except PayloadError as error:
        raise refuse(f"its file cannot be read ({error.message})") from error
    match value:
        case {"format": "lora/1", "layers": {**layers}} if layers:
            named = cast("dict[str, object]", layers)
            read = {layer: _read_layer(refuse, layer, of) for layer, of in named.items()}
            return Lora(layers=read)
    raise refuse(f"its file is not of the format {_FORMAT}")


def read_peft(name: str, config: bytes, weights: bytes) -> Lora:
    """Return the adapter that PEFT's files describe.

    Args:
        name: What errors call it.
        config: ``adapter_config.json``.
        weights: ``adapter_model.safetensors``.

    Raises:
        AdapterInvalid: It is not plain LoRA of linear layers, the files contradict each other or
            themselves, or a number is not finite.
    """
    refuse = _Refusal(name)
    fields = _read_config(refuse, config)
    try:
        tensors = read_safetensors(weights, Bounds(), metadata=None)
    except PayloadError as error:
        raise refuse(f"{WEIGHTS_FILE} cannot be read ({error.message})") from error
    sides: dict[str, dict[str, RawTensor]] = {}
    for tensor_name, tensor in tensors.items():
        found = _TENSOR.fullmatch(tensor_name.removeprefix(_PREFIX))
        if found is None or not tensor_name.startswith(_PREFIX):
            raise refuse(
                f"{WEIGHTS_FILE} has the tensor {tensor_name[:128]!r}, which is no factor of a"
                " linear layer; train with LoRA of linear layers alone"
            )
        sides.setdefault(found["layer"], {})[found["side"]] = tensor
    _check_targets(refuse, fields["target_modules"], sides)
    layers = {}
    for layer, of in sides.items():
        if len(of) != 2:
            raise refuse(f"the layer {layer} has only one of its factors lora_A and lora_B")
        rank = _pick(fields["rank_pattern"], layer, fields["r"])
        alpha = _pick(fields["alpha_pattern"], layer, fields["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if fields["use_rslora"] else rank)
        layers[layer] = LoraLayer(down=of["A"], up=of["B"], scale=scale)
        _check_layer(refuse, layer, layers[layer])
        if layers[layer].rank != rank:
            raise refuse(
                f"the layer {layer} has rank {layers[layer].rank} in {WEIGHTS_FILE}, and {rank} in"
                f" {CONFIG_FILE}"
            )
    return Lora(layers=layers)


class _Refusal:
    """Makes the error of one adapter."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, reason: str) -> AdapterInvalid:
        return AdapterInvalid(adapter=self._name, reason=reason)


# ---- the configuration ---------------------------------------------------------------------------


def _read_config(refuse: _Refusal, data: bytes) -> dict[str, Any]:
    """Return the fields that count, each of its type and in its bounds."""
    if len(data) > MAX_CONFIG_BYTES:
        raise refuse(f"{CONFIG_FILE} has {len(data)} bytes, over the {MAX_CONFIG_BYTES} allowed")
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refuse(f"{CONFIG_FILE} cannot be read ({error})") from error
    if not isinstance(fields, dict):
        raise refuse(f"{CONFIG_FILE} is not a JSON object")
    if fields.get("peft_type") != "LORA":
        raise refuse(f"its peft_type is {_shown(fields.get('peft_type'))}; only LORA is served")
    for key, value in fields.items():
        if key not in _INFORMATIVE | _READ and value not in (None, False, [], {}):
            raise refuse(
                f"{CONFIG_FILE} sets {key[:64]} to {_shown(value)}, which is not served; train"
                " plain LoRA of linear layers without it"
            )
    if fields.get("bias", "none") != "none":
        raise refuse(f"it trains biases ({_shown(fields['bias'])}); train with bias='none'")
    start = fields.get("init_lora_weights", True)
    if not any(start is one or start == one for one in _HARMLESS_STARTS):
        raise refuse(
            f"init_lora_weights is {_shown(start)}, which changes the model's own weights; save it"
            " with path_initial_model_for_weight_conversion, as plain LoRA"
        )
    rank, alpha = fields.get("r"), fields.get("lora_alpha", 8)
    return {
        "r": _check_rank(refuse, "r", rank),
        "lora_alpha": _check_alpha(refuse, "lora_alpha", alpha),
        "use_rslora": bool(fields.get("use_rslora")),
        "target_modules": fields.get("target_modules"),
        "rank_pattern": {
            key: _check_rank(refuse, f"rank_pattern[{key}]", value)
            for key, value in _read_patterns(refuse, fields, "rank_pattern").items()
        },
        "alpha_pattern": {
            key: _check_alpha(refuse, f"alpha_pattern[{key}]", value)
            for key, value in _read_patterns(refuse, fields, "alpha_pattern").items()
        },
    }


def _read_patterns(refuse: _Refusal, fields: Mapping[str, Any], name: str) -> dict[str, object]:
    patterns = fields.get(name) or {}
    if not isinstance(patterns, dict):
        raise refuse(f"{name} is {_shown(patterns)} and not an object")
    for key in patterns:
        # A stranger's regular expression could take for ever.
        if not _PATTERN.fullmatch(key):
            raise refuse(
                f"{name} has {_shown(key)}, a regular expression; name modules by their (last)"
                " names alone"
            )
    return cast("dict[str, object]", patterns)


def _pick(patterns: Mapping[str, Any], layer: str, default: Any) -> Any:
    """Return the value for a layer: of the first pattern that is its name or the end of it.

    Source: peft.utils.other.get_pattern_key.
    """
    for pattern, value in patterns.items():
        if pattern.startswith("^"):
            if layer == pattern[1:]:
                return value
        elif layer == pattern or layer.endswith(f".{pattern}"):
            return value
    return default


def _check_rank(refuse: _Refusal, what: str, value: object) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise refuse(f"{what} is {_shown(value)}; a rank is a whole number from 1 to {MAX_RANK}")
    return value


def _check_alpha(refuse: _Refusal, what: str, value: object) -> float:
    if type(value) not in (int, float) or not abs(cast("float", value)) <= 1e6:
        raise refuse(f"{what} is {_shown(value)}; it is a number up to 1e6")
    return float(cast("float", value))


def _check_targets(refuse: _Refusal, targets: object, layers: Mapping[str, object]) -> None:
    """Refuse a file that lacks a whole kind of layer: it was cut, or is another adapter's."""
    if not layers:
        raise refuse(f"{WEIGHTS_FILE} has no tensors")
    if isinstance(targets, list):
        for target in targets:
            if not isinstance(target, str) or not any(
                layer == target or layer.endswith(f".{target}") for layer in layers
            ):
                raise refuse(
                    f"target_modules has {_shown(target)}, of which {WEIGHTS_FILE} has no tensor"
                )
    elif targets is not None and not isinstance(targets, str):
        raise refuse(f"target_modules is {_shown(targets)} and not a list of names")


# ---- layers --------------------------------------------------------------------------------------


def _read_layer(refuse: _Refusal, name: str, of: object) -> LoraLayer:
    match of:
        case {"down": RawTensor() as down, "up": RawTensor() as up, "scale": int() | float() as s}:
            layer = LoraLayer(down=down, up=up, scale=float(s))
            _check_layer(refuse, name, layer)
            return layer
    raise refuse(f"the layer {name[:256]} is not two factors and a scale")


def _check_layer(refuse: _Refusal, name: str, layer: LoraLayer) -> None:
    down, up = layer.down, layer.up
    if (
        len(down.shape) != 2
        or len(up.shape) != 2
        or down.shape[0] != up.shape[1]
        or not 1 <= down.shape[0] <= MAX_RANK
    ):
        raise refuse(
            f"the factors of the layer {name} have the shapes {list(down.shape)} and"
            f" {list(up.shape)}; they are [r, inputs] and [outputs, r], r at most {MAX_RANK}"
        )
    for tensor in (down, up):
        if tensor.dtype not in _EXPONENTS:
            raise refuse(
                f"the factors of the layer {name} are {tensor.dtype}; save them as one of"
                f" {', '.join(_EXPONENTS)}"
            )
        if not _is_finite(tensor):
            raise refuse(f"the factors of the layer {name} have a number that is not finite")


def _is_finite(tensor: RawTensor) -> bool:
    import numpy as np  # the SDK reads adapters without it

    integers, exponent = _EXPONENTS[tensor.dtype]
    bits = np.frombuffer(tensor.data, integers) & exponent
    return not bool((bits == exponent).any())


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
