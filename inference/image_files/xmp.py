"""The XMP packet of an image: that it was generated, and for WebP the recipe."""

from __future__ import annotations

import re
from xml.sax.saxutils import escape, unescape

from inference.image_files.recipe import DIGITAL_SOURCE_TYPE

_SOURCE_TYPES = "http://cv.iptc.org/newscodes/digitalsourcetype/"
_PACKET = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">
<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about=""
 xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:tokenloom="urn:tokenloom:1.0/"
 Iptc4xmpExt:DigitalSourceType="{source_type}">{recipe}
</rdf:Description>
</rdf:RDF>
</x:xmpmeta>
<?xpacket end="w"?>"""
_RECIPE = re.compile(r"<tokenloom:recipe>([^<]*)</tokenloom:recipe>")


def xmp_packet(recipe_json: str | None = None) -> str:
    """Return a packet that says that the image was generated, with a recipe's JSON if given."""
    recipe = ""
    if recipe_json is not None:
        recipe = f"\n<tokenloom:recipe>{escape(recipe_json)}</tokenloom:recipe>"
    return _PACKET.format(source_type=_SOURCE_TYPES + DIGITAL_SOURCE_TYPE, recipe=recipe)


def recipe_in_xmp(packet: bytes) -> str | None:
    """Return the recipe's JSON of a packet; None if there is none.

    A search, no parser of XML: a packet of strangers may hold entities that expand without end.
    """
    found = _RECIPE.search(packet.decode("utf-8", "replace"))
    return None if found is None else unescape(found[1])
