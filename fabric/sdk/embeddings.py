"""Texts as vectors: what may be asked, and what comes back."""

from __future__ import annotations

from array import array
from base64 import b64decode
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from sys import byteorder
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict

from fabric.sdk.results import Json, Usage

if TYPE_CHECKING:
    import numpy as np

TEXTS_PER_REQUEST = 256


class EmbedOptions(TypedDict, total=False):
    """Everything a request for embeddings may carry besides its texts.

    Attributes:
        model: ``name`` or ``name@revision``; the one of the settings, or the hub's only one.
        dimensions: What the vectors must have; another model's are refused, never cut.
        pooling: Which hidden states make a vector, if not those the model was made for.
        data_site: The site where the request's data lives.
        data_bytes: The size of that data.
        sites: The only sites that may serve it.
        overflow: Whether it may leave instances of one's own, which keep it otherwise.
        deadline_s: Seconds from admission after which it is given up.
        policy: What the choice of a site should favour.
        tier: How urgent it is.
        adapter: The name of one of the project's adapters.
    """

    model: str | None
    dimensions: int | None
    pooling: Literal["mean", "last"] | None
    data_site: str | None
    data_bytes: int | None
    sites: Sequence[str] | None
    overflow: bool | None
    deadline_s: float | None
    policy: Literal["balanced", "fastest", "cheapest", "local-only"] | None
    tier: Literal["interactive", "standard", "batch"] | None
    adapter: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Embeddings(Sequence[Sequence[float]]):
    """Vectors of length 1, one a text, in the texts' order. ``numpy.asarray`` takes it whole.

    Attributes:
        vectors: float32 numbers, as the model gave them.
        model: The model's catalogued name.
        digest: The digest of its tensors.
        sites: Where they were computed.
        charge_usu: What they cost together, in micro-SU.
        run_ids: Their names in the hub's records, one a text.
    """

    vectors: tuple[array[float], ...] = field(repr=False)
    usage: Usage
    charge_usu: int
    model: str
    digest: str
    sites: tuple[str, ...]
    run_ids: tuple[str, ...] = field(repr=False)

    @classmethod
    def from_replies(cls, replies: Sequence[Json]) -> Self:
        """Read the hub's replies to the parts of one request."""
        ours = [reply["fabric"] for reply in replies]
        return cls(
            vectors=tuple(_unpack(one["embedding"]) for reply in replies for one in reply["data"]),
            usage=Usage(prompt_tokens=sum(reply["usage"]["prompt_tokens"] for reply in replies)),
            charge_usu=sum(one["charge_usu"] for one in ours),
            model=ours[0]["model"],
            digest=ours[0]["digest"],
            sites=tuple(sorted(set(chain.from_iterable(one["sites"] for one in ours)))),
            run_ids=tuple(chain.from_iterable(one["runs"] for one in ours)),
        )

    def to_reply(self) -> dict[str, Any]:
        """Return them as JSON, in the form of the OpenAI API."""
        prompt_tokens = self.usage.prompt_tokens
        return {
            "object": "list",
            "model": self.model,
            "data": [
                {"object": "embedding", "index": index, "embedding": vector.tolist()}
                for index, vector in enumerate(self.vectors)
            ],
            "usage": {"prompt_tokens": prompt_tokens, "total_tokens": prompt_tokens},
            "fabric": {
                "runs": list(self.run_ids),
                "sites": list(self.sites),
                "model": self.model,
                "digest": self.digest,
                "charge_usu": self.charge_usu,
            },
        }

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, index: Any) -> Any:
        return self.vectors[index]

    def __iter__(self) -> Iterator[Sequence[float]]:
        return iter(self.vectors)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        import numpy as np  # only numpy itself calls this

        if copy is False:
            raise ValueError("the vectors of Embeddings cannot be shared, only copied")
        return np.array(self.vectors, dtype=dtype or np.float32)


def build_bodies(texts: Sequence[str], options: EmbedOptions) -> Iterator[dict[str, object]]:
    """Yield the bodies to post.

    Raises:
        TypeError: An option has an unknown name.
        ValueError: There are no texts.
    """
    if unknown := sorted(set(options) - set(EmbedOptions.__annotations__)):
        known = ", ".join(EmbedOptions.__annotations__)
        raise TypeError(f"{unknown[0]!r} is not an option of embeddings; there are {known}")
    if not texts:
        raise ValueError("there are no texts to embed; give at least one")
    given = {name: value for name, value in options.items() if value is not None}
    body: dict[str, object] = {}
    for name in ("model", "dimensions"):
        if name in given:
            body[name] = given.pop(name)
    if given:
        body["fabric"] = given
    for begin in range(0, len(texts), TEXTS_PER_REQUEST):
        some = list(texts[begin : begin + TEXTS_PER_REQUEST])
        yield {"input": some, "encoding_format": "base64", **body}


def _unpack(data: str) -> array[float]:
    numbers = array("f", b64decode(data))
    if byteorder == "big":
        numbers.byteswap()
    return numbers
