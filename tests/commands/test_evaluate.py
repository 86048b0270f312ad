import json
import math
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from tiny import sentences, tiny_model
from transformers import AutoModelForCausalLM

import evaluate
from corpus.exam import Question, read_questions
from corpus.exam_prompts import CEVAL
from engine.model_folder import fast_inference, open_model_folder
from evaluate import (
    ask,
    bits_per_byte,
    multiple_choice,
    sliding_windows,
    summarize_choices,
    wilson_interval,
    window_log_probs,
)
from models import CustomLLM, CustomLLMConfig
from tokenizer import create_tokenizer, encode_plain

QUESTIONS = "id,question,A,B,C,D,answer\n0,天？,地,玄,黄,宇,B\n1,洪？,荒,日,月,盈,D\n"


@pytest.mark.parametrize(
    ("length", "window", "stride"), [(2, 8, 4), (8, 8, 4), (29, 8, 3), (30, 8, 7)]
)
def test_every_token_but_the_first_counts_once_with_context(length, window, stride):
    ids = list(range(length))
    counted = []
    for part, first in sliding_windows(ids, window, stride):
        assert len(part) <= window
        assert first >= 1
        counted += part[first:]
    assert counted == ids[1:]


def test_windows_in_a_batch_score_as_each_by_itself():
    model = tiny_model().eval()
    draws = [torch.randint(0, 64, (n,)).tolist() for n in (3, 9, 5, 8, 2)]
    windows = [(ids, 1 + i % 2) for i, ids in enumerate(draws)]
    windows[-1] = (draws[-1], 1)
    batches = []
    model.model.register_forward_hook(lambda module, args, output: batches.append(args[0].shape))
    scores = window_log_probs(model, windows, batch_tokens=24)
    assert batches == [(2, 9), (3, 5)]
    for (ids, first), found in zip(windows, scores, strict=True):
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        expected = [log_probs[i - 1, ids[i]].item() for i in range(first, len(ids))]
        assert found.tolist() == pytest.approx(expected, abs=1e-5)


def test_bits_per_byte_equal_qwen3s_on_whole_documents(base_model):
    tokenizer = create_tokenizer(model_path=base_model)
    texts = ["天地玄黄，宇宙洪荒0。", "寒来暑往 abc 😀"]
    theirs = AutoModelForCausalLM.from_pretrained(base_model, dtype=torch.float32)
    ours = CustomLLM.from_pretrained(base_model, dtype=torch.float32).eval()
    scores = bits_per_byte(ours, tokenizer, iter(texts), 512, 256)
    nats = num_bytes = 0
    for ids in encode_plain(tokenizer, texts):
        ids = torch.tensor([*ids, tokenizer.eos_token_id])
        logits = theirs(ids[None]).logits[0, :-1].detach()
        nats += float(F.cross_entropy(logits, ids[1:], reduction="sum"))
        num_bytes += len(tokenizer.decode(ids[1:-1]).encode())
    # A first token of half a character decodes the rest to replacement signs of other lengths.
    assert scores["tokens"] == sum(map(len, encode_plain(tokenizer, texts)))
    assert scores["perplexity"] == pytest.approx(math.exp(nats / scores["tokens"]), rel=1e-5)
    expected = nats / math.log(2) / scores["bytes"]
    assert scores["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert num_bytes > 0


def test_long_documents_are_scored_with_a_sliding_window(base_model):
    tokenizer = create_tokenizer(model_path=base_model)
    model = CustomLLM.from_pretrained(base_model, dtype=torch.float32).eval()
    text = "天地玄黄，宇宙洪荒。" * 30
    scores = bits_per_byte(model, tokenizer, [text], 32, 16)
    assert scores["tokens"] == len(encode_plain(tokenizer, [text])[0])
    for nothing in ([], [" "]):  # a document of one token predicts its end alone
        with pytest.raises(ValueError, match="No text to measure: every document is empty"):
            bits_per_byte(model, tokenizer, nothing, 32, 16)


def test_csv_and_json_questions_are_read_the_same(tmp_path):
    (tmp_path / "physics_val.csv").write_text(QUESTIONS, encoding="utf-8-sig")
    record = {
        "subject": "physics",
        "split": "val",
        "question": "天？",
        "choices": ["地", "玄", "黄", "宇"],
        "answer": 1,
    }
    (tmp_path / "q.jsonl").write_text(json.dumps(record), encoding="utf-8")
    questions = read_questions(str(tmp_path / "physics_val.csv"))
    assert [q.answer for q in questions] == [1, 3]
    assert read_questions(str(tmp_path / "q.jsonl")) == questions[:1]
    assert read_questions(str(tmp_path)) == questions, "a folder of CSV files"
    assert CEVAL.lettered(questions[0], True).endswith("D. 宇\n答案：B\n\n")


@pytest.mark.parametrize("answer", ["E", "AB", 4])
def test_a_bad_question_names_file_and_line(tmp_path, answer):
    (tmp_path / "q.csv").write_text(QUESTIONS + f"2,玄？,a,b,c,d,{answer}\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"q\.csv:4: expected question, A, B, … \(or options\)"):
        read_questions(str(tmp_path / "q.csv"))


def model_that_says(token: int) -> CustomLLM:
    """The same logits everywhere: two times as large for one token as for all others."""
    model = tiny_model(vocab_size=320).eval()
    for layer in model.model.layers:
        for last in (layer.self_attn.o_proj, layer.mlp.down_proj):
            torch.nn.init.zeros_(last.weight)  # a position sees itself alone
    torch.nn.init.ones_(model.model.embed_tokens.weight)
    torch.nn.init.ones_(model.lm_head.weight)
    torch.nn.init.constant_(model.lm_head.weight[token], 2.0)
    return model


def test_accuracy_counts_the_likeliest_option_per_subject(tokenizer):
    [[b]] = encode_plain(tokenizer, ["B"])
    questions = [Question(s, "问", ["一", "二"], a) for s, a in (("x", 1), ("x", 0), ("y", 1))]
    rights = multiple_choice(model_that_says(b), tokenizer, questions, 0, False, 128)
    scores, lines = summarize_choices(rights)
    assert scores["x"]["summed"] == 0.5
    assert scores["y"]["summed"] == 1
    assert scores["all"]["summed"] == pytest.approx(2 / 3)
    assert scores["all"]["chance"] == 0.5
    assert len(lines) == 4
    assert "95 %" in lines[0]


def test_options_of_ten_letters_are_scored_by_themselves(tokenizer):
    """MMLU-Pro has ten. Those of one question are not taken for those of the next."""
    [[b]] = encode_plain(tokenizer, ["B"])
    ten = [str(number) for number in range(10)]
    questions = [Question("x", "问", ten, answer) for answer in (1, 9)]
    questions += [Question("x", "问", ["一", "二"], 1)]
    rights = multiple_choice(model_that_says(b), tokenizer, questions, 0, False, 256)
    assert rights["x"]["summed"] == [True, False, True]


def test_shots_are_shown_solved_and_not_scored(tokenizer):
    questions = [Question("x", f"问{i}", ["一", "二"], 1) for i in range(3)]
    [[one]] = ask(tokenizer, questions, 2, True, 512).values()
    shown = "问0\n答案：二\n\n问1\n答案：二\n\n问2\n答案："
    assert tokenizer.decode(one.prompt) == shown
    assert [tokenizer.decode(ids) for ids in one.options] == ["一", "二"]
    assert one.answer == 1
    with pytest.raises(ValueError, match=r"No question is left to score after 3 .*: lower --shots"):
        ask(tokenizer, questions, 3, True, 512)


def test_shots_are_those_of_dev_under_the_opening_line_and_every_other_question_is_scored(
    tokenizer,
):
    questions = [Question("law", "例？", ["甲", "乙"], 1, "dev") for _ in range(2)]
    questions += [Question("law", f"问{i}？", ["甲", "乙"], 0, "val") for i in range(3)]
    posed = ask(tokenizer, questions, 1, False, 512)["law"]
    assert len(posed) == 3
    text = tokenizer.decode(posed[0].prompt, skip_special_tokens=False)
    assert text.startswith(
        "以下是中国关于法学考试的单项选择题，请选出其中的正确答案。\n\n"
        "例？\nA. 甲\nB. 乙\n答案：B\n\n问"
    )
    assert text.count("例？") == 1


def test_examples_that_do_not_fit_into_the_context_go_whole_and_are_counted(tokenizer, capsys):
    questions = [Question("x", f"例{i}？", ["甲", "乙"], 1, "dev") for i in range(5)]
    questions += [Question("x", "问？", ["甲", "乙"], 0, "val")]
    one, two = (
        len(encode_plain(tokenizer, ["".join(CEVAL.lettered(q, True) for q in questions[:n])])[0])
        for n in (1, 2)
    )
    size = len(encode_plain(tokenizer, [CEVAL.lettered(questions[-1], False)])[0]) + 1
    header = len(encode_plain(tokenizer, [CEVAL.opening(questions[0])])[0])
    length = header + size + (one + two) // 2
    [[posed]] = ask(tokenizer, questions, 5, False, length).values()
    assert tokenizer.decode(posed.prompt).count("例") == 1
    assert tokenizer.decode(posed.prompt).startswith("以下是")
    printed = capsys.readouterr().out
    assert "1 of 1 questions are shown fewer than 5 examples: the context is full." in printed
    [[posed]] = ask(tokenizer, questions, 5, False, size).values()
    assert len(posed.prompt) == size - 1
    assert "1 of 1 questions are longer than the context" in capsys.readouterr().out


def test_the_interval_is_wilsons():
    low, high = wilson_interval(8, 10)
    assert (low, high) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson_interval(0, 5)[0] == pytest.approx(0)
    assert wilson_interval(5, 5)[1] == pytest.approx(1)


@pytest.mark.slow
def test_the_command_measures_text_and_questions_and_writes_json(run_script, tmp_path, base_model):
    (tmp_path / "a.txt").write_text("天地玄黄，宇宙洪荒。" * 20, encoding="utf-8")
    (tmp_path / "q.csv").write_text(QUESTIONS, encoding="utf-8")
    done = run_script("evaluate.py", "--model", base_model, "--data", "a.txt", "--json", "s.json")
    assert done.returncode == 0, done.stderr
    assert "bits_per_byte:" in done.stdout
    assert json.loads((tmp_path / "s.json").read_text())["stride"] == 16
    done = run_script("evaluate.py", "--model", base_model, "--data", "q.csv", "--task", "choice")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1].startswith("all")
    failed = run_script("evaluate.py", "--data", "a.txt")
    assert failed.returncode == 1
    assert failed.stderr.strip().splitlines()[-1].startswith("error: No finished run")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--shots -1", "--shots -1 must be at least 0."),
        ("--stride 0", "--stride 0 must be between 1 and the context 32 - 1"),
        ("--json nowhere/a.json", "--json nowhere/a.json: there is no such folder."),
        ("--stride 32", "--stride 32 must be between 1 and the context 32 - 1"),
        ("--data nowhere.txt", "nowhere.txt: no such file"),
        ("--model nowhere", "nowhere: no model folder there"),
    ],
)
def test_a_wrong_option_or_path_is_one_line(tmp_path, monkeypatch, base_model, options, message):
    (tmp_path / "a.txt").write_text("天地", encoding="utf-8")
    command = f"evaluate.py --data {tmp_path / 'a.txt'} --model {base_model} {options}"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match=re.escape(f"error: {message}")):
        evaluate.main()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "[1, 2]\n", ":1: a question must be an object, found int."),
        ("a.csv", "question,A\n", ": no questions; expected rows of question, A, B, … and answer."),
    ],
)
def test_a_file_without_questions_is_one_clear_error(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(name + message)):
        read_questions(str(tmp_path / name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use_moe", [False, True], ids=["dense", "moe"])
def test_in_16_bits_bits_per_byte_are_those_of_fp32(base_model, tokenizer, dtype, use_moe):
    texts = sentences(60, seed=3)
    model, tokenizer = open_model_folder(base_model)
    if use_moe:
        torch.manual_seed(0)
        shape = {"vocab_size": model.config.vocab_size, "d_model": 64, "use_moe": True}
        model = CustomLLM(CustomLLMConfig(**shape, n_layers=2, n_heads=2, d_ff=64))
    exact = bits_per_byte(model, tokenizer, texts, 32, 16)["bits_per_byte"]
    for same in (None, torch.float32):  # on a CPU
        with fast_inference(model, same):
            assert bits_per_byte(model, tokenizer, texts, 32, 16)["bits_per_byte"] == exact
    with fast_inference(model, dtype):
        fast = bits_per_byte(model, tokenizer, texts, 32, 16)["bits_per_byte"]
    assert fast != exact
    assert fast == pytest.approx(exact, abs=1e-3)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    for name, found in dtypes.items():
        is_matrix = (
            ".layers." in name and "norm" not in name and not name.endswith("mlp.gate.weight")
        )
        assert found == (dtype if is_matrix else torch.float32), name
