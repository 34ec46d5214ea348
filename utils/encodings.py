"""How a dialogue becomes the tokens that a reward model reads, with the mistakes to compare.

`chat` is the one that the report uses. The others are mistakes that are easily made and seldom
noticed, since a reward model trained with them still learns something; they are there so that
their cost can be measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from utils.config import RewardConfig
from utils.weights import encode_dialogue

Messages = Sequence[Mapping[str, str]]
Encode = Callable[[Messages, str, bool], list[int]]


def encoder(tokenizer: PreTrainedTokenizerBase, reward: RewardConfig) -> Encode:
    """Return the function (messages, response, finished) -> token ids of `reward.encoding`.

    - "chat": the chat template, and the end-of-turn token where the response ended.
    - "plain": prompt and response joined by a blank, without roles or an end.
    - "end_is_pad": the padding token is the end-of-turn token. The head is read at the last token
      that is no padding, so it never sees whether a response ended.
    - "doubled": the prompt twice, as when a trainer prepends it to a dialogue that has it already.
    - "cut": `chat`, cut on the right at `reward.cut_length` tokens.
    - "dropped": `chat`; longer rows are left out of training, see `fits_training`.
    """

    def encode(messages: Messages, response: str, finished: bool) -> list[int]:
        if reward.encoding == "plain":
            text = " ".join([message["content"] for message in messages] + [response])
            return tokenizer(text, add_special_tokens=False)["input_ids"]
        if reward.encoding == "end_is_pad":
            return encode_dialogue(tokenizer, messages, response, False)
        if reward.encoding == "doubled":
            return encode_dialogue(tokenizer, [*messages, *messages], response, finished)
        ids = encode_dialogue(tokenizer, messages, response, finished)
        return ids[: reward.cut_length] if reward.encoding == "cut" else ids

    return encode


def fits_training(ids: Sequence[int], reward: RewardConfig) -> bool:
    """Tell whether a row is trained on: all are, but for long ones of the encoding "dropped"."""
    return reward.encoding != "dropped" or len(ids) <= reward.cut_length
