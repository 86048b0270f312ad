"""A `final` folder in other people's hands: what loads, trains, measures and serves it."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request

import pytest
import torch
from conftest import ROOT
from tiny import peer, pretrain_config, sft_config, trl_sft_trainer, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from models import CustomLLM
from sft_train import train_sft
from train_llm import train

pytestmark = pytest.mark.slow  # the models that all of these tests share take the time
MESSAGES = [{"role": "user", "content": "问1：天地玄黄？"}]


@pytest.fixture(scope="module", params=["dense", "moe"])
def final(request, tmp_path_factory) -> str:
    """A chat model that came through two stages, dense or mixture of experts."""
    folder = tmp_path_factory.mktemp(request.param)
    changes = {"use_moe": request.param == "moe", "moe_d_ff": 32, "max_steps": 3}
    base = train(wandb_config=pretrain_config(folder, **changes))
    return train_sft(wandb_config=sft_config(folder, base, num_epochs=8, learning_rate=1e-2))


def test_auto_model_loads_it_with_equal_logits_and_no_remote_code(final):
    stock = AutoModelForCausalLM.from_pretrained(final, trust_remote_code=False).eval()
    assert type(stock).__name__ in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM")
    ids = torch.randint(0, 300, (2, 20))
    with torch.no_grad():
        ours = CustomLLM.from_pretrained(final).eval()(ids).logits
        torch.testing.assert_close(stock(ids).logits, ours, rtol=0, atol=1e-5)


def test_a_text_generation_pipeline_chats_with_it(final):
    generate = pipeline("text-generation", model=final, device="cpu")
    reply = generate(MESSAGES, max_new_tokens=4, do_sample=False)[0]["generated_text"][-1]
    assert reply["role"] == "assistant"
    tokenizer = AutoTokenizer.from_pretrained(final)
    prompt = tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    output = CustomLLM.from_pretrained(final).generate(**prompt, max_new_tokens=4, do_sample=False)
    new = output[0, prompt["input_ids"].shape[1] :]
    assert reply["content"] == tokenizer.decode(new, skip_special_tokens=True)


@pytest.mark.peer
@pytest.mark.parametrize("model_class", [AutoModelForCausalLM, CustomLLM], ids=["stock", "ours"])
def test_peft_trains_a_lora_adapter_on_it(final, tmp_path, model_class):
    peft = peer("peft")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model_class.from_pretrained(final), settings)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    ids, losses = torch.randint(0, 300, (2, 16)), []
    for _ in range(10):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(model_class.from_pretrained(final), tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(ids).logits, model.eval()(ids).logits)


@pytest.mark.peer
def test_trls_sft_trainer_trains_it_two_steps(final, tmp_path):
    turns = [*MESSAGES, {"role": "assistant", "content": "宇宙洪荒。"}]
    trainer = trl_sft_trainer(
        tmp_path,
        final,
        AutoTokenizer.from_pretrained(final),
        [turns] * 4,
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[1] < losses[0]


TASK = """\
task: toolkit_local
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}\\n答案："
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.mark.peer
def test_lm_evaluation_harness_scores_it_on_a_local_task(final, tmp_path):
    lm_eval = peer("lm_eval")
    from lm_eval.tasks import TaskManager

    questions = [
        {"question": f"{i}加1是几？", "choices": [str(i + 1), "天地", "无"], "answer": 0}
        for i in range(6)
    ]
    data = write_jsonl(tmp_path / "questions.jsonl", questions)
    (tmp_path / "task.yaml").write_text(TASK.format(data=data), encoding="utf-8")
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={final},dtype=float32",
        tasks=["toolkit_local"],
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
    )
    assert 0 <= results["results"]["toolkit_local"]["acc,none"] <= 1
    assert results["n-samples"]["toolkit_local"]["effective"] == 6
    # evaluate.py's summed score agrees with the harness's on the same questions.
    from evaluate import multiple_choice, read_questions, summarize_choices
    from tokenizer import create_tokenizer

    rights = multiple_choice(
        CustomLLM.from_pretrained(final).eval(),
        create_tokenizer(model_path=final),
        read_questions(data),
        0,
        True,
        32,
    )
    scores, _ = summarize_choices(rights)
    assert scores["all"]["summed"] == pytest.approx(results["results"]["toolkit_local"]["acc,none"])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_up(url: str, server: subprocess.Popen, seconds: int = 120):
    for _ in range(seconds * 2):
        assert server.poll() is None, server.communicate()[0].decode()
        try:
            return urllib.request.urlopen(url, timeout=2).read()
        except OSError:
            time.sleep(0.5)
    raise TimeoutError(url)


@pytest.mark.peer
def test_the_openai_client_talks_to_the_server_on_loopback(final):
    openai, _ = peer("openai"), peer("uvicorn")
    port = free_port()
    command = [sys.executable, ROOT / "chat.py", "--model", final, "--serve", "--port", str(port)]
    server = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        wait_until_up(f"http://127.0.0.1:{port}/health", server)
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        asked = {"model": final, "messages": MESSAGES, "max_tokens": 12, "temperature": 0}
        answer = client.chat.completions.create(**asked).choices[0].message
        assert answer.role == "assistant"
        streamed = client.chat.completions.create(**asked, stream=True)
        deltas = [chunk.choices[0].delta.content or "" for chunk in streamed if chunk.choices]
        whole, stream = answer.content.strip(), "".join(deltas).strip()
        # max_tokens may cut within a character: transformers' stream keeps that last token back.
        assert whole == stream or (whole.endswith("\ufffd") and whole.startswith(stream) and stream)
        listening = subprocess.run(["cat", "/proc/net/tcp"], capture_output=True, text=True)
        rows = [r.split() for r in listening.stdout.splitlines()[1:]]
        addresses = [r[1] for r in rows if r[1].endswith(f":{port:04X}") and r[3] == "0A"]
        assert addresses in ([], [f"0100007F:{port:04X}"])  # 127.0.0.1 alone
    finally:
        with contextlib.suppress(ProcessLookupError):  # it failed: say why, and not that it is gone
            os.killpg(server.pid, 9)
        server.wait()


def test_its_configuration_is_plain_json_and_its_weights_are_safetensors_alone(final):
    names = {entry.name for entry in os.scandir(final)}
    assert "model.safetensors" in names
    assert not {n for n in names if n.endswith((".bin", ".pt", ".pkl", ".py"))}
    config = json.loads((ROOT / final / "config.json").read_text())
    assert "auto_map" not in config
