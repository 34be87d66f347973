"""Prompts of models whose tokenizers have no BOS, or an alphabet that texts may leave."""

import json

import pytest

from serve.completion import Completion
from serve.openai.completions import TextCompletions
from serve.openai.schemas import CompletionBody
from serve.prompts import RequestBuilder, default_params, encode_prompt
from serve.request import TokenLogprobs
from serve.scores import Scoring
from stu.chat.template import ChatTemplate
from stu.common.errors import UserError
from stu.tokenizer import make_tokenizer
from stu.tokenizers.alphabet import alphabet_files


@pytest.fixture(scope="module")
def dna(tmp_path_factory):
    """A tokenizer of DNA, with EOS but without BOS."""
    values = json.loads(alphabet_files("ACGT")["alphabet.json"]) | {"bos_token": None}
    files = {"alphabet.json": json.dumps(values).encode()}
    return make_tokenizer(files, tmp_path_factory.mktemp("tokenizer"))


def test_a_prompt_is_the_text_alone(dna):
    builder = RequestBuilder(dna, {})
    assert builder.build(0, "GAT", {}).prompt_token_ids == (2, 0, 3)
    assert builder.build(0, [3, 2], {}).prompt_token_ids == (3, 2)
    for empty in ("", []):
        with pytest.raises(UserError, match="not empty, as the model's tokenizer has no BOS"):
            builder.build(0, empty, {})


@pytest.mark.parametrize("wrong", [{"max_new_tokens": "9"}, {"max_tokens": 9}])
def test_a_wrong_default_of_a_model_directory_is_refused_by_file_and_name(tmp_path, dna, wrong):
    (tmp_path / "generation.json").write_text(json.dumps(wrong))
    with pytest.raises(UserError, match=f"generation.json: .*{next(iter(wrong))}"):
        default_params(tmp_path, dna)


@pytest.mark.parametrize("text", ["GAT\n", "x", "é"])
def test_a_character_outside_the_alphabet_is_the_prompts_fault(dna, text):
    with pytest.raises(UserError, match="is not in the alphabet of the tokenizer") as caught:
        encode_prompt(dna, text)
    assert caught.value.field == "prompt"
    with pytest.raises(UserError) as caught:
        Scoring(dna, "GAT", text)
    assert caught.value.field == "completion"


def test_the_first_token_of_a_text_is_not_scored(dna):
    scoring = Scoring(dna, "GATT")
    assert scoring.request.prompt_token_ids == (2, 0, 3, 3)
    assert scoring.request.prompt_logprobs_from == 1
    logprobs = [TokenLogprobs(token, -2.0, {}, 5) for token in (0, 3, 3)]
    score = scoring.score(_scored(logprobs))
    assert (score.logprob, score.num_tokens, score.num_bytes) == (-6.0, 3, 3)
    after = Scoring(dna, "GA", "TT")
    assert after.request.prompt_logprobs_from == 2
    assert after.score(_scored(logprobs[:2])).num_bytes == 2


def _scored(logprobs):
    return Completion("", [], [], "length", logprobs)


def test_a_chat_begins_with_its_text(dna, tmp_path):
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    template = ChatTemplate(tmp_path, dna)
    assert template.tokens([{"role": "user", "content": "GAT"}]) == [2, 0, 3]
    with pytest.raises(UserError, match="is not in the alphabet") as caught:
        template.tokens([{"role": "user", "content": "GAT?"}])
    assert caught.value.field == "messages"


def test_echo_shows_every_token_of_the_prompt(dna):
    """There is no BOS to leave out."""
    common = {"tokenizer": dna, "model_name": "dna", "max_seq_len": 64}
    endpoint = TextCompletions(RequestBuilder(dna, {}), **common)
    body = CompletionBody(prompt="GAT", max_tokens=1, echo=True, logprobs=1)
    (request,) = endpoint.requests(0, body)
    (writer,) = endpoint.writers(body, [request])
    piece = Completion(
        text="A",
        token_ids=[0],
        prompt_logprobs=[TokenLogprobs(token, -1.0, {}, 5) for token in (0, 3)],
        logprobs=[TokenLogprobs(0, -1.0, {}, 5)],
        finish_reason="length",
    )
    choice = writer.write(piece)
    assert choice["text"] == "GATA"
    assert choice["logprobs"]["tokens"] == ["G", "A", "T", "A"]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2, 3]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0, -1.0]
