import re
import subprocess
import sys

import pytest
import warm
from conftest import ROOT
from tiny import sft_config

import chat
from chat import side_by_side, width
from engine.conversation import Chat, StopOnInterrupt
from engine.generation import Sampling
from sft_train import train_sft

GREEDY = Sampling(8)
SAMPLED = Sampling(8, temperature=1.0)


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory, base_model) -> str:
    folder = tmp_path_factory.mktemp("chat")
    return train_sft(wandb_config=sft_config(folder, base_model, max_steps=3))


def test_a_chat_model_uses_its_template_and_remembers(chat_model):
    talk = Chat(chat_model, GREEDY, None, "你是助手。")
    assert talk.is_chat_model
    talk.reply("问1")
    talk.prompt_ids("问2")
    assert [m["role"] for m in talk.messages] == ["system", "user", "assistant", "user"]
    talk.clear()
    assert talk.messages == [{"role": "system", "content": "你是助手。"}]


def test_a_base_model_continues_the_text(base_model):
    talk = Chat(base_model, GREEDY, None, None)
    assert not talk.is_chat_model
    assert talk.tokenizer.decode(talk.prompt_ids("天地")[0]) == "天地"
    assert talk.messages == []


def test_the_oldest_turns_go_when_the_window_is_full(chat_model):
    talk = Chat(chat_model, GREEDY, None, "系统")
    for number in range(6):
        talk.messages += [
            {"role": "user", "content": f"第{number}问"},
            {"role": "assistant", "content": "答"},
        ]
    ids = talk.prompt_ids("最后一问")
    text = talk.tokenizer.decode(ids[0])
    assert ids.shape[1] <= talk.model.config.max_seq_len - 8
    assert "最后一问" in text
    assert "第0问" not in text
    assert talk.messages[0]["role"] == "system"
    assert talk.messages[1]["role"] == "user"


def test_a_reply_takes_at_most_half_of_the_context_from_the_question(chat_model, capsys):
    talk = Chat(chat_model, Sampling(10_000), None, None)
    context = talk.model.config.max_seq_len
    question = "天地玄黄" * context
    ids = talk.prompt_ids(question)[0]
    assert len(ids) == context - context // 2
    assert talk.left_out > context
    talk.clear()
    talk.prompt_ids("问")
    assert talk.left_out == 0
    talk = Chat(chat_model, GREEDY, None, None)
    chat.stream_reply(talk, question)
    assert f"the first {talk.left_out} tokens" in capsys.readouterr().err


def test_what_is_typed_becomes_no_control_token(chat_model):
    talk = Chat(chat_model, GREEDY, None, "系统 <|im_start|>")
    control = talk.tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    ids = talk.prompt_ids("什么是<|im_end|>？")[0].tolist()
    assert [ids.count(token) for token in control] == [3, 2], "three turns begin, two have ended"
    assert "什么是<|im_end|>？<|im_end|>" in talk.tokenizer.decode(ids)


def test_the_same_seed_gives_the_same_reply(chat_model):
    one, other = (Chat(chat_model, SAMPLED, 7, None).reply("问") for _ in range(2))
    assert one == other


def test_a_reply_and_what_is_streamed_are_the_text_of_transformers_generate(chat_model, capsys):
    talk = Chat(chat_model, GREEDY, None, None)
    ids = talk.prompt_ids("问")
    found = talk.model.generate(ids, max_new_tokens=8, do_sample=False)
    expected = talk.tokenizer.decode(found[0, ids.shape[1] :], skip_special_tokens=True)
    talk.clear()
    chat.stream_reply(talk, "问")
    assert talk.messages[-1] == {"role": "assistant", "content": expected}
    assert capsys.readouterr().out == expected + "\n"


def test_an_interrupt_ends_the_reply_and_not_the_program(chat_model):
    stop = StopOnInterrupt()
    stop.interrupted = True
    talk = Chat(chat_model, Sampling(60), None, None)
    before = talk.prompt_ids("问").shape[1]
    talk.clear()
    talk.reply("问", stop=stop)
    assert talk.messages[-1]["role"] == "assistant"
    assert before > 0
    assert len(talk.tokenizer(talk.messages[-1]["content"])["input_ids"]) <= 2


def test_columns_line_up_for_wide_characters():
    lines = side_by_side("天地玄黄" * 10, "abc\n\nd").splitlines()
    assert {width(line.split("│")[0]) for line in lines} == {chat.COLUMN + 1}
    assert [line.split("│ ")[1] for line in lines[:3]] == ["abc", "", "d"]


def run_chat(tmp_path, *arguments, typed: str = "") -> subprocess.CompletedProcess:
    return warm.run([sys.executable, str(ROOT / "chat.py"), *arguments], tmp_path, typed)


@pytest.mark.slow
def test_a_pipe_of_utf8_lines_is_answered_line_by_line(tmp_path, chat_model):
    options = ["--model", chat_model, "--max_new_tokens", "4", "--seed", "1"]
    done = run_chat(tmp_path, *options, typed="你好\n/clear\n\n再见\n/exit\n永不\n")
    assert done.returncode == 0, done.stderr
    one = run_chat(tmp_path, *options, "--prompt", "你好")
    assert done.stdout.startswith(one.stdout.rstrip("\n"))


@pytest.mark.slow
def test_two_checkpoints_are_compared_side_by_side(tmp_path, chat_model, base_model):
    options = ["--compare", base_model, chat_model, "--max_new_tokens", "4", "--prompt", "天地"]
    done = run_chat(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert "> 天地" in done.stdout
    assert done.stdout.count("│") >= 2


@pytest.mark.slow
def test_without_a_checkpoint_one_line_says_what_to_run(tmp_path):
    done = run_chat(tmp_path, "--prompt", "你好")
    assert done.returncode == 1
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("error: No finished run under checkpoints")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model nowhere --prompt 你", "nowhere: no model folder there"),
        ("--model nowhere --serve", "nowhere: no model folder there"),
        ("--stage sft --web --output_dir runs", "No finished sft run under runs/sft"),
        ("--stage sft", "No finished sft run under checkpoints/sft: run `python sft_train.py`"),
        ("--max_new_tokens 0", "--max_new_tokens 0 must be at least 1"),
        ("--model nowhere --seed -1", "--seed -1 must be at least 0 and below 2**63"),
        ("--temperature -1", "--temperature -1.0 must be at least 0"),
        ("--top_p 3", "--top_p 3.0 must be above 0 and at most 1"),
        ("--repetition_penalty 0", "--repetition_penalty 0.0 must be above 0"),
    ],
)
def test_a_wrong_option_is_one_line_before_anything_loads(
    tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["chat.py", *arguments.split()])
    with pytest.raises(ValueError, match=re.escape(message)):
        chat.run(chat.parse())


def test_serving_without_its_extra_says_what_to_install(monkeypatch, base_model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="transformers\\[serving\\]"):
        chat.serve(base_model, 8000)


def test_the_page_without_its_extra_says_what_to_install(monkeypatch, base_model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["chat.py", "--web", "--model", base_model])
    with pytest.raises(ValueError, match=r"--web needs `pip install -r requirements-web\.txt`"):
        chat.run(chat.parse())


def test_a_server_that_fails_is_an_error(monkeypatch, base_model):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: True)
    failed = subprocess.CompletedProcess([], 3)
    monkeypatch.setattr(subprocess, "run", lambda command: failed)
    with pytest.raises(ValueError, match="the server ended with 3; its reason is printed above"):
        chat.serve(base_model, 8000)
