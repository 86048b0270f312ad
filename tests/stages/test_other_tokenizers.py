"""Other projects' tokenizers go through all stages, and what is trained is what chat.py asks."""

import pytest
from foreign import MAKERS, puts_before, save, sentencepiece
from tiny import dpo_config, pretrain_config, sft_config
from transformers import AutoTokenizer

from chat import Chat
from corpus.chat_format import Renderer, flatten
from corpus.exam import Question
from dpo_train import train_dpo
from engine.generation import Sampling
from engine.model_folder import open_model_folder
from evaluate import bits_per_byte, multiple_choice
from sft_train import train_sft
from tokenizer import create_tokenizer, encode_plain, token_byte_lengths
from train_llm import train

GREEDY = Sampling(max_new_tokens=4)
SHORT = {"max_steps": 2, "num_epochs": 1, "eval_every": 0, "save_every": 0}
TALK = [
    {"role": "system", "content": "你是 a helper。"},
    {"role": "user", "content": "天地 12345？"},
    {"role": "assistant", "content": "玄黄 don't\n  了。"},
    {"role": "user", "content": " 再问"},
    {"role": "assistant", "content": "答"},
]
AWKWARD = ["天地玄黄😀", "two  spaces and\ttab\n", " leading", "é 12345 ①", "<s></s><|im_end|>"]


@pytest.fixture(params=[*MAKERS, "qwen3_tokenizer"])
def folder(request, tmp_path, real_data) -> str:
    if request.param in MAKERS:
        return MAKERS[request.param](tmp_path / request.param)
    return str(real_data(request.param))


@pytest.fixture(params=MAKERS)
def small(request, tmp_path) -> str:
    return MAKERS[request.param](tmp_path / request.param)


def test_training_data_and_template_give_the_same_ids_and_the_text_comes_back(small):
    tokenizer = create_tokenizer(model_path=small)
    expected = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    ids, mask = (array.tolist() for array in flatten(Renderer(tokenizer).render([TALK])[0]))
    assert ids == expected["input_ids"]
    assert mask == [bool(value) for value in expected["assistant_masks"]]
    prompt = tokenizer.apply_chat_template(TALK[:2], add_generation_prompt=True, return_dict=True)
    assert ids[: len(prompt["input_ids"])] == prompt["input_ids"]
    for text in AWKWARD:
        (found,) = encode_plain(tokenizer, [text])
        assert tokenizer.decode(found) == text
        assert token_byte_lengths(tokenizer)[found].sum() == len(text.encode())


@pytest.mark.parametrize("legacy", [True, False])
def test_llamas_own_class_makes_the_same_ids_when_it_is_saved_and_loaded(tmp_path, legacy):
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": legacy}
    backend = puts_before(sentencepiece(legacy), "<s>")
    folder = save(tmp_path / "a", backend, **config, tokenizer_class="LlamaTokenizer")
    tokenizer = create_tokenizer(model_path=folder)
    tokenizer.save_pretrained(tmp_path / "b")
    texts = ["天地 ab", " 前 后 "]
    ids = encode_plain(tokenizer, texts)
    assert [tokenizer.decode(one) for one in ids] == texts
    assert encode_plain(AutoTokenizer.from_pretrained(tmp_path / "b"), texts) == ids


@pytest.mark.slow
def test_a_tokenizer_goes_through_every_stage(folder, tmp_path, capsys):
    base = train(wandb_config=pretrain_config(tmp_path, tokenizer_path=folder, **SHORT))
    talk = Chat(base, GREEDY, None, None)
    assert not talk.is_chat_model, "a base model continues the text, whatever its end token is"
    expected = encode_plain(talk.tokenizer, ["天地"])[0]
    assert talk.prompt_ids("天地")[0].tolist() == expected, "nothing stands before it"
    talk.reply("天地")
    tuned = train_sft(wandb_config=sft_config(tmp_path, base, **SHORT))
    assert Chat(tuned, GREEDY, None, None).is_chat_model
    aligned = train_dpo(wandb_config=dpo_config(tmp_path, tuned, **SHORT))
    talk = Chat(aligned, GREEDY, None, "你是助手。")
    assert talk.is_chat_model
    talk.reply("问")
    assert talk.messages[-1]["role"] == "assistant"
    model, tokenizer = open_model_folder(aligned)
    scores = bits_per_byte(model, tokenizer, ["天地玄黄，宇宙洪荒。 abc"], 32, 16)
    assert scores["bits_per_byte"] > 0
    questions = [Question("law", "问？", ["甲", "乙"], 1)] * 2
    assert len(multiple_choice(model, tokenizer, questions, 1, False, 64)["law"]["summed"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimind", "mistral"])
def test_a_tokenizer_that_gguf_cannot_hold_is_named_before_training(tmp_path, capsys, name):
    path = MAKERS[name](tmp_path / name)
    train(wandb_config=pretrain_config(tmp_path, tokenizer_path=path, **SHORT))
    before, _, _ = capsys.readouterr().out.partition("step 1/")
    named = "export_gguf.py will refuse this tokenizer. Only byte-level BPE" in before
    assert named == (name == "mistral")
