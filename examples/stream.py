"""Stream a completion from a server with the `openai` client.

stu-serve models/mine
python examples/stream.py http://127.0.0.1:8000/v1
"""

import sys

from openai import OpenAI

client = OpenAI(base_url=sys.argv[1], api_key="none")
model = client.models.list().data[0].id
stream = client.completions.create(
    model=model, prompt="import os\n", max_tokens=32, temperature=0.8, seed=1, stream=True
)
for chunk in stream:
    print(chunk.choices[0].text, end="", flush=True)
print(f"\n[{chunk.choices[0].finish_reason}]")
