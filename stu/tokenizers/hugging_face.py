"""The tokenizer.json of Hugging Face's tokenizers library, and the training of one.

tokenizer.json           all but the names of BOS and EOS
tokenizer_config.json    `bos_token` and `eos_token`, which `add_bos_token: false` leaves out; other
                         fields are not read, and only these two are stored
"""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from stu.common.errors import UserError, requires_extra, show
from stu.tokenizer import Tokenizer, Vocabulary
from stu.tokenizers.document_marks import FIELDS, document_marks
from stu.tokenizers.special_tokens import blank_tokens, read_json
from stu.tokenizers.tiktoken_ranks import O200K_PATTERN
from stu.tokenizers.token_decoding import BYTE_TOKEN, token_decoder

CONFIG_FILE = "tokenizer_config.json"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
UTF8_BYTES = [*range(0xC0), *range(0xC2, 0xF5)]
"""All bytes that UTF-8 may have."""
LEAST_SIZE = 258
"""Size of a trained vocabulary that has nothing but BOS, EOS and the bytes."""


class HuggingFaceTokenizer(Tokenizer):
    """A tokenizer.json, encoded by the tokenizers library.

    BOS and EOS are those of tokenizer_config.json (`stu.tokenizers.document_marks`).
    Special tokens are not found in texts; added tokens that are not special are. The token for
    text that the model does not know is no control token, unless it is BOS or EOS.
    """

    file_name = "tokenizer.json"
    other_files = (CONFIG_FILE,)

    @classmethod
    def read_files(cls, path: Path) -> dict[str, bytes]:
        """See `Tokenizer.read_files`."""
        contents, config_path = path.read_bytes(), path.with_name(CONFIG_FILE)
        config = read_json(config_path.read_bytes(), config_path) if config_path.is_file() else {}
        processor = read_json(contents, path).get("post_processor")
        names = document_marks(config, config_path, processor, path)
        return {cls.file_name: contents, CONFIG_FILE: _config_file(*names)}

    def _load(self) -> Vocabulary:
        with requires_extra("tokenizers"):
            import tokenizers
        contents = self.files[self.file_name]
        try:
            encoder = self._encoder = tokenizers.Tokenizer.from_buffer(contents)
        except Exception as error:  # the library raises nothing more exact
            message = f"tokenizer {self.path}: not a tokenizer.json that tokenizers "
            message += f"{tokenizers.__version__} can read ({error})"
            raise UserError(message=message) from error
        encoder.encode_special_tokens = True  # as the text that their names are
        encoder.no_truncation()
        encoder.no_padding()
        description = read_json(contents, self.path)
        model = description["model"]
        decoder = token_decoder(description.get("decoder"), self.path)
        self._strips_space = decoder.strips_space
        ids, added = encoder.get_vocab(), encoder.get_added_tokens_decoder()
        special = {added[token].content: token for token in added if added[token].special}
        names = {token: name for name, token in special.items()}
        unknown = _unknown_token(model)
        if unknown in ids:
            names[ids[unknown]] = unknown
        token_bytes = blank_tokens(ids.values(), self.path)
        for text, token in ids.items():
            if token not in names:
                token_bytes[token] = text.encode() if token in added else decoder.bytes_of(text)
        self._require_exact(model, decoder.has_bytes, token_bytes)
        marks = read_json(self.files.get(CONFIG_FILE, b"{}"), self.path.with_name(CONFIG_FILE))
        bos_id, eos_id = (self._mark_id(marks.get(field), field, special) for field in FIELDS)
        control = [
            token for name, token in special.items() if name != unknown or token in (bos_id, eos_id)
        ]
        self._control_ids = frozenset(control)
        _divide_names(encoder, model, names.values(), decoder.has_bytes)
        return Vocabulary(token_bytes, names, control, bos_id, eos_id)

    def _mark_id(self, name: Any, field: str, special: Mapping[str, int]) -> int:
        """Return the id of the token that is BOS or EOS, -1 for none. Raises UserError."""
        if name is None:
            return -1
        if not isinstance(name, str) or name not in special:
            place = f"{field} of {CONFIG_FILE}, or else the token that the post-processor adds,"
            allowed = f"one of the special tokens {show([*special])}, not {show(name)}"
            raise UserError(message=f"tokenizer {self.path}: {place} must be {allowed}")
        return special[name]

    def _require_exact(
        self, model: Mapping[str, Any], has_bytes: bool, token_bytes: list[bytes]
    ) -> None:
        """Raise UserError if the model leaves text out, or encodes it differently each time."""
        if dropout := model.get("dropout"):
            message = f"tokenizer {self.path}: its model has dropout={show(dropout)}, with which "
            raise UserError(message=message + "equal texts get different tokens: set it to null")
        if "merges" not in model or model.get("unk_token"):
            return  # models of other types refuse text that they have no tokens for
        known = {symbol[0] for symbol in token_bytes if len(symbol) == 1}
        if has_bytes and not model.get("byte_fallback"):
            known = {byte for byte in known if byte < 0x80}
        if missing := [byte for byte in UTF8_BYTES if byte not in known]:
            reason = f"no token for byte 0x{missing[0]:02x} and no unk_token: its BPE would leave "
            fix = "text out; give one that has all bytes, or an unk_token"
            raise UserError(message=f"tokenizer {self.path}: {reason}{fix}")

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer.encode`."""
        text.encode()  # the library's error for half of a surrogate pair is a TypeError
        try:
            # Offsets, which only `encode` computes, take half as long again.
            (encoding,) = self._encoder.encode_batch_fast([text], add_special_tokens=False)
        except Exception as error:
            if type(error) is not Exception:  # the library raises nothing more exact
                raise
            message = f"the tokenizer has no tokens for a part of the text ({error}): leave it out"
            raise UserError("text", message=message) from error
        ids: list[int] = encoding.ids
        if not self._control_ids.isdisjoint(ids):
            found = next(token for token in ids if token in self._control_ids)
            message = "the tokenizer takes a part of the text for its control token "
            raise UserError("text", message=f"{message}{show(self._names[found])}: leave it out")
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """See `Tokenizer.decode`. A space that the tokenizer puts before texts is left out."""
        text = super().decode(ids)
        return text.removeprefix(" ") if self._strips_space else text


def train_byte_level_bpe(
    texts: Iterable[str], vocab_size: int, folder: Path
) -> HuggingFaceTokenizer:
    """Train a byte-level BPE on `texts` with the tokenizers library, and write it to `folder`.

    Texts are split as for o200k_base. Ids: 0 BOS, 1 EOS, then the 256 bytes and the learned tokens.
    The same texts give the same files. Nothing is written if training fails.

    Raises UserError if there is no text, or naming the limit if `vocab_size` is too large or too
    small for it.
    """
    with requires_extra("tokenizers"):
        import tokenizers
        from tokenizers import decoders, models, pre_tokenizers, processors, trainers
    if vocab_size < LEAST_SIZE:
        raise _wrong_size(vocab_size, "small", "smallest", LEAST_SIZE)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    split = pre_tokenizers.Split(tokenizers.Regex(O200K_PATTERN), "isolated")
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trained.decoder = decoders.ByteLevel()
    trained.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],
        initial_alphabet=byte_level.alphabet(),
        show_progress=False,
    )
    trained.train_from_iterator(texts, trainer)
    size = trained.get_vocab_size()
    if size == LEAST_SIZE < vocab_size:
        raise UserError("vocab_size", message="there is no text to train a tokenizer on")
    if size < vocab_size:
        raise _wrong_size(vocab_size, "large", "largest", size)
    file = folder / HuggingFaceTokenizer.file_name
    files = {file.name: trained.to_str(pretty=True).encode(), CONFIG_FILE: _config_file(BOS, EOS)}
    tokenizer = HuggingFaceTokenizer(files, file)
    tokenizer.save(folder)
    return tokenizer


def _wrong_size(vocab_size: int, fault: str, limit: str, size: int) -> UserError:
    message = (
        f"vocab_size {vocab_size} is too {fault} for this text: the {limit} that works is {size}"
    )
    return UserError("vocab_size", message=message)


def _config_file(bos: str | None, eos: str | None) -> bytes:
    return (json.dumps(dict(zip(FIELDS, (bos, eos), strict=True)), indent=2) + "\n").encode()


def _unknown_token(model: dict[str, Any]) -> str:
    """Return the token for text that a model has no tokens for, or nothing."""
    if isinstance(model.get("unk_id"), int):  # Unigram
        return str(model["vocab"][model["unk_id"]][0])
    return model.get("unk_token") or ""


def _divide_names(
    encoder: Any, model: dict[str, Any], names: Iterable[str], has_bytes: bool
) -> None:
    """Let `encoder` divide the names of tokens after their first character where they are text.

    Its model would take them for these tokens, as it looks up parts of a text, or all of it, in a
    vocabulary that has control tokens and bytes among the others.
    """
    from tokenizers import Regex, pre_tokenizers

    vocabulary = model["vocab"]
    known = {piece[0] for piece in vocabulary} if isinstance(vocabulary, list) else {*vocabulary}
    found = known.intersection(names)
    looks_up = "merges" not in model or model.get("ignore_merges")
    if not looks_up:  # a BPE finds no more than its merges make
        merges = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
        found = found.intersection(map("".join, merges))
    tails: dict[str, list[str]] = {}
    for name in sorted(found):
        if len(name) > 1:
            tails.setdefault(name[0], []).append(re.escape(name[1:]))
    if has_bytes and looks_up:
        tails.setdefault(BYTE_TOKEN.pattern[0], []).append(BYTE_TOKEN.pattern[1:])
    if tails:
        pattern = "|".join(f"{re.escape(key)}(?={'|'.join(tails[key])})" for key in tails)
        steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated")]
        if encoder.pre_tokenizer is not None:
            steps.insert(0, encoder.pre_tokenizer)
        encoder.pre_tokenizer = pre_tokenizers.Sequence(steps)
