"""Reading and writing clips. PyAV, Pillow and NumPy (``tvkernels[video]``) load on first use."""

from tvkernels.video._audio import Audio
from tvkernels.video._decode import CLIPS
from tvkernels.video._encode import OUTPUTS
from tvkernels.video._files import VideoError, atomic_path, check_output
from tvkernels.video.io import Video, read_video, write_video
from tvkernels.video.masks import read_mask
from tvkernels.video.pictures import contact_sheet

__all__ = [
    "CLIPS",
    "OUTPUTS",
    "Audio",
    "Video",
    "VideoError",
    "atomic_path",
    "check_output",
    "contact_sheet",
    "read_mask",
    "read_video",
    "write_video",
]
