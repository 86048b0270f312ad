"""A model that talks, or continues text: what chat.py does in the terminal and on its page."""

import re
from dataclasses import dataclass

import torch

from engine.generation import Sampling, generate
from engine.model_folder import fast_inference, is_chat_model, open_model_folder
from tokenizer import encode_plain


class Chat:
    """A model, its tokenizer and one conversation.

    opened: (model, tokenizer) of the folder, where they are loaded already.
    left_out: tokens at the beginning of the last question that did not fit into the context.
    """

    left_out = 0

    def __init__(
        self, folder: str, sampling: Sampling, seed: int | None, system: str | None, opened=None
    ):
        if seed is not None and not 0 <= seed < 2**63:
            raise ValueError(f"--seed {seed} must be at least 0 and below 2**63.")
        self.folder, self.sampling, self.seed = folder, sampling, seed
        self.model, self.tokenizer = opened or open_model_folder(folder)
        self.is_chat_model = is_chat_model(self.model.config, self.tokenizer)
        self.start = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self):
        self.messages = list(self.start)

    def prompt_ids(self, text: str) -> torch.Tensor:
        """(1, tokens) that fit into the context with the reply, which gets at most half of it.

        The oldest turns are left out, and then the beginning of the question.
        """
        context = self.model.config.max_seq_len
        room = max(context - context // 2, context - self.sampling.max_new_tokens)
        if not self.is_chat_model:
            # As in training: without the tokens that some tokenizers put before every text.
            return self._last(room, encode_plain(self.tokenizer, [text])[0])
        self.messages.append({"role": "user", "content": text})
        while True:
            ids = chat_ids(self.tokenizer, self.messages)
            first = len(self.start)
            if len(ids) <= room or len(self.messages) - first <= 1:
                return self._last(room, ids)
            del self.messages[first : first + 2]  # a question and its answer

    def _last(self, room: int, ids: list[int]) -> torch.Tensor:
        self.left_out = max(0, len(ids) - room)
        return torch.tensor([ids[-room:]])

    def what_was_left_out(self) -> str:
        """Of the last question, in a sentence; "": nothing."""
        if not self.left_out:
            return ""
        return (
            f"the first {self.left_out:,} tokens of this were left out: the model's context is "
            f"{self.model.config.max_seq_len:,} tokens (a lower max_new_tokens leaves more of it)"
        )

    def reply(self, text: str, streamer=None, stop=None) -> str:
        """Answer (chat model) or continue (base model) a text. A seed gives the same reply.

        streamer: gets each new token, as transformers' streamers do. stop: a StopOnInterrupt.
        """
        prompt, new_ids = self.prompt_ids(text)[0].tolist(), []
        seeds = None if self.seed is None else [self.seed]
        with fast_inference(self.model):
            for [(_, token)] in generate(self.model, [prompt], self.sampling, seeds):
                new_ids.append(token)
                if streamer:
                    streamer.put(torch.tensor([token]))
                if stop and stop.interrupted:
                    break
        if streamer:
            streamer.end()
        answer = self.tokenizer.decode(new_ids, skip_special_tokens=True)
        if self.is_chat_model:
            self.messages.append({"role": "assistant", "content": answer})
        return answer


def chat_ids(tokenizer, messages: list[dict]) -> list[int]:
    """The ids of messages up to where the answer begins, as a chat template puts them.

    What a person typed is encoded by itself, as in training: nothing in it becomes a control token.
    """
    marked = [
        message | {"content": f"\ue000{number}\ue001"}
        if message["role"] != "assistant"
        else message
        for number, message in enumerate(messages)
    ]
    text = tokenizer.apply_chat_template(marked, tokenize=False, add_generation_prompt=True)
    ids: list[int] = []
    for place, piece in enumerate(re.split("\ue000(\\d+)\ue001", text)):
        if place % 2:
            ids += encode_plain(tokenizer, [messages[int(piece)]["content"]])[0]
        else:
            ids += tokenizer(piece, add_special_tokens=False)["input_ids"]
    return ids


@dataclass
class StopOnInterrupt:
    """Ends a reply when it is told to. What was generated is kept."""

    interrupted: bool = False
