"""Whole sequences into samples of a fixed length, as a function of their lengths alone.

Best fit, longest first: each sequence goes into the fullest sample that still has room for it, and
opens a new one where none has.  For lengths of conversations this leaves a few thousandths of the
tokens as padding, and it is never worse than 11/9 of the fewest samples possible (Johnson 1973).
Equal lengths are taken in the order that they are given in, so that the packing is a pure function.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def pack(lengths: IntArray, capacity: int) -> tuple[IntArray, IntArray]:
    """Put sequences of `lengths` [n], each 1 .. capacity, into samples of `capacity` tokens.

    Returns `members` int64 [n], the sequences' numbers sample by sample, and `ends` int64
    [samples], where each sample's members end in it.
    """
    if len(lengths) and not 1 <= int(lengths.min()) <= int(lengths.max()) <= capacity:
        raise ValueError(f"lengths {lengths.min()}..{lengths.max()} and a capacity of {capacity}")
    samples: list[list[int]] = []
    open_at: list[list[int]] = [[] for _ in range(capacity + 1)]  # by the room that is left
    rooms = 0  # bit r: some sample has room for r more tokens
    for number in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[number])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            sample = open_at[room].pop()
            if not open_at[room]:
                rooms &= ~(1 << room)
            samples[sample].append(number)
        else:
            room, sample = capacity, len(samples)
            samples.append([number])
        left = room - length
        if left:
            open_at[left].append(sample)
            rooms |= 1 << left
    members = np.array([number for sample in samples for number in sample], dtype=np.int64)
    return members, np.cumsum([len(sample) for sample in samples], dtype=np.int64)
