"""A model that talks, or continues text: what chat.py does in the terminal and on its page."""

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from engine.model_folder import fast_inference, is_chat_model, open_model_folder
from tokenizer import encode_plain


class Chat:
    """A model, its tokenizer and one conversation.

    opened: (model, tokenizer) of the folder, where they are loaded already.
    """

    def __init__(
        self, folder: str, sampling: dict, seed: int | None, system: str | None, opened=None
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
        room = max(16, self.model.config.max_seq_len - self.sampling["max_new_tokens"])
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
        """Answer (chat model) or continue (base model) a text. A seed gives the same reply."""
        input_ids = self.prompt_ids(text).to(self.model.device)
        if self.seed is not None:
            torch.manual_seed(self.seed)
        with fast_inference(self.model):
            output = self.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([stop] if stop else []),
                **self.sampling,
            )
        answer = self.tokenizer.decode(output[0, input_ids.shape[1] :], skip_special_tokens=True)
        if self.is_chat_model:
            self.messages.append({"role": "assistant", "content": answer})
        return answer


class StopOnInterrupt(StoppingCriteria):
    """Ends generation when it is told to. What was generated is kept."""

    def __init__(self):
        self.interrupted = False

    def __call__(self, input_ids, scores, **kwargs) -> torch.Tensor:
        return torch.full((len(input_ids),), self.interrupted, device=input_ids.device)


def make_sampling(
    max_new_tokens: int, temperature: float, top_p: float, repetition_penalty: float
) -> dict:
    """What generate() takes. Temperature 0 is always the likeliest token.

    Raises:
        ValueError: a value is out of its range.
    """
    ranges = {
        "max_new_tokens": (max_new_tokens, max_new_tokens >= 1, "at least 1"),
        "temperature": (temperature, temperature >= 0, "at least 0"),
        "top_p": (top_p, 0 < top_p <= 1, "above 0 and at most 1"),
        "repetition_penalty": (repetition_penalty, repetition_penalty > 0, "above 0"),
    }
    for name, (value, is_right, wanted) in ranges.items():
        if not is_right:
            raise ValueError(f"--{name} {value} must be {wanted}.")
    fixed = {"max_new_tokens": max_new_tokens, "repetition_penalty": repetition_penalty}
    if temperature == 0:
        return fixed | {"do_sample": False}
    return fixed | {"do_sample": True, "temperature": temperature, "top_p": top_p}
