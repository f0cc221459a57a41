"""Layered neural atlases: a clip as a few pictures, and where each of its pixels lies in them.

A clip's background and each moving object are a layer: an atlas (one RGB picture), a mapping from
the pixels of every frame into it, and for the objects an opacity. `train_atlas` fits them to a
clip, `LayeredAtlas.render` shows it again, and an edit of an atlas is an edit of every frame.

Source: Kasten et al., layered neural atlases (2021); StableVideo, section 3.1.
"""

from tvkernels.atlas.files import AtlasError, load_atlas, save_atlas
from tvkernels.atlas.model import LayeredAtlas
from tvkernels.atlas.train import AtlasSettings, train_atlas

__all__ = [
    "AtlasError",
    "AtlasSettings",
    "LayeredAtlas",
    "load_atlas",
    "save_atlas",
    "train_atlas",
]
