"""Encode documents to tokens in parallel, and decide the split of each."""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from stu.common.errors import UserError
from stu.tokenizer import Tokenizer, read_tokenizer
from train.data.reading.document import Document

BATCH_CHARS = 1 << 18
"""Characters of text sent to a worker at once: some tenths of a second of work."""
PIECE_CHARS = 1 << 18
"""Characters passed to a tokenizer at once, to bound its memory."""


Result = TypeVar("Result")


class Encoded(NamedTuple):
    """Tokens of a document, or of a piece of one."""

    split: str  # "train" or "validation"
    tokens: NDArray[Any]  # [tokens], with those before and after a document; uint16 or uint32
    num_bytes: int  # of UTF-8 text
    starts: bool  # False: continues the document before it
    ends: bool  # False: the next document continues it


def split_of(text: str, seed: int, validation_fraction: float) -> str:
    """Return `train` or `validation`, which depends on text and seed alone."""
    return "validation" if text_hash(text, seed) < validation_fraction else "train"


def text_hash(text: str, seed: int) -> float:
    """Return a number in [0, 1) that is uniformly distributed over texts."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


def encode_batch(
    documents: list[Document], tokenizer_path: Path, seed: int, validation_fraction: float
) -> list[Encoded]:
    """Encode a batch of documents, in a worker.

    Raises UserError, naming the document, if the tokenizer has no tokens for a part of it.
    """
    tokenizer = _load_tokenizer(tokenizer_path)
    encoded = []
    for text, _, path, place, starts, ends in documents:
        try:
            tokens = encode_document(tokenizer, text)
        except UserError as error:
            where = f"{path} {place}".rstrip()
            raise UserError(where, message=f"{where}: {error}") from error
        split = split_of(text, seed, validation_fraction)
        encoded.append(Encoded(split, tokens, len(text.encode()), starts, ends))
    return encoded


def encode_document(tokenizer: Tokenizer, text: str) -> NDArray[Any]:
    """Return `[BOS, *tokens of text, EOS]`, or with fewer marks (`start_ids` and `end_ids` of the
    tokenizer), in the `token_dtype` of the vocabulary."""
    ids = tokenizer.start_ids
    start = 0
    while start < len(text):
        stop = _cut(text, start)
        try:
            ids += tokenizer.encode(text[start:stop])
        except UserError:
            tokenizer.encode(text)  # the error then says where in the whole text
            raise
        start = stop
    ids += tokenizer.end_ids
    return np.array(ids, dtype=token_dtype(tokenizer.vocab_size))


def _cut(text: str, start: int) -> int:
    """Return where a piece of at most `PIECE_CHARS` ends: after a newline that a letter or digit
    follows, where most tokenizers begin a token, else after any newline if there is one."""
    stop = start + PIECE_CHARS
    if stop >= len(text):
        return len(text)
    last = newline = text.rfind("\n", start, stop)
    while newline >= 0 and not text[newline + 1].isalnum():
        newline = text.rfind("\n", start, newline)
    return (newline + 1) or (last + 1) or stop


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return uint16 if it holds every id, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def encode_all(
    documents: Iterable[Document], encoder: Callable[[list[Document]], list[Result]], workers: int
) -> Generator[Result, None, None]:
    """Yield documents encoded by `encoder`, in order, using `workers` processes (1: this one).

    Reads only a few batches ahead. Raises BrokenProcessPool if a worker dies.
    """
    if workers == 1:
        for batch in _batches(documents):
            yield from encoder(batch)
        return
    waiting: deque[Future[list[Result]]] = deque()
    # Not fork, as this process has threads, such as the progress bar's.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_start_worker) as pool:
        try:
            for batch in _batches(documents):
                waiting.append(pool.submit(encoder, batch))
                if len(waiting) > 2 * workers:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    chars = 0
    for document in documents:
        batch.append(document)
        chars += len(document.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@lru_cache(maxsize=1)
def _load_tokenizer(path: Path) -> Tokenizer:
    return read_tokenizer(path)


def _start_worker() -> None:
    # Ctrl-C reaches every process of the terminal, but ending the workers is up to the parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The tokenizers library would start as many threads as there are processors, in each worker.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Exit with the parent, which cannot stop its workers if it is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
