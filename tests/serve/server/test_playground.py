"""The playground at / in a real browser."""

import json
import re
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import torch
from playwright.sync_api import Error, expect, sync_playwright

from tests.serve.conftest import LONG_SEQ_LEN
from tests.serve.server_process import SECONDS, ServerProcess, eventually, serving

INSTALL = Path(__file__).parents[2] / "install_chromium.sh"
PHONE = {"width": 360, "height": 740}
RANKS = (0.9, 0.5, 0.1, 0.01)
KEY = "a-key"


@pytest.fixture(scope="module")
def server(long_model_directory):
    with serving(long_model_directory) as server:
        yield server


@pytest.fixture(scope="module")
def browser():
    if shutil.which("chromium") is None and shutil.which("apt-get") is None:
        pytest.skip("there is no chromium, and no apt-get to install it")
    subprocess.run(["sh", INSTALL], check=True)
    expect.set_options(timeout=SECONDS * 1000)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(browser):
    """A function that opens a URL. No page may fail, break its policy, or ask another host."""
    contexts, errors, hosts, visited = [], [], set(), set()

    def note(page, message):
        if message.type in ("error", "warning"):
            page.console_errors.append(message.text)

    def call(url, **settings):
        visited.add(urlsplit(url).netloc)
        contexts.append(browser.new_context(**settings))
        page = contexts[-1].new_page()
        page.set_default_timeout(SECONDS * 1000)
        page.console_errors = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        page.on("console", lambda message: note(page, message))
        page.goto(url)
        return page

    yield call
    for context in contexts:
        for page in context.pages:
            errors += [text for text in page.console_errors if "Content Security" in text]
        context.close()
    assert errors == []
    assert hosts <= visited


@pytest.fixture
def page(visit, server):
    page = visit(server.url)
    expect(page.locator("#connection")).to_have_text("Connected")
    return page


def ask(page, prompt="def f(", **settings):
    """Fill in the form, with booleans for checkboxes, and generate."""
    page.fill("#prompt", prompt)
    page.evaluate("document.getElementById('sampling').open = true")
    for name, value in settings.items():
        if isinstance(value, bool):
            page.set_checked(f"#{name}", value)
        else:
            page.fill(f"#{name}", str(value))
    page.click("#generate")


def open_all(page):
    page.evaluate("for (const details of document.querySelectorAll('details')) details.open = true")


def ask_without_end(page):
    """Start a completion that lasts until it is stopped."""
    ask(page, max_tokens=LONG_SEQ_LEN - 100, stop_at_eos=False)
    expect(page.locator("#completion")).not_to_be_empty()


def done(page):
    expect(page.locator("#progress")).to_contain_text("Done: ")
    return page.locator("#completion").text_content()


def completed(server, **body):
    """The choice that the server returns for the same body without a stream."""
    answer = server.post("/v1/completions", json={"prompt": "def f(", **body})
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def answer_with(page, *events):
    """Answer the page's next completion with these events."""
    texts = [event if isinstance(event, str) else json.dumps(event) for event in events]
    body = "".join(f"data: {text}\n\n" for text in texts)
    answer = {"status": 200, "content_type": "text/event-stream", "body": body}
    page.route("**/v1/completions", lambda route: route.fulfill(**answer), times=1)


def piece(text):
    return {"choices": [{"text": text, "logprobs": None, "finish_reason": None}]}


def test_loads(visit, server):
    page = visit(server.url)
    expect(page).to_have_title("stu playground")
    expect(page.locator("#model")).to_have_text("model: context of 8,192 tokens")
    expect(page.locator("#rate")).to_have_text("0")  # two looks at the metrics
    expect(page.locator("#max_tokens")).to_have_value("128")
    assert page.console_errors == []


def test_a_model_is_chosen_where_there_are_several(page):
    expect(page.locator("#model-choice")).to_be_hidden()
    own, other = {"id": "model", "max_model_len": 8192}, {"id": "other", "max_model_len": 100}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [own, other]}))
    page.reload()
    page.select_option("#models", "other")
    expect(page.locator("#model")).to_have_text("other: context of 100 tokens")
    expected = {"prompt": "def f(", "model": "other"}
    with page.expect_request(lambda request: request.post_data_json == expected) as counted:
        page.fill("#prompt", "def f(")
    assert counted.value.url.endswith("/tokenize")
    answer_with(page, piece("x"), "[DONE]")
    with page.expect_request("**/v1/completions") as asked:
        page.click("#generate")
    assert asked.value.post_data_json["model"] == "other"
    assert done(page) == "x"


def test_files_and_headers(server):
    with server.client() as client:
        page = client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert not re.search(r"<script>|<style|style=|onclick", page.text)
        types = {"js": "text/javascript; charset=utf-8", "css": "text/css; charset=utf-8"}
        files = re.findall(r'"(playground/\w+\.(\w+))"', page.text)
        assert {kind for _, kind in files} == {"js", "css", "svg"}
        for path, kind in files:
            answer = client.get(path)
            assert answer.headers["content-type"] == types.get(kind, "image/svg+xml")
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self'; ")
            assert "unsafe" not in policy
            assert "frame-ancestors 'none'" in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            tag = answer.headers["etag"]
            again = client.get(path, headers={"if-none-match": tag})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(path).headers["etag"] == tag
        for path in ("index.html", "nothing.js", "../page.py", "..%2fpage.py", "%2e%2e/page.py"):
            assert client.get(f"/playground/{path}").status_code == 404


def test_text_is_streamed(page, server):
    page.evaluate(
        """() => {
            const box = document.getElementById("completion");
            window.seen = [];
            const note = () => seen.push([box.ariaBusy, box.textContent.length]);
            new MutationObserver(note).observe(
                box, { childList: true, characterData: true, subtree: true });
        }"""
    )
    settings = {"max_tokens": 200, "temperature": 0.8, "seed": 3, "top_k": 50, "top_p": 0.95}
    settings |= {"min_p": 0.01, "repetition_penalty": 1.1, "presence_penalty": 0.5}
    settings |= {"frequency_penalty": -0.5, "stop_at_eos": False}
    ask(page, **settings)
    expected = completed(server, **settings)["text"]
    assert done(page) == expected
    expect(page.locator("#progress")).to_contain_text("200 tokens in")
    busy = {length for is_busy, length in page.evaluate("seen") if is_busy == "true"}
    assert len(busy) > 20
    assert min(busy) < len(expected) / 2


def test_stopping_frees_pages_and_rows(page, server):
    ask_without_end(page)
    expect(page.locator("#running")).to_have_text("1")
    expect(page.locator("#convolution-pages")).to_have_text(re.compile(r"[1-9]\d* of [\d,]+"))
    expect(page.locator("#attention-pages")).to_have_text(re.compile(r"[1-9]\d* of [\d,]+"))
    expect(page.locator("#rate")).to_have_text(re.compile(r"[1-9]\d*"))
    expect(page.locator("#histogram rect").first).to_be_visible()
    expect(page.locator("#latency")).to_have_text(re.compile(r"p50 [\d.]+ ms, p99 [\d.]+ m?s, of "))
    expect(page.locator("#remembered")).to_have_text(re.compile(r"\d+%"))
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#progress")).to_have_text("Stopped")
    expect(page.locator("#completion")).not_to_be_empty()
    expect(page.locator("#running")).to_have_text("0")
    expect(page.locator("#convolution-pages")).to_have_text(re.compile(r"^0 of"))
    eventually(lambda: server.metric("vllm:num_requests_running") == server.pages_used() == 0)
    expect(page.locator("#error")).to_be_empty()


def test_tokens_are_marked_by_their_probability(page, server):
    settings = {"max_tokens": 60, "temperature": 0.4, "seed": 5, "stop_at_eos": False}
    choice = completed(server, **settings, logprobs=5)
    ask(page, **settings, logprobs=True)
    assert done(page) == choice["text"]
    tokens = page.locator("#completion .token")
    expect(tokens).to_have_count(60)
    logprobs = choice["logprobs"]
    probabilities = torch.tensor(logprobs["token_logprobs"]).exp().tolist()
    expected = [sum(value < least for least in RANKS) for value in probabilities]
    found = tokens.evaluate_all("tokens => tokens.map(token => Number(token.dataset.rank))")
    assert found == expected
    looks = page.locator(".legend .token").evaluate_all(
        """tokens => tokens.map(token => getComputedStyle(token)).map(style => [
            style.backgroundColor, style.backgroundImage, style.textDecorationLine,
            style.paddingTop, style.backgroundPositionY, style.backgroundSize])"""
    )
    assert len({colour for colour, *_ in looks}) == len({image for _, image, *_ in looks}) == 5
    # The line above the letters hides neither underscores nor descenders.
    for *_, decoration, padding, place, size in looks:
        assert (decoration, place) == ("none", "0%")
        assert float(padding.removesuffix("px")) >= float(size.split()[-1].removesuffix("px"))
    titles = tokens.evaluate_all("tokens => tokens.map(token => token.title)")
    for title, name, top in zip(titles, logprobs["tokens"], logprobs["top_logprobs"], strict=True):
        assert title.startswith(f"{json.dumps(name, ensure_ascii=False)}: ")
        assert len(title.split("\n")) == 2 + len(top)


def test_inspector_shows_the_alternatives_to_a_token(page):
    ask(page, max_tokens=20, seed=1, logprobs=True, stop_at_eos=False)
    done(page)
    line, rows = page.locator("#token-line"), page.locator("#alternatives tbody tr")
    page.focus("#completion")
    page.keyboard.press("End")
    expect(line).to_have_text(re.compile(r'^Token 20 of 20: ".+", .*\d%$'))
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    expect(line).to_have_text(re.compile("^Token 2 of 20: "))
    page.click("#next-token")
    expect(line).to_have_text(re.compile("^Token 3 of 20: "))
    expect(page.locator("[data-chosen]")).to_have_count(1)
    assert rows.count() >= 5
    expect(rows.filter(has_text="chosen")).to_have_count(1)
    ask(page, max_tokens=2, logprobs=False)
    expect(page.locator("#inspector")).to_be_hidden()


def test_nothing_of_a_stop_string_is_shown(page, server):
    settings = {"max_tokens": 60, "temperature": 0.9, "seed": 9, "stop_at_eos": False}
    whole = completed(server, **settings)["text"]
    stop = next(whole[at : at + 3] for at in range(20, 40) if "\n" not in whole[at : at + 3])
    stop = stop.replace("\\", "\\\\")
    for logprobs in (False, True):
        ask(page, **settings, stop_strings=f"no such text\\n\n{stop}", logprobs=logprobs)
        assert done(page) == whole[: whole.index(stop)]


def test_errors_are_shown_in_words(page):
    error = page.get_by_role("alert")
    ask(page, max_tokens=LONG_SEQ_LEN + 1)
    expect(error).to_contain_text("lower the limit of new tokens to ")
    expect(page.locator("#progress")).to_have_text("Ended by an error")
    expect(page.locator("#prompt")).to_have_attribute("aria-invalid", "")
    page.fill("#temperature", "")
    page.locator("#temperature").press_sequentially("1e")
    page.click("#generate")
    expect(error).to_have_text("Temperature must be a number.")
    ask(page, temperature=1, max_tokens=3)
    done(page)
    expect(error).to_be_empty()
    answer_with(page, piece("so far"), {"error": {"message": "the engine is out of sorts"}})
    ask(page)
    expect(error).to_have_text("the engine is out of sorts")
    expect(page.locator("#completion")).to_have_text("so far")
    answer_with(page, piece("cut "), piece("short"))
    ask(page)
    expect(error).to_have_text("The connection broke.")
    expect(page.locator("#completion")).to_have_text("cut short")


def test_page_reconnects_when_the_server_is_back(visit, long_model_directory):
    with serving(long_model_directory) as server:
        page = visit(server.url)
        ask_without_end(page)
        server.end()
    status, error = page.locator("#connection"), page.locator("#error")
    expect(status).to_have_text("Server not reachable, trying again")
    expect(error).to_have_text("The connection broke.")
    expect(page.locator("#running")).to_have_text("–")
    kept = page.locator("#completion").text_content()
    assert kept
    page.click("#generate")
    expect(error).to_have_text("The server cannot be reached.")
    assert page.locator("#completion").text_content() == kept
    again = ServerProcess(long_model_directory, port=urlsplit(server.url).port)
    try:
        expect(status).to_have_text("Connected")
        expect(page.locator("#running")).to_have_text("0")
        assert page.locator("#completion").text_content() == kept
        ask(page, max_tokens=5, stop_at_eos=False)
        done(page)
        expect(error).to_be_empty()
    finally:
        again.end()


def test_api_key_and_the_other_metric_prefix(visit, long_model_directory):
    with serving(long_model_directory, "--metric-prefix", "stu", STU_API_KEYS=KEY) as server:
        page = visit(server.url)
        status, field = page.locator("#connection"), page.get_by_label("Key", exact=True)
        expect(status).to_have_text("The server requires an API key")
        field.fill("a wrong key")
        field.press("Tab")
        page.click("#generate")
        expect(page.locator("#error")).to_contain_text("API key has a space")
        field.fill(KEY)
        field.press("Tab")
        expect(status).to_have_text("Connected")
        page.reload()
        expect(status).to_have_text("Connected")
        expect(page.locator("#running")).to_have_text("0")
        ask(page, max_tokens=50, stop_at_eos=False)
        done(page)
        expect(page.locator("#latency")).to_contain_text(", of 49 since")
        assert KEY not in page.url


def test_phone(visit, server):
    page = visit(server.url, viewport=PHONE, has_touch=True, is_mobile=True)
    open_all(page)
    ask(page, max_tokens=LONG_SEQ_LEN - 100, stop_at_eos=False)
    expect(page.locator("#progress")).to_have_attribute("data-busy", "")
    expect(page.locator("#completion")).to_be_in_viewport(ratio=0.9)
    expect(page.locator("#completion")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(page.locator("#progress")).not_to_have_attribute("data-busy", "")
    ask(page, "x" * 200, max_tokens=80, logprobs=True, stop_at_eos=False)
    done(page)
    page.locator("#completion .token").first.tap()
    expect(page.locator("#alternatives")).to_be_visible()
    expect(page.locator("#histogram")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == PHONE["width"]
    too_wide = page.locator("body *").evaluate_all(
        """(elements, width) =>
            elements.filter(element => element.getBoundingClientRect().right > width + 0.5)
            .map(element => element.outerHTML.slice(0, 80))""",
        PHONE["width"],
    )
    assert too_wide == []


def test_copy_and_continue(page):
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    settings = {"max_tokens": 12, "temperature": 0.8, "seed": 3, "stop_at_eos": False}
    ask(page, "größe = ", **settings)
    text = done(page)
    page.click("#copy")
    expect(page.locator("#announcement")).to_have_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == text
    page.evaluate("navigator.clipboard.writeText('')")
    page.evaluate("navigator.clipboard.writeText = null")  # as over HTTP from another machine
    page.click("#copy")
    eventually(lambda: page.evaluate("navigator.clipboard.readText()") == text)
    page.fill("#prompt", "something else")
    page.click("#continue")
    expect(page.locator("#prompt")).to_have_value(f"größe = {text}")
    expect(page.locator("#prompt")).to_be_focused()
    ask(page, "größe = ", **settings, logprobs=True)
    expect(page.locator("#completion .token")).to_have_count(12)
    done(page)
    texts = page.locator("#completion .token").all_text_contents()
    at = next(at for at, text in enumerate(texts) if at and text.strip())
    page.locator("#completion .token").nth(at).click()
    page.get_by_role("button", name="Continue after this token").click()
    expect(page.locator("#prompt")).to_have_value(f"größe = {''.join(texts[: at + 1])}")


def test_prompt_tokens_are_counted(page, code_tokenizer):
    line, text = page.locator("#prompt-count"), "def größe(x):\n"
    expect(line).to_have_text("1 token and 128 new ones, of 8,192")
    page.fill("#prompt", text)
    count = 1 + len(code_tokenizer.encode(text))
    expect(line).to_have_text(f"{count} tokens and 128 new ones, of 8,192")
    page.evaluate("document.getElementById('sampling').open = true")
    page.fill("#max_tokens", "8192")
    expect(line).to_have_text(f"{count} tokens and 8,192 new ones, of 8,192: too many")


def test_request_as_code(page, server):
    page.evaluate("document.getElementById('code-panel').open = true")
    settings = {"max_tokens": 8, "seed": 3, "temperature": 0.7, "top_k": 40, "stop_at_eos": False}
    prompt = "it's \"quoted\" $HOME `x` \\n\n'''größe\u2028"
    ask(page, prompt, **settings, stop_strings="never's")
    text = done(page)
    curl, python = page.locator("#curl").text_content(), page.locator("#python").text_content()
    command = shlex.split(curl)
    assert command[:2] == ["curl", f"{server.url}/v1/completions"]
    assert '"Authorization: Bearer $STU_API_KEY"' in curl
    body = json.loads(command[command.index("-d") + 1])
    assert body == body | settings | {"prompt": prompt, "stop": ["never's"]}
    assert completed(server, **body)["text"] == text
    printed = []
    exec(python, {"print": printed.append})  # OpenAI's own client
    assert printed == [text]
    page.click("#chat-tab")
    page.fill("#message", "it's")
    expect(page.locator("#python")).to_contain_text('[{"role": "user", "content": "it\'s"}]')
    exec(page.locator("#python").text_content(), {"print": printed.append})
    assert len(printed) == 2


def test_chat(page, server):
    page.click("#text-tab")
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    page.reload()  # the address remembers the tab
    expect(page.get_by_role("tabpanel", name="Chat")).to_be_visible()
    expect(page.locator("#connection")).to_have_text("Connected")
    open_all(page)
    page.fill("#max_tokens", "12")
    page.fill("#seed", "3")
    page.fill("#system", "Be brief.")
    line = page.locator("#message-count")
    expect(line).to_have_text(
        re.compile(r"^the chat has about \d+ tokens and 12 new ones, of 8,192$")
    )
    before = line.text_content()
    texts, progress = page.locator("#transcript .content"), page.locator("#chat-progress")
    is_idle = re.compile("false")
    messages = [{"role": "system", "content": "Be brief."}]
    for number, question in enumerate(["Hi <b>", "And\nyou?"]):
        page.fill("#message", question)
        page.press("#message", "Enter")
        messages.append({"role": "user", "content": question})
        body = {"messages": messages, "max_tokens": 12, "seed": 3}
        answer = server.post("/v1/chat/completions", json=body).json()
        messages.append(answer["choices"][0]["message"])
        expect(texts).to_have_count(2 * number + 2)
        expect(page.locator("#transcript")).to_have_attribute("aria-busy", is_idle)
        expect(progress).to_contain_text("Done: ")
        assert texts.all_text_contents() == [message["content"] for message in messages[1:]]
    expect(line).not_to_have_text(before)
    page.fill("#seed", "4")
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#transcript")).to_have_attribute("aria-busy", is_idle)
    assert texts.nth(3).text_content() != messages[-1]["content"]
    page.get_by_role("button", name="Edit").click()
    expect(page.locator("#message")).to_have_value("And\nyou?")
    expect(texts).to_have_count(2)
    page.fill("#max_tokens", str(LONG_SEQ_LEN - 400))
    page.uncheck("#stop_at_eos")
    page.click("#send")
    expect(texts.nth(3)).not_to_be_empty()
    page.click("#chat-stop")
    expect(progress).to_have_text("Stopped")
    expect(texts.nth(3)).not_to_be_empty()
    eventually(lambda: server.metric("vllm:num_requests_running") == 0)
    page.fill("#max_tokens", str(LONG_SEQ_LEN + 1))
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("#chat-error")).to_contain_text("lower the limit of new tokens")
    expect(page.get_by_role("button", name="Ask again")).to_be_visible()
    page.click("#new-chat")
    expect(texts).to_have_count(0)
    page.click("#send")
    expect(page.locator("#chat-error")).to_have_text("Write a message first.")


def test_keyboard_alone(page):
    stops = []
    for _ in range(40):
        page.keyboard.press("Tab")
        name, outline = page.evaluate(
            """() => {
                const focused = document.activeElement;
                const name = focused.id || focused.textContent.trim();
                return [name, getComputedStyle(focused).outlineStyle];
            }"""
        )
        if name in stops or page.evaluate("document.activeElement === document.body"):
            break
        assert outline == "solid", name
        stops.append(name)
        if name in ("Sampling", "API key"):
            page.keyboard.press("Enter")
    settings = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty"]
    settings += ["presence_penalty", "frequency_penalty", "seed", "stop_strings", "stop_at_eos"]
    assert stops == [
        *("text-tab", "prompt", "generate", "stop", "logprobs", "completion", "copy", "continue"),
        *("Sampling", *settings, "API key", "key", "This request as code"),
    ]
    page.focus("#prompt")
    page.keyboard.type("def g(")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    done(page)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    page.focus("#max_tokens")
    page.keyboard.press("Control+a")
    page.keyboard.type(str(LONG_SEQ_LEN - 100))
    page.focus("#stop_at_eos")
    page.keyboard.press("Space")
    expect(page.locator("#stop_at_eos")).not_to_be_checked()
    page.keyboard.press("Control+Enter")
    expect(page.locator("#completion .token").first).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#progress")).to_have_text("Stopped")
    page.focus("#completion")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#token-line")).to_contain_text("Token 1 of ")


def test_screen_readers(page):
    assert page.evaluate("document.documentElement.lang") == "en"
    for role in ("banner", "main", "complementary"):
        expect(page.get_by_role(role)).to_have_count(1)
    expect(page.get_by_role("complementary", name="Server, live")).to_be_visible()
    expect(page.get_by_role("form", name="Prompt")).to_be_visible()
    expect(page.get_by_role("region", name="Completion")).to_be_visible()
    levels = page.locator("h1, h2, h3").evaluate_all(
        "headings => headings.map(heading => Number(heading.tagName[1]))"
    )
    assert levels.count(1) == levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    fields = page.locator("input, textarea, select")
    labels = fields.evaluate_all("all => all.map(field => field.labels[0]?.textContent.trim())")
    assert all(labels)
    assert len(set(labels)) == len(labels)
    for button in page.get_by_role("button").all():
        assert button.get_attribute("aria-label") or button.text_content()
    ids = page.locator("[id]").evaluate_all("all => all.map(({ id }) => id)")
    assert len(set(ids)) == len(ids)
    statuses = page.get_by_role("status").evaluate_all("all => all.map(({ id }) => id)")
    assert statuses == ["connection", "progress", "announcement"]
    completion = page.locator("#completion")
    assert completion.evaluate("box => box.closest('[aria-live], output')") is None
    expect(completion).to_have_attribute("aria-labelledby", "completion-heading")
    expect(page.locator("#histogram")).to_have_attribute("aria-labelledby", "latency")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(visit, server, scheme):
    page = visit(server.url, color_scheme=scheme)
    page.evaluate("document.getElementById('inspector').hidden = false")
    expect(page.locator("#connection")).to_have_text("Connected")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (luminance(ground) > 0.5) == (scheme == "light")
    texts = page.locator("h1, h2, h3, p, dt, dd, label, button, .token, textarea").evaluate_all(
        """elements => elements.map(element => {
            const groundOf = (behind) => getComputedStyle(behind).backgroundColor;
            let behind = element;
            while (groundOf(behind) === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
            const text = element.textContent.trim() || element.id;
            return [text, getComputedStyle(element).color, groundOf(behind)];
        })"""
    )
    assert len(texts) > 40
    for text, colour, ground in texts:
        low, high = sorted([luminance(colour), luminance(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, text


def luminance(colour):
    """The relative luminance of rgb(...), as WCAG defines it."""
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (
        part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_text_never_becomes_elements(page):
    text = "<img src=x onerror=alert(1)><b>bold</b>"
    logprobs = {"tokens": [text], "token_logprobs": [-1.0], "text_offset": [0]}
    logprobs["top_logprobs"] = [{text: -1.0}]
    answer_with(page, {"choices": [{"text": text, "logprobs": logprobs}]}, "[DONE]")
    ask(page, logprobs=True)
    assert done(page) == text
    page.click("#next-token")
    expect(page.locator("#token-line")).to_contain_text("<b>bold</b>")
    assert page.locator("main img, main b").count() == 0
    with pytest.raises(Error, match="TrustedHTML"):
        page.evaluate("document.body.innerHTML = '<b>text</b>'")
    page.console_errors.clear()  # of that try


def test_events_in_chunks_of_any_size(page):
    body = ": a remark\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata:  lines\n\n\n"
    body += "data: caf\u00e9 \U0001f600\r\rid: 7\n\ndata: cut short"
    sizes = [1, 2, 3, 7, 1000]
    found = page.evaluate(
        """async ([body, sizes]) => {
            const { eventData } = await import("/playground/sse.js");
            const bytes = new TextEncoder().encode(body);
            const eventsOf = async (size) => {
                const stream = new ReadableStream({
                    start(controller) {
                        for (let at = 0; at < bytes.length; at += size) {
                            controller.enqueue(bytes.slice(at, at + size));
                        }
                        controller.close();
                    },
                });
                const found = [];
                for await (const data of eventData(stream)) found.push(data);
                return found;
            };
            return Promise.all(sizes.map(eventsOf));
        }""",
        [body, sizes],
    )
    assert found == [["one", "two\n lines", "caf\u00e9 \U0001f600"]] * len(sizes)


def test_latencies_since_the_page_was_opened(page):
    """Four readings of buckets up to 1, 2 and 4 s, one after the other."""
    label = 'model_name="a} 9\\",le=\\"7"'
    readings = [[5, 5, 5, 5], [5, 15, 25, 25], [5, 25, 35, 35], [0, 0, 1, 2]]
    texts = [
        "# HELP vllm:x_bucket Of 1.\n"
        + "".join(
            f'vllm:x_bucket{{le="{bound}",{label}}} {count}.0\n'
            for bound, count in zip(["1.0", "2.0", "4.0", "+Inf"], reading, strict=True)
        )
        for reading in readings
    ]
    found = page.evaluate(
        """async (texts) => {
            const { parseMetrics } = await import("/playground/prometheus.js");
            const { Latencies } = await import("/playground/latencies.js");
            const latencies = new Latencies();
            return texts.map((text) => {
                latencies.add(parseMetrics(text).buckets.get("x_bucket"));
                return [latencies.counts, latencies.quantile(0.5), latencies.quantile(0.99)];
            });
        }""",
        texts,
    )
    assert [counts for counts, *_ in found] == [
        [0, 0, 0, 0],
        [0, 10, 10, 0],
        [0, 20, 10, 0],
        [0, 20, 11, 1],  # the server has started again
    ]
    assert found[1][1:] == pytest.approx([2, 3.96])
    assert found[2][1:] == pytest.approx([1.75, 3.94])
