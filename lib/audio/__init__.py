"""Recordings in, arrays out: what stands before a speech model."""

from formax.audio.feature_extractor import FeatureExtractor, Wav2Vec2FeatureExtractor, WhisperFeatureExtractor

__all__ = ["FeatureExtractor", "Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor"]
