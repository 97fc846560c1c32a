"""Byte-level BPE in arrays: a text cut into words as GPT-2 does, and the ids of words that were seen before.

A byte-level BPE cuts a text into words by a regular expression, and merges the bytes of each word for themselves. So
the ids of a text are those of its words, one after the other, and nearly all words of a text stood in it before. Here
comparisons of arrays find the cuts, and a hash table the ids; only new words go to the library.

    cache = WordCache(Split(), ranks, encode_words)
    cache.encode(["Hello world", "Hello"])     # [array([15496, 995]), array([15496])]

Nothing is approximate: what these rules can't decide is left to the caller, as a None.
"""

import functools
import itertools
import re
import threading
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# Classes of characters. UNKNOWN: versions of Unicode differ, or the character is no text.
OTHER, LETTER, NUMBER, SPACE, END, UNKNOWN = range(6)

WHITE_SPACE = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]")  # Unicode's property
N_CLASSIFIED = 0x20000  # code points of the first two planes; beyond them are rare ideographs
ASCII_LENGTH = 128

KEY_BYTES = 16  # a word's own bytes are its key in the table; longer ones are new each time
SLOT_BITS = 20
MAX_ENTRIES = 2**19
MAX_IDS = 2**21

# A word of n bytes leaves these bits of the two halves of its key.
LOW_MASK = np.array([2 ** (8 * min(n, 8)) - 1 for n in range(KEY_BYTES + 1)], dtype=np.uint64)
HIGH_MASK = np.array([2 ** (8 * max(n - 8, 0)) - 1 for n in range(KEY_BYTES + 1)], dtype=np.uint64)

SEPARATOR = "\n"  # between texts; its place is known, so texts may hold it
NO_TOKEN = 2**30  # ids from here on are no tokens
WORD_SEPARATOR = "\0"  # between words that the library encodes; a text that holds it is left to the caller

EncodeWords = Callable[[str], np.ndarray]  # of words separated by WORD_SEPARATOR, which is a token of its own


class Split(NamedTuple):
    """GPT-2's cuts, whose pattern is `model_tokenizers.GPT2_SPLIT`, and what differs from them."""

    single_digits: bool = False  # each number is a word, and a space before it is another


# ---------------------------------------------------------------------------------------------------------------------
# characters


def char_class(char: str) -> int:
    """The class of a character that all versions of Unicode since 3.2 agree on, else UNKNOWN."""
    category = unicodedata.category(char)
    if char == WORD_SEPARATOR or category in ("Cn", "Cs"):  # unassigned, and half of a pair
        return UNKNOWN
    old = unicodedata.ucd_3_2_0.category(char)
    if (category[0] in "LN" or old[0] in "LN") and category[0] != old[0]:
        return UNKNOWN
    if WHITE_SPACE.match(char):
        return SPACE
    return {"L": LETTER, "N": NUMBER}.get(category[0], OTHER) if char != "\u180e" else UNKNOWN  # a space until 6.3


@functools.cache
def class_table() -> np.ndarray:
    """(N_CLASSIFIED + 1,): the class of each code point; the last entry stands for all points beyond."""
    return np.array([*map(char_class, map(chr, range(N_CLASSIFIED))), UNKNOWN], dtype=np.uint8)


@functools.cache
def ascii_classes() -> bytes:
    """The same for the bytes of a text in ASCII."""
    return bytes(map(char_class, map(chr, range(ASCII_LENGTH)))).ljust(256, bytes([UNKNOWN]))


class Characters(NamedTuple):
    """A text by its characters."""

    points: np.ndarray  # (n,) the numbers of the characters
    classes: np.ndarray  # (n,)
    byte_offsets: np.ndarray | None  # (n,) of the characters in UTF-8; None if each is a byte

    @classmethod
    def of(cls, text: str, data: bytes) -> "Characters":
        """data: the text in UTF-8."""
        if len(data) == len(text):
            return cls(np.frombuffer(data, np.uint8), np.frombuffer(data.translate(ascii_classes()), np.uint8), None)
        points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
        widths = np.ones(len(points), dtype=np.uint8)
        for first_wider in (2**7, 2**11, 2**16):
            widths += points >= first_wider
        ends = np.cumsum(widths, dtype=np.int64)
        return cls(points, class_table().take(points, mode="clip"), ends - widths)


def word_starts(points: np.ndarray, classes: np.ndarray, split: Split) -> np.ndarray:
    """(n,) whether a word begins at each character, of at least one."""
    n = len(points)
    padded = np.zeros(n + 3, dtype=bool)
    starts = padded[:n]

    # 1. Words are runs of one class.
    starts[0] = True
    np.not_equal(classes[1:], classes[:-1], out=starts[1:])
    before_word = starts[1:] & (classes[:-1] == SPACE) & (classes[1:] != END)
    if split.single_digits:
        is_number = classes == NUMBER
        starts |= is_number
        before_word &= ~is_number[1:]

    # 2. The last white space before a word is for itself; a space is the beginning of that word.
    starts[:-1] |= before_word
    starts[1:] &= ~(before_word & (points[:-1] == ord(" ")))

    # 3. 's, 't, 'm, 'd, 're, 've and 'll are words where no other sign and no space stands before them.
    quotes = np.flatnonzero(points == ord("'"))
    quotes = quotes[starts[quotes] & (quotes < n - 1)]
    first, second = points[quotes + 1], points.take(quotes + 2, mode="clip")
    is_short = np.isin(first, list(b"stmd"))
    ends_in_e = np.isin(first, list(b"rv")) & (second == ord("e"))
    is_long = (ends_in_e | ((first == ord("l")) & (second == ord("l")))) & (quotes < n - 2)
    for found, length in ((is_short, 2), (is_long, 3)):
        padded[quotes[found] + 1] = False
        padded[quotes[found] + length] = True
    return starts


# ---------------------------------------------------------------------------------------------------------------------
# words


class Words(NamedTuple):
    """The words of a text, and the keys of those that have one."""

    data: bytes  # the text in UTF-8, and KEY_BYTES zeros
    starts: np.ndarray  # (n,) in bytes
    lengths: np.ndarray  # (n,)
    low: np.ndarray  # (n,) the first 8 bytes
    high: np.ndarray  # (n,) the next 8 bytes
    slots: np.ndarray  # (n,) of the table

    @classmethod
    def of(cls, data: bytes, starts: np.ndarray) -> "Words":
        """data: a text in UTF-8; starts: of its words."""
        lengths = np.diff(starts, append=len(data))
        data += bytes(KEY_BYTES)
        at_each_byte = np.ndarray((len(data) - 7,), dtype="<u8", buffer=data, strides=(1,))
        key_lengths = np.minimum(lengths, KEY_BYTES)
        low = at_each_byte[starts] & LOW_MASK[key_lengths]
        high = at_each_byte[starts + 8] & HIGH_MASK[key_lengths]
        hashes = low * np.uint64(0x9E3779B97F4A7C15) + high * np.uint64(0xC2B2AE3D27D4EB4F)
        slots = (hashes >> np.uint64(64 - SLOT_BITS)).astype(np.int64)
        return cls(data, starts, lengths, low, high, slots)

    def text(self, i: np.ndarray) -> list[bytes]:
        """These words."""
        first = self.starts[i]
        places = zip(first.tolist(), (first + self.lengths[i]).tolist(), strict=True)
        return [self.data[start:stop] for start, stop in places]


class Table:
    """The ids of words. Other threads read while one adds: an entry is never changed, and is found when it is whole.

    A slot holds two entries, the newer one in front: what is found seldom gives way.
    """

    def __init__(self) -> None:
        self.slots = np.zeros((2, 2**SLOT_BITS), dtype=np.int32)  # entry 0 is no word's
        self.low = np.zeros(MAX_ENTRIES, dtype=np.uint64)
        self.high = np.zeros(MAX_ENTRIES, dtype=np.uint64)
        self.first = np.zeros(MAX_ENTRIES, dtype=np.int32)  # of its ids
        self.counts = np.zeros(MAX_ENTRIES, dtype=np.int32)
        self.ids = np.zeros(MAX_IDS, dtype=np.int32)
        self.n_entries = 1
        self.n_ids = 0

    def find(self, words: Words) -> tuple[np.ndarray, np.ndarray]:
        """(n,) the entry of each word, and the indices of those that have none."""
        entries = self.slots[0].take(words.slots)
        missing = np.flatnonzero(~self.are_of(entries, words.low, words.high, words.lengths))
        slots, keys = words.slots[missing], (words.low[missing], words.high[missing], words.lengths[missing])
        older = self.slots[1].take(slots)
        found = self.are_of(older, *keys)
        entries[missing[found]] = older[found]
        return entries, missing[~found]

    def are_of(self, entries: np.ndarray, low: np.ndarray, high: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Whether entries are those of words by their keys."""
        return (self.low.take(entries) == low) & (self.high.take(entries) == high) & (lengths <= KEY_BYTES)

    def has_room(self, n_words: int, n_ids: int) -> bool:
        return self.n_entries + n_words <= MAX_ENTRIES and self.n_ids + n_ids <= MAX_IDS

    def add(self, words: Words, i: np.ndarray, ids: np.ndarray, counts: np.ndarray) -> None:
        """Add the words i, of KEY_BYTES at most, with their ids, one after the other."""
        stop, ids_stop = self.n_entries + len(i), self.n_ids + len(ids)
        new = slice(self.n_entries, stop)
        self.low[new], self.high[new], self.counts[new] = words.low[i], words.high[i], counts
        self.first[new] = self.n_ids + np.cumsum(counts) - counts
        self.ids[self.n_ids : ids_stop] = ids
        slots = words.slots[i]
        self.slots[1][slots] = self.slots[0][slots]
        self.slots[0][slots] = np.arange(new.start, stop)
        self.n_entries, self.n_ids = stop, ids_stop


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """The numbers from each first on, as many as its count, one range after the other."""
    ends = np.cumsum(counts)
    numbers = np.repeat(first - (ends - counts), counts)
    numbers += np.arange(len(numbers))
    return numbers


class WordCache:
    """Texts to ids by the ids of their words. Threads share one."""

    def __init__(self, split: Split, ranks: Mapping[bytes, int], encode_words: EncodeWords) -> None:
        """ranks: the tokens, each of which is the only id of its own text; encode_words gives NO_TOKEN and more for
        what they have no id for."""
        self.split = split
        self.ranks = ranks
        self.encode_words = encode_words
        self.separator_id = int(encode_words(WORD_SEPARATOR)[0])
        self.table = self.new_table()
        self.lock = threading.Lock()

    def new_table(self) -> Table:
        """A table of the tokens."""
        table = Table()
        lengths = np.fromiter(map(len, self.ranks), dtype=np.int64, count=len(self.ranks))
        words = Words.of(b"".join(self.ranks), np.cumsum(lengths) - lengths)
        ids = np.fromiter(self.ranks.values(), dtype=np.int32, count=len(self.ranks))
        fits = np.flatnonzero(lengths <= KEY_BYTES)[: MAX_ENTRIES // 2]
        table.add(words, fits, ids[fits], np.ones(len(fits), dtype=np.int64))
        return table

    def encode(self, texts: Sequence[str]) -> list[np.ndarray] | None:
        """The ids of each text; None where a character is UNKNOWN or has no token, so that the library decides."""
        joined = SEPARATOR.join(texts)
        if not joined:
            return [np.array([], dtype=np.int32) for _ in texts]
        try:
            data = joined.encode()
        except UnicodeEncodeError:
            return None

        # 1. Cut the texts into words; the separators are some of them.
        points, classes, byte_offsets = Characters.of(joined, data)
        if (classes == UNKNOWN).any():
            return None
        ends = np.cumsum([len(text) + 1 for text in texts[:-1]], dtype=np.int64) - 1
        if len(ends):
            classes = classes.copy()
            classes[ends] = END
        is_start = word_starts(points, classes, self.split)
        is_start[ends] = True  # after another separator, too
        starts = np.flatnonzero(is_start)
        separators = np.searchsorted(starts, ends)
        if byte_offsets is not None:
            starts = byte_offsets[starts]

        # 2. Look the words up, and cut their ids at the separators, which have none.
        found = self.look_up(Words.of(data, starts), separators)
        if found is None:
            return None
        ids, counts = found
        stops = [0, *np.cumsum(counts)[separators].tolist(), len(ids)]
        return [ids[start:stop] for start, stop in itertools.pairwise(stops)]

    def look_up(self, words: Words, separators: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """The ids of all words, and how many each has: none for the separators. None if a word has no ids."""
        table = self.table
        entries, missing = table.find(words)
        first, counts = table.first.take(entries), table.counts.take(entries)
        if not len(missing):
            counts[separators] = 0
            return table.ids.take(ranges(first, counts)), counts
        new = self.encode_missing(words, missing)
        if new is None:
            return None
        first[missing] = 0
        counts[missing] = new.counts
        counts[separators] = 0
        ids = table.ids.take(ranges(first, counts))  # of missing words, anything
        stops, counts_missing = np.cumsum(counts)[missing], counts[missing]
        ids[ranges(stops - counts_missing, counts_missing)] = new.ids.take(ranges(new.first, counts_missing))
        return ids, counts

    def encode_missing(self, words: Words, missing: np.ndarray) -> "NewWords | None":
        """The ids of words that are not in the table, which gets them. None if one has none."""
        texts = words.text(missing)
        numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        which = np.fromiter(map(numbers.__getitem__, texts), dtype=np.int64, count=len(texts))
        separator = WORD_SEPARATOR.encode()
        ids = self.encode_words((separator.join(numbers) + separator).decode())
        is_end = ids == self.separator_id
        if (ids[~is_end] >= NO_TOKEN).any():
            return None
        ends = np.flatnonzero(is_end)
        assert len(ends) == len(numbers)
        first = np.concatenate(([0], ends[:-1] + 1))
        counts = ends - first

        occurrence = np.empty(len(numbers), dtype=np.int64)  # of each different word, one of its indices
        occurrence[which] = missing
        has_key = words.lengths[occurrence] <= KEY_BYTES
        own_ids = ids.take(ranges(first[has_key], counts[has_key]))
        with self.lock:
            if not self.table.has_room(len(numbers), len(own_ids)):
                self.table = self.new_table()  # others may still read the old one
            if self.table.has_room(len(numbers), len(own_ids)):
                self.table.add(words, occurrence[has_key], own_ids, counts[has_key])
        return NewWords(ids, first[which], counts[which])


class NewWords(NamedTuple):
    """Ids from the library, and which of them each missing word has."""

    ids: np.ndarray
    first: np.ndarray  # (n missing,)
    counts: np.ndarray  # (n missing,)
