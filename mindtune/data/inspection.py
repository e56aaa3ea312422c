"""What decoding an image shows."""

from __future__ import annotations

from typing import NamedTuple, Optional

from mindtune.data.image_problems import describe_problem
from mindtune.data.image_sample import Sample, content_digest
from mindtune.data.images import Visibility, decode, flatten, has_single_colour, measure_visibility


class Inspection(NamedTuple):
    """What decoding an image shows.

    size: upright (width, height) in pixels; None if the image cannot be decoded.
    problem: why the image cannot be used; None if it can.
    animated: the image has more than one frame.
    is_dark: 16-bit gray without a value above 255, which is nearly black.
    single_colour_on: of a condition image, the backgrounds on which it has a single colour.
    visibility: of a transparent condition image.
    digests: the hash of the image on each background that it may be put on; see `Sample.digest`.
    brightest: the largest gray value, 0 to 255; None if it is not known.
    """

    size: Optional[tuple[int, int]] = None
    problem: Optional[str] = None
    animated: bool = False
    is_dark: bool = False
    single_colour_on: tuple[str, ...] = ()
    visibility: Optional[Visibility] = None
    digests: Optional[dict[str, str]] = None
    brightest: Optional[int] = None


def inspect(sample: Sample, condition: bool = False) -> Inspection:
    """Decodes the whole image of a sample. `condition`: it is a condition image."""
    content = None
    try:
        content = sample.read()
        image = decode(content)
        visibility = measure_visibility(image) if condition else None
        backgrounds = ("white", "black") if visibility else (sample.background,)
        flattened = {background: flatten(image, background) for background in backgrounds}
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error ...
        return Inspection(problem=describe_problem(error, content))
    single_colour_on = [name for name, found in flattened.items() if condition and has_single_colour(found)]
    if single_colour_on and not visibility:  # an opaque image looks the same on every background
        single_colour_on = ["white", "black"]
    return Inspection(
        size=image.size,
        animated=image.info["animated"],
        is_dark=image.mode.startswith("I") and 0 < image.getextrema()[1] < 256,
        single_colour_on=tuple(single_colour_on),
        visibility=visibility,
        brightest=flattened[backgrounds[0]].convert("L").getextrema()[1],
        digests={name: content_digest(content, name) for name in (("white", "black") if condition else ("white",))},
    )
