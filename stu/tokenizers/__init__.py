"""Kinds of tokenizers, registered in `stu.tokenizer.TOKENIZERS`."""
