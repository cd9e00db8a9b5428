"""Find codecs by name, and read which of them a pipeline uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import paci.runtime.transport.codecs
from paci.errors import ConfigError
from paci.families import members, modules_of, read_options
from paci.plan.encoding import NO_CODEC
from paci.runtime.transport.codecs.codec import Codec

CodecSpec = str | Codec | None


@dataclass(frozen=True)
class Codecs:
    """The codecs of a pipeline; None sends tensors as they are.

    Args:
        activation: that of what goes down to the next stage.
        gradient: that of what comes back.
    """

    activation: Codec | None = None
    gradient: Codec | None = None


def codecs() -> dict[str, type[Codec]]:
    """Return every codec class by name, in alphabetical order."""
    return members(modules_of(paci.runtime.transport.codecs), Codec)


def make_codec(spec: str) -> Codec | None:
    """Build a codec from text: ``NAME`` or ``NAME:OPTION=VALUE,...`` (``topk:share=0.05``).

    Return None for ``none``.

    Raises:
        ConfigError: no codec has that name, or it has no such option.
    """
    known = codecs()
    name, _, options = spec.partition(":")
    if spec == NO_CODEC:
        return None
    if name not in known:
        raise ConfigError(
            f"a codec must be one of {', '.join([NO_CODEC, *known])}, got {name!r}; choose one of "
            f"them"
        )
    return known[name](**read_options(known[name], "codec", options))


def make_codecs(spec: CodecSpec | Sequence[CodecSpec]) -> Codecs:
    """Return the codecs of activations and gradients.

    Args:
        spec: one for both, or a pair (activations, gradients): texts as of ``make_codec``, codecs,
            or None. As text, a pair is joined by a plus: ``int8+int4``.

    Raises:
        ConfigError: it is neither, or a text names no codec.
    """
    if isinstance(spec, str):
        spec = spec.split("+")
        spec = spec * 2 if len(spec) == 1 else spec
    elif spec is None or isinstance(spec, Codec):
        spec = (spec, spec)
    if not isinstance(spec, Sequence) or len(spec) != 2:
        raise ConfigError(
            f"codec must be one codec or a pair for activations and gradients, got {spec!r}; "
            f"write it like 'int8' or 'int8+int4'"
        )
    made = [make_codec(each) if isinstance(each, str) else each for each in spec]
    for each in made:
        if not isinstance(each, Codec | None):
            raise ConfigError(
                f"a codec must be a name, a codec or None, got a {type(each).__name__}; write it "
                f"like 'int8:stochastic=all'"
            )
    return Codecs(*made)
