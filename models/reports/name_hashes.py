"""64-bit hashes of many names at once, as NumPy columns."""
import numpy as np

GOLDEN_RATIO = 0x9E3779B97F4A7C15       # SplitMix64's increment: 2**64 / golden ratio


def splitmix64(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser of x (n,) uint64: every output bit depends on every input bit.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_names(text: np.ndarray, starts: np.ndarray, ends: np.ndarray, seed: int) -> np.ndarray:
    """Hashes (n,) uint64 of the names text[starts:ends].

    text (m,) uint8 must have at least 8 more bytes after the last name; starts and ends are
    (n,) int64.
    """
    words = np.ndarray(len(text) - 7, "<u8", text, strides=(1,))    # 8 bytes from each position on
    lengths = (ends - starts).astype(np.uint64)
    hashes = splitmix64(lengths + np.uint64(seed * GOLDEN_RATIO % (1 << 64)))
    active, cursor = np.arange(len(starts)), starts.copy()
    while len(active := active[cursor[active] < ends[active]]):
        n_bytes = np.minimum(ends[active] - cursor[active], 8).astype(np.uint64)
        mask = np.uint64(0xFFFFFFFFFFFFFFFF) >> (np.uint64(64) - n_bytes * np.uint64(8))
        word = words[cursor[active]] & mask
        hashes[active] = splitmix64(hashes[active] ^ word) + np.uint64(GOLDEN_RATIO)
        cursor[active] += 8
    return splitmix64(hashes)


def hash_name(name: bytes, seed: int) -> np.uint64:
    """hash_names of a single name."""
    text = np.frombuffer(name + bytes(8), np.uint8)
    return hash_names(text, np.array([0]), np.array([len(name)]), seed)[0]
