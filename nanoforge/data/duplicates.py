"""Exact duplicates of documents, found by 64-bit hashes of their whole texts, as they stream by.

Memory holds 8 bytes for each document that is kept, in a sorted array, and the newest ninth of them, or million, in a
set of Python's. At the peak, when these are sorted in, that is about 32 bytes a document: 3 GB for a hundred million.
Two different texts have the same hash once in 2^64 pairs: of a hundred million documents, one is dropped though its
text is new, with a chance of 1 in 4,000.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from nanoforge.console import plural
from nanoforge.data.documents import Document, read_chunks

MIN_RECENT = 2**20  # hashes in the set before they are sorted


def hash_document(document: Document) -> int:
    """A hash of the whole text, below 2^64."""
    digest = hashlib.blake2b(digest_size=8)
    for text in read_chunks(document):
        digest.update(text.encode())
    return int.from_bytes(digest.digest(), "big")


class HashSet:
    """A growing set of 64-bit hashes in few bytes each."""

    def __init__(self, min_recent: int = MIN_RECENT) -> None:
        self.min_recent = min_recent
        self.recent: set[int] = set()
        self.older = np.array([], dtype=np.uint64)  # sorted

    def add(self, value: int) -> bool:
        """Add a hash; whether it is new."""
        if value in self.recent or self.is_older(value):
            return False
        self.recent.add(value)
        if len(self.recent) >= max(self.min_recent, len(self.older) // 8):
            newest = np.fromiter(self.recent, dtype=np.uint64, count=len(self.recent))
            self.older = np.sort(np.concatenate((self.older, newest)), kind="stable")
            self.recent.clear()
        return True

    def is_older(self, value: int) -> bool:
        place = int(np.searchsorted(self.older, np.uint64(value)))
        return place < len(self.older) and int(self.older[place]) == value


@dataclass
class Deduplicator:
    """Drops documents that were there before, and counts them. It starts anew with every pass over the corpus."""

    n_documents: dict[str, int] = field(default_factory=dict)  # name of the documents -> how many there were
    n_dropped: dict[str, int] = field(default_factory=dict)
    hashes: HashSet = field(default_factory=HashSet)

    def restart(self) -> None:
        """Forget all, before a pass."""
        self.n_documents, self.n_dropped, self.hashes = {}, {}, HashSet()

    def keep_first(self, documents: Iterable[Document], name: str) -> Iterator[Document]:
        """The documents whose texts have not been there, under this name or one before."""
        self.n_documents[name] = self.n_dropped[name] = 0
        for document in documents:
            self.n_documents[name] += 1
            if self.hashes.add(hash_document(document)):
                yield document
            else:
                self.n_dropped[name] += 1

    def describe(self) -> str:
        """How many documents were dropped, on a line."""
        counts = [
            f"{self.n_dropped[name]:,} of {plural(total, 'document')} of {name}"
            for name, total in self.n_documents.items()
        ]
        return f"--dedup dropped {', '.join(counts)}"
