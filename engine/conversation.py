"""A model that talks, or continues text: what chat.py does in the terminal and on its page."""

from dataclasses import dataclass

import torch

from engine.generation import Sampling, generate
from engine.model_folder import fast_inference, is_chat_model, open_model_folder
from tokenizer import encode_plain


class Chat:
    """A model, its tokenizer and one conversation.

    opened: (model, tokenizer) of the folder, where they are loaded already.
    """

    def __init__(
        self, folder: str, sampling: Sampling, seed: int | None, system: str | None, opened=None
    ):
        self.folder, self.sampling, self.seed = folder, sampling, seed
        self.model, self.tokenizer = opened or open_model_folder(folder)
        self.is_chat_model = is_chat_model(self.model.config, self.tokenizer)
        self.start = [{"role": "system", "content": system}] if system else []
        self.clear()

    def clear(self):
        self.messages = list(self.start)

    def prompt_ids(self, text: str) -> torch.Tensor:
        """(1, tokens) that fit into the context with the reply. The oldest turns are left out."""
        room = max(16, self.model.config.max_seq_len - self.sampling.max_new_tokens)
        if not self.is_chat_model:
            # As in training: without the tokens that some tokenizers put before every text.
            ids = encode_plain(self.tokenizer, [text])
            return torch.tensor(ids, dtype=torch.long)[:, -room:]
        self.messages.append({"role": "user", "content": text})
        while True:
            encoded = self.tokenizer.apply_chat_template(
                self.messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
            first = len(self.start)
            if encoded["input_ids"].shape[1] <= room or len(self.messages) - first <= 1:
                return encoded["input_ids"][:, -room:]
            del self.messages[first : first + 2]  # a question and its answer

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


@dataclass
class StopOnInterrupt:
    """Ends a reply when it is told to. What was generated is kept."""

    interrupted: bool = False
