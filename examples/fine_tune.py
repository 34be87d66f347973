"""Fine-tune a model on synthetic conversations, using the commands, and ask it something new.

python examples/fine_tune.py runs/demo/model runs/demo-chat
"""

import itertools
import json
import random
import shlex
import subprocess
import sys
from pathlib import Path

from serve import LLM, SamplingParams

NAMES = ["area", "count", "find", "limit", "load", "merge", "next_line", "offset", "price", "scale"]
OPERATIONS = {"adds": "+", "subtracts": "-", "multiplies by": "*"}
MODULES = ["json", "math", "os", "random", "re", "shutil", "sys", "time", "types", "zlib"]


def conversations():
    """Return a few hundred questions with answers, each as the messages of a conversation."""
    pairs = [
        (
            f"Write a function {name} that {verb} {number}.",
            f"def {name}(x):\n    return x {sign} {number}",
        )
        for name, (verb, sign), number in itertools.product(NAMES, OPERATIONS.items(), range(1, 8))
    ]
    pairs += [
        (f"Write a class {name.title()} with the attribute {attribute}.",
         f"class {name.title()}:\n    def __init__(self, {attribute}):\n"
         f"        self.{attribute} = {attribute}")
        for name, attribute in itertools.permutations(NAMES, 2)
    ]  # fmt: skip
    pairs += [(f"Import the module {module}.", f"import {module}") for module in MODULES]
    pairs += [("Who are you?", "I am a small model that has read Python's standard library.")] * 10
    random.Random(0).shuffle(pairs)
    for question, answer in pairs:
        roles = {"user": question, "assistant": answer}
        yield [{"role": role, "content": text} for role, text in roles.items()]


def run(program, *arguments):
    command = [program, *map(str, arguments)]
    print(f"\n$ {shlex.join(command)}", flush=True)
    subprocess.run([Path(sys.executable).with_name(program), *command[1:]], check=True)


if __name__ == "__main__":
    base, folder, *settings = Path(sys.argv[1]), Path(sys.argv[2]), *sys.argv[3:]
    rows = list(conversations())
    asked, learned = rows[:5], rows[5:]
    folder.mkdir(parents=True)
    with (folder / "chats.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"messages": messages}) + "\n" for messages in learned)
    data = ["--output", folder / "data", "--validation-fraction", 0.05]
    run("stu-prepare", folder / "chats.jsonl", *data, "--tokenizer", base, "--chat-seq-len", 256)
    tuning = ["--init-from", base, "--data.dir", folder / "data", "--run-dir", folder / "train"]
    tuning += ["--data.seq_len", 256, "--data.micro_batch_size", 4, "--trainer.max_steps", 120]
    tuning += ["--model.optimizer.learning_rate", 1e-3, "--model.optimizer.warmup_steps", 10]
    tuning += ["--trainer.accelerator", "cpu", "--trainer.val_check_interval", 40, *settings]
    run("stu-train", *tuning)
    run("stu-export", folder / "train", "--output", folder / "model")
    model = LLM(folder / "model")
    answers = model.chat([messages[:1] for messages in asked], SamplingParams(max_new_tokens=60))
    for messages, output in zip(asked, answers, strict=True):
        print(f"\n> {messages[0]['content']}\n{output.outputs[0].text}")
    print(f"\nChat with it: stu-serve {folder / 'model'}, then open http://localhost:8000/ ")
