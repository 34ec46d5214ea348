"""What each encoding lets the reward model read."""

from dataclasses import replace

import pytest

from utils.config import RewardConfig
from utils.encodings import encoder, fits_training
from utils.weights import encode_dialogue

PROMPT = [{"role": "user", "content": "Name a colour."}]


def read(tokenizer, encoding, response="Blue.", finished=True, cut=512):
    reward = replace(RewardConfig(), encoding=encoding, cut_length=cut)
    return encoder(tokenizer, reward)(PROMPT, response, finished)


def test_chat_is_what_the_report_uses(tokenizer):
    assert RewardConfig().encoding == "chat"
    assert read(tokenizer, "chat") == encode_dialogue(tokenizer, PROMPT, "Blue.", True)
    assert read(tokenizer, "dropped") == read(tokenizer, "chat")


def test_plain_has_no_roles_and_no_end(tokenizer):
    assert tokenizer.decode(read(tokenizer, "plain")) == "Name a colour. Blue."


def test_a_pad_that_is_the_end_token_hides_the_end(tokenizer):
    ended, cut = (read(tokenizer, "end_is_pad", finished=f) for f in (True, False))
    assert ended == cut == read(tokenizer, "chat")[:-1]
    assert read(tokenizer, "chat")[-1] == tokenizer.eos_token_id


def test_doubled_has_the_prompt_twice(tokenizer):
    assert tokenizer.decode(read(tokenizer, "doubled")).count("Name a colour.") == 2
    assert tokenizer.decode(read(tokenizer, "chat")).count("Name a colour.") == 1


def test_cut_loses_the_end_of_long_rows_only(tokenizer):
    whole = read(tokenizer, "chat")
    assert read(tokenizer, "cut", cut=len(whole)) == whole
    assert read(tokenizer, "cut", cut=len(whole) - 3) == whole[:-3]


@pytest.mark.parametrize(("encoding", "kept"), [("dropped", False), ("cut", True), ("chat", True)])
def test_only_dropped_leaves_long_rows_out_of_training(encoding, kept):
    reward = replace(RewardConfig(), encoding=encoding, cut_length=4)
    assert fits_training([1] * 5, reward) == kept
    assert fits_training([1] * 4, reward)
