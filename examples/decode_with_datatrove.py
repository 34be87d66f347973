"""Decode a folder of JSON lines through a server with datatrove's InferenceRunner.

stu-serve models/mine
python examples/decode_with_datatrove.py http://127.0.0.1:8000 prompts completions

Each line has a "text" and an "id". The same command resumes after a crash: finished documents are
in the checkpoints. The server must be on this machine, or reached through a tunnel, as datatrove
0.10 uses other paths for servers on other hosts. Needs `pip install '.[datatrove]'`
in the checkout.
"""

import json
import sys
from urllib.request import urlopen

from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.inference.run_inference import InferenceConfig, InferenceRunner
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter

url, source, target = sys.argv[1:4]
with urlopen(f"{url}/v1/models") as answer:
    model = json.load(answer)["data"][0]["id"]


async def complete(document, generate):
    """Return the output for a document. `generate` takes any fields of a completion."""
    settings = {"max_tokens": 32, "temperature": 0.8, "seed": 1, "truncate_prompt_tokens": -1}
    # Interactive requests, whose priority is 0, go first.
    result = await generate({"prompt": document.text, "priority": 1, **settings})
    return {"text": result.text, "finish_reason": result.finish_reason}


config = InferenceConfig(
    server_type="endpoint",
    endpoint_url=url,
    model_name_or_path=model,
    use_chat=False,
    max_concurrent_generations=64,  # at most --max-waiting of the server
)
writer = JsonlWriter(target, "${rank}_${chunk_index}.jsonl", compression=None)
runner = InferenceRunner(
    complete, config, writer, checkpoints_local_dir=f"{target}-checkpoints", records_per_chunk=1000
)
LocalPipelineExecutor([JsonlReader(source), runner], logging_dir=f"{target}-logs").run()
