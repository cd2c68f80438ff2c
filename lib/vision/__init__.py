"""Images in, arrays out: what stands before a vision model."""

from formax.vision.image_processor import ImageProcessor

__all__ = ["ImageProcessor"]
