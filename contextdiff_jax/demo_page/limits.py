"""The bounds of what a visitor can send or ask for, one place for all of the page."""

from __future__ import annotations

MAX_TEXT = 1000  # characters of a prompt
MAX_UPLOAD = 10 * 2**20  # bytes of a file
MAX_STROKES = 2 * 2**20  # bytes of a drawn mask
MAX_BODY = MAX_UPLOAD + 2**20  # bytes of any request
MAX_KEPT = 2**30  # bytes of all that the page keeps: uploads, and pictures of the galleries
MAX_PIXELS = 25_000_000  # of a picture, checked before it is decoded: 100 MB in memory
MAX_FRAME_PIXELS = 2_100_000  # of a clip's frame: 1920 x 1080
MAX_CLIP_FRAMES = 300  # of an animation; 256 are decoded to find its rate
EDITED_FRAMES = 8  # of a clip, from its start
MAX_STEPS = 100  # of a sampler
MAX_GUIDANCE = 20.0
MAX_GAIN = 2.0
MAX_TUNING = 100  # steps on a clip
LONGEST = 600  # seconds of one request
WAITING = 16  # requests in the queue
GALLERY = 24  # pictures that a visitor's gallery shows
