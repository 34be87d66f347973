"""Step an engine: add requests while others are decoding, and abort one of them.

python examples/step_an_engine.py models/mine
"""

import sys

import stu
from serve import Engine, Request, SamplingParams

tokenizer = stu.load_tokenizer(sys.argv[1])
engine = Engine(stu.load_model(sys.argv[1]), tokenizer)


def add(prompt: str, **settings: int) -> int:
    return engine.add(Request(tokenizer.encode_prompt(prompt), SamplingParams(**settings)))


texts = {add("import os\n", max_new_tokens=30): "", add("def main(", max_new_tokens=50): ""}
for num_steps in range(1, 1000):
    for output in engine.step():  # one token of each request, or the end of one
        texts[output.request_id] += output.text
        if output.finish_reason is not None:
            print(num_steps, output.finish_reason, repr(texts[output.request_id]))
    if num_steps == 5:
        texts[add("class ", max_new_tokens=10)] = ""
    if num_steps == 10:
        engine.abort(1)
    if not engine.has_work:
        break
