"""The Merkle tree of RFC 6962: hashes, the growing edge, proofs and their verification. No storage, no signatures.

A leaf's hash is SHA-256(0x00 ‖ bytes), an inner node's SHA-256(0x01 ‖ left ‖ right): without the prefixes, an inner
node could be passed off as a leaf. A tree of n leaves splits at the largest power of two below n, so what lies left of
the edge never changes when leaves are added, and the hashes of complete subtrees can be stored once and for ever.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256

__all__ = ["consistent", "included"]

EMPTY_ROOT = sha256(b"").digest()

# Only every eighth level of inner nodes is stored: one row for 256 leaves, and at most 255 hashes to find any other.
STORED_LEVELS = 8

Range = tuple[int, int]


def leaf_hash(data: bytes) -> bytes:
    """The hash of an entry."""
    return sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    """The hash of an inner node."""
    return sha256(b"\x01" + left + right).digest()


@dataclass(frozen=True, slots=True)
class Node:
    """A complete subtree: the `position`-th of those with 2^level leaves."""

    level: int
    position: int
    hash: bytes


class Frontier:
    """The growing edge of a tree: the hashes of the complete subtrees that its size consists of, the largest first.

    Args:
        size: the number of leaves that are there already.
        peaks: the hashes of the subtrees that `subtrees(0, size)` names.
    """

    __slots__ = ("_peaks", "size")

    def __init__(self, size: int = 0, peaks: Iterable[bytes] = ()) -> None:
        self.size = size
        self._peaks = list(peaks)

    def append(self, leaf: bytes) -> list[Node]:
        """Add a leaf by its hash; the nodes that it completes and that are to be stored."""
        position, level, value = self.size, 0, leaf
        completed: list[Node] = []
        while position & 1:
            value = node_hash(self._peaks.pop(), value)
            position >>= 1
            level += 1
            if level % STORED_LEVELS == 0:
                completed.append(Node(level, position, value))
        self._peaks.append(value)
        self.size += 1
        return completed

    def root(self) -> bytes:
        """The tree's hash."""
        return fold(self._peaks)


def fold(peaks: Sequence[bytes]) -> bytes:
    """The hash of a tree that consists of these complete subtrees, the largest first."""
    if not peaks:
        return EMPTY_ROOT
    value = peaks[-1]
    for peak in reversed(peaks[:-1]):
        value = node_hash(peak, value)
    return value


def perfect(hashes: Sequence[bytes]) -> bytes:
    """The hash above a power of two of neighbouring nodes."""
    row = list(hashes)
    while len(row) > 1:
        row = [node_hash(row[place], row[place + 1]) for place in range(0, len(row), 2)]
    return row[0]


def subtrees(low: int, high: int) -> list[tuple[int, int]]:
    """The complete subtrees, as (level, position), that the leaves [low, high) consist of, from left to right."""
    found: list[tuple[int, int]] = []
    while low < high:
        level = (low & -low).bit_length() - 1 if low else (high - low).bit_length() - 1
        level = min(level, (high - low).bit_length() - 1)
        found.append((level, low >> level))
        low += 1 << level
    return found


def _split(count: int) -> int:
    return 1 << ((count - 1).bit_length() - 1)


def inclusion_ranges(index: int, size: int) -> list[Range]:
    """The ranges of leaves whose hashes prove that leaf `index` is in the tree of `size`, from the leaf upwards."""
    _within(index, size)
    ranges: list[Range] = []
    low, high = 0, size
    while high - low > 1:
        middle = low + _split(high - low)
        if index < middle:
            ranges.append((middle, high))
            high = middle
        else:
            ranges.append((low, middle))
            low = middle
    ranges.reverse()
    return ranges


def consistency_ranges(old: int, new: int) -> list[Range]:
    """The ranges of leaves whose hashes prove that the tree of `old` leaves is a beginning of the tree of `new`."""
    if not 0 <= old <= new:
        msg = f"there is no consistency proof from {old} to {new} leaves"
        raise ValueError(msg)
    if old in (0, new):
        return []
    ranges: list[Range] = []
    low, high, left_edge = 0, new, True
    while high != old:
        middle = low + _split(high - low)
        if old <= middle:
            ranges.append((middle, high))
            high = middle
        else:
            ranges.append((low, middle))
            low = middle
            left_edge = False
    if not left_edge:
        ranges.append((low, high))
    ranges.reverse()
    return ranges


def included(leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> bool:
    """Whether `proof` shows that a leaf of this hash is at `index` of the tree with `size` leaves and this root."""
    if not 0 <= index < size:
        return False
    here, last, value = index, size - 1, leaf
    for sibling in proof:
        if last == 0:
            return False
        if here & 1 or here == last:
            value = node_hash(sibling, value)
            # At the right edge some levels have no sibling: climb past them.
            while here and not here & 1:
                here >>= 1
                last >>= 1
        else:
            value = node_hash(value, sibling)
        here >>= 1
        last >>= 1
    return last == 0 and value == root


def consistent(old: int, new: int, proof: Sequence[bytes], old_root: bytes, new_root: bytes) -> bool:
    """Whether `proof` shows that the tree of `old` leaves is a beginning of the tree of `new` leaves."""
    if old > new or old < 0:
        return False
    if old == new:
        return not proof and old_root == new_root
    if old == 0:
        return not proof and old_root == EMPTY_ROOT
    hashes = list(proof)
    if old & (old - 1) == 0:
        hashes.insert(0, old_root)  # the old tree is itself one of the subtrees
    if not hashes:
        return False
    here, last = old - 1, new - 1
    while here & 1:
        here >>= 1
        last >>= 1
    old_value = new_value = hashes[0]
    for sibling in hashes[1:]:
        if last == 0:
            return False
        if here & 1 or here == last:
            old_value = node_hash(sibling, old_value)
            new_value = node_hash(sibling, new_value)
            while here and not here & 1:
                here >>= 1
                last >>= 1
        else:
            new_value = node_hash(new_value, sibling)
        here >>= 1
        last >>= 1
    return last == 0 and old_value == old_root and new_value == new_root


def _within(index: int, size: int) -> None:
    if not 0 <= index < size:
        msg = f"there is no leaf {index} in a tree of {size}"
        raise ValueError(msg)
