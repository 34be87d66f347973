"""Ranks files of tiktoken: byte-level BPE in the layouts of o200k_base, cl100k_base and others.

tokenizer.tiktoken         a line for each token: its bytes in Base64, and its id, which is its rank
tokenizer.tiktoken.json    what the ranks leave open (`LAYOUTS`): split pattern, special tokens, BOS
                           and EOS. A ranks file NAME.tiktoken may go without if NAME is a layout's.

Nothing is ever downloaded.
"""

import base64
import binascii
import json
import re
from pathlib import Path
from typing import Any

from stu.common.errors import UserError, requires_extra
from stu.tokenizer import Tokenizer, Vocabulary
from stu.tokenizers.special_tokens import MOST_IDS, blank_tokens, marks, read_json, token_ids

ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
LOWER, UPPER = r"\p{Ll}\p{Lm}\p{Lo}\p{M}", r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}"
O200K_PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]*[{LOWER}]+{ENDINGS}",
        rf"[^\r\n\p{{L}}\p{{N}}]?[{UPPER}]+[{LOWER}]*{ENDINGS}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
CL100K_PATTERN = "|".join(
    [
        r"'(?i:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?+\p{L}++",
        r"\p{N}{1,3}+",
        r" ?[^\s\p{L}\p{N}]++[\r\n]*+",
        r"\s++$",
        r"\s*[\r\n]",
        r"\s+(?!\S)",
        r"\s",
    ]
)
END = "<|endoftext|>"
LAYOUTS: dict[str, dict[str, Any]] = {
    "o200k_base": {
        "pattern": O200K_PATTERN,
        "special_tokens": {END: 199999, "<|endofprompt|>": 200018},
        "bos_token": END,
        "eos_token": END,
    },
    "cl100k_base": {
        "pattern": CL100K_PATTERN,
        "special_tokens": {
            END: 100257,
            "<|fim_prefix|>": 100258,
            "<|fim_middle|>": 100259,
            "<|fim_suffix|>": 100260,
            "<|endofprompt|>": 100276,
        },
        "bos_token": END,
        "eos_token": END,
    },
}
"""Contents of the JSON file for the published ranks, by the name of their file. Their models read
END before each document, and nothing after it."""
SETTINGS_SUFFIX = ".json"
MOST_SPACES = 1 << 19
"""Longest run of white space that is encoded at once: tiktoken panics on those of a million."""
LONG_SPACE = re.compile(r"\s{64,}")


class TiktokenTokenizer(Tokenizer):
    """A ranks file, encoded by the tiktoken library."""

    file_name = "tokenizer.tiktoken"
    other_files = (file_name + SETTINGS_SUFFIX,)

    @classmethod
    def read_files(cls, path: Path) -> dict[str, bytes]:
        """See `Tokenizer.read_files`."""
        settings = path.with_name(path.name + SETTINGS_SUFFIX)
        if settings.is_file():
            contents = settings.read_bytes()
        elif path.stem in LAYOUTS:
            contents = settings_file(LAYOUTS[path.stem])
        else:
            raise UserError(
                message=f"tokenizer {path}: its split pattern and special tokens are not known: "
                f"name it {' or '.join(f'{name}.tiktoken' for name in LAYOUTS)} if it is one of "
                f"those, or write them to {settings}"
            )
        return {cls.file_name: path.read_bytes(), cls.file_name + SETTINGS_SUFFIX: contents}

    def _load(self) -> Vocabulary:
        with requires_extra("tokenizers"):
            import tiktoken
        ranks = _read_ranks(self.files[self.file_name], self.path)
        settings_path = self.path.with_name(self.path.name + SETTINGS_SUFFIX)
        settings = self.files.get(self.file_name + SETTINGS_SUFFIX)
        if settings is None:
            raise UserError(message=f"tokenizer {settings_path}: no such file")
        values = read_json(settings, settings_path)
        special = token_ids(values, "special_tokens", settings_path)
        pattern = values.get("pattern")
        if not isinstance(pattern, str):
            raise UserError(message=f"tokenizer {settings_path}: pattern must be an expression")
        ids = [*ranks.values(), *special.values()]
        if len(set(ids)) < len(ids):
            raise UserError(message=f"tokenizer {settings_path}: two tokens have the same id")
        try:
            self._encoding = tiktoken.Encoding(
                self.path.name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
            )
        except ValueError as error:
            reason = f"pattern is not an expression ({error})"
            raise UserError(message=f"tokenizer {settings_path}: {reason}") from error
        token_bytes = blank_tokens(ids, self.path)
        for symbol, token in ranks.items():
            token_bytes[token] = symbol
        return Vocabulary(
            token_bytes,
            {token: name for name, token in special.items()},
            list(special.values()),
            *marks(values, special, settings_path),
        )

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        text.encode()  # tiktoken would replace half of a surrogate pair
        encode = self._encoding.encode_ordinary
        if len(text) <= MOST_SPACES:
            return encode(text)
        ids: list[int] = []
        start = 0
        for run in LONG_SPACE.finditer(text):
            for stop in range(run.start() + MOST_SPACES, run.end(), MOST_SPACES):
                ids += encode(text[start:stop])
                start = stop
        return ids + encode(text[start:])


def settings_file(settings: dict[str, Any]) -> bytes:
    """Return the contents of the JSON file beside a ranks file."""
    return (json.dumps(settings, indent=2, ensure_ascii=False) + "\n").encode()


def _read_ranks(contents: bytes, path: Path) -> dict[bytes, int]:
    """Return the rank of each token. Raises UserError, naming the line."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(contents.splitlines(), 1):
        parts = line.split()
        if not parts:
            continue
        try:
            symbol, rank = base64.b64decode(parts[0], validate=True), int(parts[1])
        except (IndexError, ValueError, binascii.Error) as error:
            reason = "a token in Base64 and a number are needed"
            raise UserError(message=f"tokenizer {path} line {number}: {reason}") from error
        if not symbol or symbol in ranks or not 0 <= rank < MOST_IDS:
            reason = "the token is empty or listed twice, or its rank is negative"
            reason += f" or above {MOST_IDS - 1}"
            raise UserError(message=f"tokenizer {path} line {number}: {reason}")
        ranks[symbol] = rank
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        reason = f"no token for byte {missing[0]}; not a whole ranks file of tiktoken"
        raise UserError(message=f"tokenizer {path}: {reason}")
    return ranks
