"""The log-mel spectrogram of Whisper, in NumPy.

Axes: T samples, F frames, B frequency bins, M mel bands.
"""

from __future__ import annotations

import numpy as np

# Slaney's scale: mels are a third of 200 Hz each up to 1000 Hz, the 15th; from there 27 mels are a factor of 6.4.
_HZ_A_MEL = 200 / 3
_BREAK_HZ = 1000.0
_BREAK_MEL = _BREAK_HZ / _HZ_A_MEL
_MELS_A_FOLD = 27 / np.log(6.4)
# Energies below this count as this.
FLOOR = 1e-10
# So many frames are worked off at a time: a spectrum takes many times the memory of its samples.
BLOCK = 4096


def hz_to_mel(hz: np.ndarray) -> np.ndarray:
    """Frequencies on Slaney's mel scale."""
    above = _BREAK_MEL + np.log(np.maximum(hz, _BREAK_HZ) / _BREAK_HZ) * _MELS_A_FOLD
    return np.where(hz < _BREAK_HZ, hz / _HZ_A_MEL, above)


def mel_to_hz(mel: np.ndarray) -> np.ndarray:
    """The inverse of `hz_to_mel`."""
    above = _BREAK_HZ * np.exp((np.maximum(mel, _BREAK_MEL) - _BREAK_MEL) / _MELS_A_FOLD)
    return np.where(mel < _BREAK_MEL, mel * _HZ_A_MEL, above)


def mel_filters(bins: int, bands: int, sampling_rate: int, highest: float = 8000.0) -> np.ndarray:
    """Triangles [B, M] whose corners are even in mels from 0 Hz to the highest frequency, of equal area.

    Args:
        bins: frequency bins of the spectrum, 0 Hz to half the sampling rate.
        bands: mel bands.
        sampling_rate: samples a second.
        highest: where the last triangle ends, in Hz.
    """
    frequencies = np.linspace(0, sampling_rate // 2, bins)[:, None]
    ends = hz_to_mel(np.array([0.0, highest]))
    corners = mel_to_hz(np.linspace(ends[0], ends[1], bands + 2))
    left, middle, right = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies - left) / (middle - left)
    falling = (right - frequencies) / (right - middle)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (right - left))


def log_mel(wave: np.ndarray, filters: np.ndarray, n_fft: int, hop_length: int) -> np.ndarray:
    """The log-mel spectrogram [M, F] of a recording [T], F = T // hop_length, float32.

    Frames stand around their sample, the recording mirrored at both ends; the last frame is left out. What is more than
    80 dB below the loudest is raised to that, and all is scaled to about -1..1.
    """
    half = n_fft // 2
    mirrored = np.pad(wave.astype(np.float64), half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, n_fft)[::hop_length][:-1]
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)  # Hann's, periodic
    energies = np.empty((len(frames), filters.shape[1]))
    for start in range(0, len(frames), BLOCK):
        part = slice(start, start + BLOCK)
        energies[part] = np.abs(np.fft.rfft(frames[part] * window, axis=-1)) ** 2 @ filters
    levels = np.log10(np.maximum(energies, FLOOR)).T
    levels = np.maximum(levels, levels.max() - 8)
    return ((levels + 4) / 4).astype(np.float32)
