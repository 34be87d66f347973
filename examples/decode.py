"""Decode a list of prompts, all together.

python examples/decode.py models/mine
"""

import sys

from serve import LLM, SamplingParams

PROMPTS = ["import os\n", "def main(", "class "]

llm = LLM(sys.argv[1])
params = SamplingParams(max_new_tokens=32, temperature=0.8, top_p=0.9, n=2, seed=1)
for result in llm.generate(PROMPTS, params):
    for completion in result.outputs:
        print(repr(result.prompt), repr(completion.text), completion.finish_reason)
