"""Tokenizers of every kind as a tokenizer.json that gives the same ids.

Ids are compared on texts in several scripts, on odd spaces and on random tokens; a tokenizer with
other ids is not converted. The names of special tokens alone differ: transformers finds them in
texts, where they are plain text here.
"""

import json
import random
import re
from collections.abc import Iterator
from importlib import import_module
from typing import Any

from stu.common.errors import UserError, requires_extra, show
from stu.tokenizer import Tokenizer
from stu.tokenizers.tiktoken_ranks import CL100K_PATTERN
from stu.tokenizers.token_decoding import BYTE_OF

FILE = "tokenizer.json"
MARK = "\u2581"
CHARACTER_OF = {byte: character for character, byte in BYTE_OF.items()}
CL100K_FOR_ONIGURUMA = "|".join(
    [
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)
"""The pattern of cl100k_base without possessive quantifiers, which tokenizers reads differently."""
TEXTS = [
    "The quick brown fox, it's 12,345.67 (or 8%)?\n\tdef f(x):\r\n        return x + 1\n\n\n",
    "  two spaces before and after  ",
    "Grüße, élève, e\u0301, ﬁ, Å, ｆｕｌｌ, ½, привет, 東京の夜, مرحبا, שלום, हिन्दी, ไทย 👩‍👩‍👧 🇩🇪",
    "\x00\x01\x7f\ufeff\u00a0\u2028\u2581 <0x0A> \u200d",
    "a",
    " ",
    "\n",
]
RANDOM_TEXTS, RANDOM_TOKENS = 8, 200


class NotExact(Exception):
    """A tokenizer has no tokenizer.json of the same ids."""


def tokenizer_json(tokenizer: Tokenizer) -> bytes:
    """Return a tokenizer.json that gives the ids of `tokenizer`, with BOS before a text.

    Raises NotExact if there is none, and UserError if a library is missing.
    """
    with requires_extra("tokenizers"):
        import tokenizers
    if FILE in tokenizer.files:
        contents = tokenizer.files[FILE]
        made = tokenizers.Tokenizer.from_buffer(contents)
        if made.encode("").ids != tokenizer.start_ids:
            described = json.loads(contents)
            described["post_processor"] = _post_processor(tokenizer)
            contents = _dump(described)
    else:
        described = _described(tokenizer)
        described["post_processor"] = _post_processor(tokenizer)
        contents = _dump(described)
    try:
        made = tokenizers.Tokenizer.from_buffer(contents)
    except Exception as error:  # the library raises nothing more exact
        raise NotExact(f"tokenizers {tokenizers.__version__} cannot read it: {error}") from error
    _require_equal(tokenizer, made)
    return contents


def _described(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the contents of the tokenizer.json, without its post-processor."""
    if "tokenizer.tiktoken" in tokenizer.files:
        return _of_ranks(tokenizer, json.loads(tokenizer.files["tokenizer.tiktoken.json"]))
    if "alphabet.json" in tokenizer.files:
        return _of_alphabet(tokenizer, json.loads(tokenizer.files["alphabet.json"]))
    if "tokenizer.model" in tokenizer.files:
        return _of_sentence_piece(tokenizer)
    raise NotExact(f"tokenizers of {', '.join(tokenizer.files)} have none")


def _of_ranks(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    control = set(tokenizer.control_tokens().values())
    ids = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)]
    ranks = {tokenizer.token_bytes(i): i for i in ids if i not in control}
    merges = [
        [_characters(left), _characters(right)]
        for symbol in sorted(ranks, key=ranks.__getitem__)
        for left, right in _cuts(symbol, ranks)
    ]
    pattern = settings["pattern"]
    if pattern == CL100K_PATTERN:
        pattern = CL100K_FOR_ONIGURUMA
    model = {
        "type": "BPE",
        "vocab": {_characters(symbol): rank for symbol, rank in ranks.items()},
        "merges": merges,
        "ignore_merges": True,
    }
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    steps = {"type": "Sequence", "pretokenizers": [split, _byte_level()]}
    return _file(model, _special(tokenizer), None, steps, _byte_level())


def _of_alphabet(tokenizer: Tokenizer, settings: dict[str, Any]) -> dict[str, Any]:
    if settings["alphabet"] == "bytes":
        vocab = {_characters(bytes([byte])): byte for byte in range(256)}
        model: dict[str, Any] = {"type": "BPE", "vocab": vocab, "merges": []}
        return _file(model, _special(tokenizer), None, _byte_level(), _byte_level())
    unknown = settings.get("unknown_token")
    vocab = dict(settings["alphabet"])
    # Without such a token, characters outside the alphabet are refused, as they are here.
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown or ""}
    pattern = {"Regex": "(?m:.)"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    return _file(model, _special(tokenizer), None, split, {"type": "Fuse"})


def _of_sentence_piece(tokenizer: Tokenizer) -> dict[str, Any]:
    messages: Any = import_module("sentencepiece.sentencepiece_model_pb2")  # which needs protobuf
    proto = messages.ModelProto()
    proto.ParseFromString(tokenizer.files["tokenizer.model"])
    pieces, kinds = proto.pieces, messages.ModelProto.SentencePiece
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        raise NotExact("its SentencePiece model is no BPE")
    added = _special(tokenizer)
    added += [
        _added(piece.piece, i, False)
        for i, piece in enumerate(pieces)
        if piece.type == kinds.USER_DEFINED
    ]
    has_bytes = any(piece.type == kinds.BYTE for piece in pieces)
    unknown = next(i for i, piece in enumerate(pieces) if piece.type == kinds.UNKNOWN)
    learned = {piece.piece: i for i, piece in enumerate(pieces) if piece.type == kinds.NORMAL}
    by_score = sorted(learned.items(), key=lambda item: (-pieces[item[1]].score, item[1]))
    model = {
        "type": "BPE",
        "vocab": {piece.piece: i for i, piece in enumerate(pieces)},
        "merges": [pair for piece, _ in by_score for pair in _cuts(piece, learned)],
        "unk_token": pieces[unknown].piece,
        "fuse_unk": True,
        "byte_fallback": has_bytes,
    }
    normalizers: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": " "}, "content": MARK}
    ]
    decoders: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": MARK}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if proto.normalizer_spec.add_dummy_prefix:
        normalizers.insert(0, {"type": "Prepend", "prepend": MARK})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    normalizer = {"type": "Sequence", "normalizers": normalizers}
    return _file(model, added, normalizer, None, {"type": "Sequence", "decoders": decoders})


def _cuts(whole: Any, ids: dict[Any, int]) -> list[list[Any]]:
    """Return the pairs of known tokens that make up `whole`, those of low ids first."""
    cuts = ([whole[:cut], whole[cut:]] for cut in range(1, len(whole)))
    known = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
    return sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))


def _file(
    model: dict[str, Any],
    added: list[dict[str, Any]],
    normalizer: dict[str, Any] | None,
    pre_tokenizer: dict[str, Any] | None,
    decoder: dict[str, Any],
) -> dict[str, Any]:
    for token in added:  # or they would get the next free ids
        model["vocab"].setdefault(token["content"], token["id"])
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": sorted(added, key=lambda token: token["id"]),
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }


def _special(tokenizer: Tokenizer) -> list[dict[str, Any]]:
    return [_added(name, token, True) for name, token in tokenizer.control_tokens().items()]


def _added(name: str, token: int, special: bool) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token, "content": name, **flags, "special": special}


def _post_processor(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the template that puts BOS, if there is one, before a text, and before a second."""
    sequences = [{"Sequence": {"id": name, "type_id": 0}} for name in "AB"]
    begin: list[dict[str, Any]] = []
    special: dict[str, Any] = {}
    for token in tokenizer.start_ids:
        name = tokenizer.token_text(token)
        begin.append({"SpecialToken": {"id": name, "type_id": 0}})
        special[name] = {"id": name, "ids": [token], "tokens": [name]}
    return {
        "type": "TemplateProcessing",
        "single": [*begin, sequences[0]],
        "pair": [*begin, sequences[0], *begin, sequences[1]],
        "special_tokens": special,
    }


def _byte_level() -> dict[str, Any]:
    settings = {"add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {"type": "ByteLevel", **settings}


def _characters(symbol: bytes) -> str:
    return "".join(CHARACTER_OF[byte] for byte in symbol)


def _dump(described: dict[str, Any]) -> bytes:
    return (json.dumps(described, indent=1, ensure_ascii=False) + "\n").encode()


def _require_equal(tokenizer: Tokenizer, made: Any) -> None:
    """Raise NotExact if `made` gives other ids, or another text for them, than `tokenizer`."""
    for name, token in tokenizer.control_tokens().items():
        if made.token_to_id(name) != token:
            raise NotExact(f"the id of {show(name)} would differ")
    names = [re.escape(name) for name in tokenizer.control_tokens()]
    special = re.compile("|".join(names)) if names else None
    for text in _texts(tokenizer):
        if special is not None and special.search(text):
            continue
        try:
            ids = tokenizer.encode_prompt(text)
        except UserError:  # not of this alphabet
            continue
        found = made.encode(text)
        if found.ids != ids:
            raise NotExact(f"the ids of {show(text[:40])} would differ")
        if made.decode(ids) != tokenizer.decode(ids):
            raise NotExact(f"the tokens of {show(text[:40])} would give another text")


def _texts(tokenizer: Tokenizer) -> Iterator[str]:
    yield from TEXTS
    source = random.Random(0)
    with_text = [i for i in range(tokenizer.vocab_size) if tokenizer.token_bytes(i)]
    for _ in range(RANDOM_TEXTS):
        yield tokenizer.decode(source.choices(with_text, k=RANDOM_TOKENS))
