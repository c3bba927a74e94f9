"""Chunk bytes <-> stored bytes, without loss. No I/O, no torch; numpy and zstd, which release the GIL.

The idea is that of ZipNN (https://arxiv.org/abs/2411.05239): the exponents of trained numbers are few, their
mantissas are noise. A chunk is cut into units; the numbers of a unit are taken apart into planes (halves.py,
words.py), and each plane is coded by what a sample of it promises (planes.py): not at all, as one repeated byte, as
a zstd frame that does only Huffman coding, or as one that looks for repetitions too (frames.py).
"""

from asyncckpt.codec.coder import Coder
from asyncckpt.codec.layout import Layout, Run

__all__ = ["Coder", "Layout", "Run"]
