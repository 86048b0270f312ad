"""The page in a real browser: chromium, driven by selenium, over the real server."""

import json
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from browser import Browser, serving
from tiny import dpo_config, peer, pretrain_config, sft_config, write_jsonl

from dpo_train import train_dpo
from engine.conversation import Chat
from engine.generation import Sampling
from sft_train import train_sft
from train_llm import train
from web.votes import Standing, Votes

pytestmark = [pytest.mark.peer, pytest.mark.slow]
# An address that nobody has (RFC 5737).
HOSTILE = (
    '<script>document.title="owned"</script>![a](http://203.0.113.7/a)<img src="//203.0.113.7/b">'
)
GREEDY = ["--max_new_tokens=120", "--temperature=0", "--top_p=1", "--repetition_penalty=1"]
MODELS = ("sft/hostile", "sft/plain")
# What chromium itself asks its makers, whatever the page is. Fonts would be asked by the page.
CHROMIUM = re.compile(r"\b(?!fonts\.)[\w-]+\.(google|googleapis|gvt1)\.com")
BOT = '#chat [data-testid="bot"]'


@pytest.fixture(scope="module")
def folder(tmp_path_factory, base_model) -> Path:
    """With checkpoints of three runs: two models know one answer by heart, the third never ends."""
    peer("gradio")
    peer("selenium")
    folder = tmp_path_factory.mktemp("web")
    learned = {"max_steps": 100, "num_epochs": 50, "learning_rate": 0.01, "eval_every": 100}
    for name, answer in {"plain": "天地玄黄，宇宙洪荒。", "hostile": HOSTILE}.items():
        records = [{"instruction": f"问{number}", "response": answer} for number in range(40)]
        data = {"dataset": write_jsonl(folder / f"{name}.jsonl", records), "max_length": 192}
        config = sft_config(folder, base_model) | learned | data
        train_sft(run_name=name, wandb_config=config)
        assert reply_of(folder, f"sft/{name}", "问1") == answer
    endless = [{"text": "天地玄黄" * (800 + number)} for number in range(8)]
    data = {"dataset": write_jsonl(folder / "endless.jsonl", endless), "tokenizer_path": base_model}
    train(run_name="base", wandb_config=pretrain_config(folder) | learned | data)
    return folder


@pytest.fixture(scope="module")
def address(folder) -> Iterator[str]:
    with serving(folder, *GREEDY) as address:
        yield address


@pytest.fixture(scope="module")
def shared_browser() -> Iterator[Browser]:
    browser = Browser()
    yield browser
    browser.close()


@pytest.fixture
def browser(shared_browser, address) -> Browser:
    """On the page, which has just been loaded."""
    shared_browser.open(address)
    return shared_browser


@pytest.fixture
def votes(folder) -> Iterator[Votes]:
    """What the page has written in this test."""
    votes = Votes(folder / "pairs.jsonl")
    yield votes
    for path in (votes.pairs, votes.ties):
        path.unlink(missing_ok=True)


def reply_of(folder: Path, model: str, text: str) -> str:
    final = folder / "checkpoints" / model / "final"
    return Chat(str(final), Sampling(120, 0, 1, 1), 1, None).reply(text)


def pairs_of(votes: Votes) -> list[dict]:
    return [json.loads(line) for line in votes.pairs.read_text("utf-8").splitlines()]


def say(browser: Browser, text: str):
    browser.type("#message textarea", text + "\n")


def ask_both(browser: Browser, text: str):
    """Show both replies."""
    if not browser.is_shown("#question"):
        browser.click('button[role="tab"]:nth-of-type(2)')
    browser.type("#question textarea", text)
    browser.click("#ask")
    browser.find("#vote_left")


def cast(browser: Browser, choice: str) -> str:
    """The line of the page that says whose replies they were."""
    browser.click(f"#vote_{choice}")
    browser.wait(lambda: not browser.is_shown("#vote_left"))
    return browser.value("result").splitlines()[0]


def on_the_page(browser: Browser, expected: list[str]):
    """Wait until these are the replies of the chat, and the next question may be typed."""
    found = [text.strip() for text in expected]
    browser.wait(lambda: browser.texts(BOT) == found, f"{found}")
    browser.wait(lambda: browser.find("#message textarea").is_enabled())


def test_a_question_is_answered_and_answered_again_and_edited(browser, folder):
    browser.choose("model", "sft/plain")
    say(browser, "问1")
    on_the_page(browser, [reply_of(folder, "sft/plain", "问1")])
    browser.choose("model", "sft/hostile")
    browser.click('#chat [title="重试"]')
    on_the_page(browser, [HOSTILE])
    browser.choose("model", "sft/plain")
    browser.click('#chat [title="编辑"]')
    browser.type("#chat textarea", "问2")
    browser.click('#chat [title="发送"]')
    on_the_page(browser, [reply_of(folder, "sft/plain", "问2")])


def test_a_base_model_continues_the_text(browser, folder):
    browser.choose("model", "pretrain/base")
    say(browser, "天地")
    on_the_page(browser, [reply_of(folder, "pretrain/base", "天地")])


def test_stop_ends_a_reply_and_the_page_goes_on(browser, folder):
    browser.choose("model", "pretrain/base")
    browser.click("button.label-wrap")
    browser.type('#max_new_tokens input[type="number"]', "2048\n")
    say(browser, "天地")
    browser.wait(lambda: "".join(browser.texts(BOT)), "no reply")
    browser.click('[data-testid="stop-button"]')
    browser.find('[data-testid="submit-button"]')
    stopped = browser.texts(BOT)
    browser.type('#max_new_tokens input[type="number"]', "90\n")
    browser.choose("model", "sft/hostile")
    say(browser, "问1")
    browser.wait(lambda: "".join(browser.texts(BOT)[1:]))
    assert browser.texts(BOT)[:1] == stopped
    chat = Chat(str(folder / "checkpoints/pretrain/base/final"), Sampling(1), None, None)
    assert len(chat.tokenizer(stopped[0])["input_ids"]) < 1000


def test_the_browsers_language_is_the_pages(address, browser):
    assert browser.texts('button[role="tab"]')[:2] == ["对话", "比较与投票"]
    english = Browser("en-US")
    try:
        english.open(address)
        assert english.texts('button[role="tab"]')[:2] == ["Chat", "Compare and vote"]
    finally:
        english.close()


def test_votes_on_either_side_go_to_the_right_models_and_train(browser, folder, base_model, votes):
    replies = {model: reply_of(folder, model, "问1").strip() for model in MODELS}
    seen = set()
    for number in range(30):
        ask_both(browser, f"问{number}")
        left, right = (browser.value(f"{side}_reply").strip() for side in ("left", "right"))
        said = cast(browser, "left")
        label = pairs_of(votes)[-1]
        models = {side: label["vote"][side] for side in ("left", "right")}
        assert {side: replies[model] for side, model in models.items()} == {
            "left": left,
            "right": right,
        }
        assert (label["chosen"].strip(), label["rejected"].strip()) == (left, right)
        assert said == f"左：{models['left']}。右：{models['right']}。"
        seen.add(models["left"])
        if seen == set(MODELS) and number > 3:
            break
    assert seen == set(MODELS), "one model was always on the same side"
    config = dpo_config(folder, base_model, max_steps=1, max_length=192)
    train_dpo(wandb_config=config | {"dataset": str(votes.path)})


def test_a_tie_counts_a_changed_reply_is_chosen_and_undo_takes_it_back(browser, votes):
    ask_both(browser, "问1")
    cast(browser, "both_good")
    assert votes.standings() == [Standing(MODELS, 0, 0, 1)]
    assert "1 票，胜 0，负 0，平 1；胜率 50%" in browser.value("result")
    ask_both(browser, "问1")
    browser.type("#left_reply textarea", "我的回答")
    cast(browser, "both_bad")
    assert [pair["chosen"] for pair in pairs_of(votes)] == ["我的回答"]
    for left in (1, 0):
        browser.click("#undo")
        browser.wait(lambda: sum(s.count for s in votes.standings()) == left)  # noqa: B023
    assert browser.wait(lambda: "还没有投票" in browser.value("result"))


def test_a_hostile_reply_is_text_and_asks_nobody(browser, votes):
    browser.choose("model", "sft/hostile")
    say(browser, "问1")
    on_the_page(browser, [HOSTILE])
    ask_both(browser, "问1")
    assert HOSTILE in [browser.value("left_reply"), browser.value("right_reply")]
    cast(browser, "right")
    assert browser.driver.title == "LLM"
    assert browser.script("return document.querySelectorAll('[src*=\"203.0.113\"]').length") == 0
    strangers = [line for line in browser.recorder.asked if not CHROMIUM.search(line)]
    assert strangers == []


def test_the_page_is_whole_without_a_network_and_the_recorder_would_notice(browser):
    loaded = browser.script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert len(loaded) > 20
    assert {url.split("/")[2] for url in loaded} == {browser.script("return location.host")}
    errors = [e["message"] for e in browser.driver.get_log("browser") if e["level"] == "SEVERE"]
    assert errors == []
    browser.driver.get("http://203.0.113.7/seen")
    assert any("203.0.113.7" in line for line in browser.recorder.asked)
    browser.recorder.asked.clear()


@contextmanager
def foreign_page(target: str) -> Iterator[str]:
    """The address of another server, whose page sends a vote to ours."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.end_headers()
            self.wfile.write(
                b"<form method=post enctype=text/plain action=%s/gradio_api/queue/join>"
                b"<input name=a><button>vote</button></form>" % target.encode()
            )

        def log_message(self, *arguments):
            """Not into the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:  # browsers keep spare connections
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_a_page_of_another_origin_or_host_cannot_vote(shared_browser, address, votes):
    refusal = "Only this server's own page may do that."
    with foreign_page(address) as foreign:
        shared_browser.driver.get(foreign)
        shared_browser.click("button")
        shared_browser.wait(lambda: refusal in shared_browser.texts("body")[0])
        body = json.dumps({"data": [], "fn_index": 0, "session_hash": "a"}).encode()
        for headers in ({"Origin": foreign}, {"Host": "evil.test"}):
            headers |= {"Content-Type": "application/json"}
            join = urllib.request.Request(f"{address}/gradio_api/queue/join", body, headers)
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(join)
    shared_browser.driver.get(address.replace("127.0.0.1", "evil.test"))
    assert shared_browser.texts("body") == [refusal]
    assert votes.standings() == []


def test_200_votes_in_a_row_lose_none(folder, shared_browser, votes):
    choices = ["left", "right", "both_good", "both_bad"] * 50
    with serving(folder, "--max_new_tokens", "1") as address:
        shared_browser.open(address)
        for choice in choices:
            ask_both(shared_browser, "问")
            cast(shared_browser, choice)
    assert votes.count_pairs() == 100
    assert votes.standings()[0].count == 200
    assert votes.standings()[0].ties == 100


def test_two_models_of_the_command_line_are_the_first_ones(folder, shared_browser):
    finals = [f"checkpoints/{name}/final" for name in ("pretrain/base", "sft/plain")]
    with serving(folder, "--compare", *finals) as address:
        shared_browser.open(address)
        shared_browser.click('button[role="tab"]:nth-of-type(2)')
        chosen = [
            shared_browser.find(f"#model_{side} input").get_property("value") for side in "ab"
        ]
    assert chosen == ["pretrain/base", "sft/plain"]
