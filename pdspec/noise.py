"""Gumbel noise as a pure function of (seed, sample, position, target token id).

One Philox4x32-10 block (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") per (seed, sample,
position) gives a key; a short 32-bit mix of the key and the token id gives h[v]; then

    u = (h + 1/2) 2^-32,   e = -log(1 - u),   g = -log e          (float32)

The integers are the same on every machine (test vectors are committed). The floats come from numpy alone, whose
elementwise results do not depend on where an element stands, so noise at some ids is the full vector gathered there.
"""

from __future__ import annotations

from functools import cache

import numpy as np
import numpy.typing as npt
import torch

_MASK = 0xFFFFFFFF
_PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
_MIX_1, _MIX_2 = np.uint32(0x85EBCA6B), np.uint32(0xC2B2AE35)  # the finaliser of MurmurHash3
_GOLDEN = np.uint32(0x9E3779B1)
LARGEST = 22.88  # no g is above it: -log(-log(1 - 2^-33)) = 22.874
_LARGEST_U = np.float32(1.0 - 2.0**-24)  # the float32 next below 1: h near 2^32 would round to 1 and log(0)

Words = npt.NDArray[np.uint32]


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox4x32 with 10 rounds: four 32-bit words of ``counter`` under two of ``key``."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        low_product = _PHILOX_MULTIPLIERS[0] * c0
        high_product = _PHILOX_MULTIPLIERS[1] * c2
        c0, c1, c2, c3 = (
            (high_product >> 32) ^ c1 ^ k0, high_product & _MASK, (low_product >> 32) ^ c3 ^ k1, low_product & _MASK
        )
        k0, k1 = (k0 + _PHILOX_WEYL[0]) & _MASK, (k1 + _PHILOX_WEYL[1]) & _MASK
    return c0, c1, c2, c3


def noise_key(seed: int, sample: int, position: int) -> tuple[int, int]:
    """The 64-bit key of one position as two words. ``seed`` is taken modulo 2^64; position and sample are >= 0."""
    counter = (position & _MASK, position >> 32, sample & _MASK, sample >> 32)
    first, second, _, _ = philox4x32(counter, (seed & _MASK, (seed >> 32) & _MASK))
    return first, second


def token_words(seed: int, sample: int, position: int, token_ids: npt.NDArray[np.integer]) -> Words:
    """h, uint32: the integer part of the noise at *target* token ids (any order, any number)."""
    return _mix(noise_key(seed, sample, position), _premixed(token_ids.astype(np.uint32)))


def gumbel(seed: int, sample: int, position: int, token_ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
    """g at *target* token ids, float32, finite."""
    return _gumbel(token_words(seed, sample, position, token_ids))


def gumbel_all(seed: int, sample: int, position: int, vocab_size: int) -> npt.NDArray[np.float32]:
    """g at ids 0..vocab_size-1, float32 [V]; faster than naming the ids."""
    return _gumbel(_mix(noise_key(seed, sample, position), _premixed_vocabulary(vocab_size)))


def gumbel_noise(
    seed: int, sample: int, position: int, token_ids: torch.Tensor | None = None, vocab_size: int | None = None
) -> torch.Tensor:
    """g as a float32 CPU tensor: of the target ids in ``token_ids`` (integer [N], how a reduced draft vocabulary asks),
    or of all of ``vocab_size``. The first is the second gathered at those ids, bit for bit."""
    if (token_ids is None) == (vocab_size is None):
        raise ValueError("gumbel_noise takes either token_ids or vocab_size")
    if vocab_size is not None:
        return torch.from_numpy(gumbel_all(seed, sample, position, vocab_size))
    assert token_ids is not None
    return torch.from_numpy(gumbel(seed, sample, position, token_ids.cpu().numpy()))


def _premixed(ids: Words) -> Words:
    """The part of the mix that does not depend on the key; a bijection of 32-bit ids."""
    words = ids * _GOLDEN
    words ^= words >> np.uint32(15)
    words *= _MIX_1
    return words


@cache
def _premixed_vocabulary(vocab_size: int) -> Words:
    words = _premixed(np.arange(vocab_size, dtype=np.uint32))
    words.flags.writeable = False
    return words


def _mix(key: tuple[int, int], premixed: Words) -> Words:
    """Two keyed rounds of xor, shift and multiply: a bijection of the premixed ids for every key."""
    words = premixed ^ np.uint32(key[0])
    shifted = words >> np.uint32(16)
    words ^= shifted
    words *= _MIX_1
    words ^= np.uint32(key[1])
    np.right_shift(words, np.uint32(13), out=shifted)
    words ^= shifted
    words *= _MIX_2
    np.right_shift(words, np.uint32(16), out=shifted)
    words ^= shifted
    return words


def _gumbel(words: Words) -> npt.NDArray[np.float32]:
    """g of h. log(1 - u) by Kahan's correction: with w = 1 - u rounded, log(w) * u / (1 - w), and u where w is 1;
    small u, the noise that wins, keeps its full precision."""
    u = words.astype(np.float32)
    u += np.float32(0.5)
    u *= np.float32(2.0**-32)
    np.minimum(u, _LARGEST_U, out=u)
    w = np.float32(1.0) - u
    rounded_u = np.float32(1.0) - w  # exact
    tiny = rounded_u == 0.0
    np.log(w, out=w)
    w *= u
    with np.errstate(invalid="ignore"):
        w /= rounded_u
    np.negative(u, out=w, where=tiny)
    np.negative(w, out=w)  # e
    np.log(w, out=w)
    return np.negative(w, out=w)
