"""Models of other families, saved by the tests: tokenizer rules, sampling, scoring, refusals."""

import dataclasses

import pytest
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from utils.config import PROFILES, ModelConfig
from utils.experiments import check as architecture
from utils.experiments.check import check_config, try_model
from utils.models import body as models
from utils.models import weights
from utils.models.body import load_policy, load_reward_base
from utils.models.weights import (
    ModelError,
    encode_dialogue,
    encode_prompt,
    load_tokenizer,
    pad_right,
)
from utils.reinforce.sampling import choose_tokens, completion_logprobs, sample, sampling_noise

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
SPACED = (
    "{{ bos_token }}{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} {{ eos_token }}{% endif %}{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA_TOKENS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
]
FAMILIES = {
    "llama": (
        LLAMA_TOKENS,
        {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
        HEADERS,
        transformers.LlamaConfig,
        {"attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": (
        CHATML_TOKENS,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        CHATML,
        transformers.Qwen2Config,
        {"tie_word_embeddings": True},
    ),
    "mistral": (
        ["<unk>", "<s>", "</s>"],
        {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
        SPACED,
        transformers.MistralConfig,
        {"sliding_window": 128},
    ),
}
ASK = [{"role": "user", "content": "Name a colour."}]
DIALOGUES = [
    ASK,
    [
        {"role": "user", "content": "the red and the blue"},
        {"role": "assistant", "content": "red"},
        {"role": "user", "content": "and another, please"},
    ],
    [{"role": "user", "content": "a"}],
]
TEXT = [
    "Name a colour. user assistant system [INST] [/INST]",
    "the red and the blue and another, please\n",
]
TEMPERATURE = 0.7


def make_tokenizer(tokens, settings, template):
    """A byte-level BPE over the few letters of `TEXT`, so that an end is soon drawn by chance."""
    tokenizer = Tokenizer(BPE(unk_token=settings.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=60, special_tokens=tokens, show_progress=False)
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, model_max_length=256, **settings
    )


def save(folder, tokenizer, config_class=transformers.LlamaConfig, vocabulary=None, **options):
    """Save a random model of two layers, with biases that are not zero, and its tokenizer."""
    config = config_class(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        **options,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(weight.data, std=0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(name=str(folder))


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """The name of a family and the configuration of its model."""
    tokens, settings, template, config_class, options = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = make_tokenizer(tokens, settings, template)
    return request.param, save(folder, tokenizer, config_class, **options)


def with_tokenizer(folder, tokens, settings, template, **options):
    return save(folder, make_tokenizer(tokens, settings, template), **options)


def moved(model, seed=0):
    """Give the adapters values other than the identity."""
    torch.manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight.data, std=0.1)
    return model


# The end of a turn, and pads


def test_the_end_of_turn_is_the_templates(family, capsys):
    name, config = family
    tokenizer = load_tokenizer(config)
    expected = {"llama": "<|eot_id|>", "qwen2": "<|im_end|>", "mistral": "</s>"}[name]
    assert tokenizer.eos_token == expected
    printed = capsys.readouterr().out
    assert printed.count("[model]") == (name == "llama")
    if name == "llama":
        assert "ends an answer with <|eot_id|>" in printed
        assert "<|end_of_text|>" in printed
        load_tokenizer(config)
        assert capsys.readouterr().out == "", "said once is enough"


def test_a_finished_dialogue_is_the_template_of_the_whole(family):
    name, config = family
    tokenizer = load_tokenizer(config)
    whole = [*ASK, {"role": "assistant", "content": "red"}]
    text = tokenizer.apply_chat_template(whole, tokenize=False)
    found = encode_dialogue(tokenizer, ASK, "red", finished=True)
    assert found[-1] == tokenizer.eos_token_id
    same = (lambda t: t.replace(" red ", "red")) if name == "mistral" else lambda t: t
    assert tokenizer.decode(found) == same(text).removesuffix("\n")
    starts = found.count(tokenizer.bos_token_id) if tokenizer.bos_token else 0
    assert starts == (name != "qwen2"), "the template writes the start token, once"
    cut = encode_dialogue(tokenizer, ASK, "red", finished=False)
    assert cut == found[:-1]
    answer = found[len(encode_prompt(tokenizer, ASK)) :]
    assert tokenizer.decode(answer, skip_special_tokens=True) == "red"


def test_the_pad_token_is_none_that_a_dialogue_holds(family):
    name, config = family
    tokenizer = load_tokenizer(config)
    expected = {"llama": "<|end_of_text|>", "qwen2": "<|endoftext|>", "mistral": "<unk>"}[name]
    assert tokenizer.pad_token == expected
    ids = encode_dialogue(tokenizer, DIALOGUES[1], "red", finished=True)
    assert tokenizer.pad_token_id not in ids


def test_an_end_token_that_is_not_marked_special(tmp_path):
    settings = {"eos_token": "<|endoftext|>"}
    tokenizer = make_tokenizer(["<|endoftext|>", "<|im_start|>"], settings, CHATML)
    tokenizer.add_tokens(AddedToken("<|im_end|>", special=False, normalized=False))
    loaded = load_tokenizer(save(tmp_path, tokenizer))
    assert loaded.eos_token == "<|im_end|>"
    assert len(loaded) == len(tokenizer), "the token is there already; a new one has no embedding"
    ids = encode_dialogue(loaded, ASK, "red", finished=True)[-4:]
    assert loaded.decode(ids, skip_special_tokens=True).endswith("red"), (
        "the end token must not reach the text that a reward model reads"
    )


def test_a_pad_token_outside_the_embedding_is_replaced(tmp_path):
    tokenizer = make_tokenizer(*FAMILIES["qwen2"][:3])
    inside = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == inside
    loaded = load_tokenizer(save(tmp_path, tokenizer, vocabulary=inside))
    assert loaded.pad_token == "<|endoftext|>"


def test_an_end_token_outside_the_embedding_is_refused(tmp_path):
    tokenizer = make_tokenizer(["<|endoftext|>"], {"eos_token": "<|endoftext|>"}, CHATML)
    inside = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(ModelError, match=rf"'<\|im_end\|>\\n'.*among the model's {inside}"):
        load_tokenizer(save(tmp_path, tokenizer, vocabulary=inside))


def test_nothing_to_pad_with(tmp_path):
    settings = {"eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    config = with_tokenizer(tmp_path, CHATML_TOKENS[1:], settings, CHATML)
    with pytest.raises(ModelError, match=r"no pad token.*nor an unused special token"):
        load_tokenizer(config)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PLAIN, r"ends an answer with '\\nassistant: ', which begins with no special token"),
        ("{{ messages[0]['content'] }}<|im_end|>", "an answer with '', which begins with no"),
        (None, "has no chat template"),
    ],
    ids=["plain", "drops the answer", "none"],
)
def test_a_template_without_an_end(tmp_path, template, message):
    config = with_tokenizer(tmp_path, CHATML_TOKENS, {"eos_token": "<|im_end|>"}, template)
    with pytest.raises(ModelError, match=message):
        load_tokenizer(config)


def test_a_dialogue_that_the_template_refuses(tmp_path):
    tokens, settings, template, *_ = FAMILIES["mistral"]
    tokenizer = load_tokenizer(with_tokenizer(tmp_path, tokens, settings, template))
    for roles in (("system", "user"), ("user", "user"), ("user", "assistant", "assistant")):
        messages = [{"role": role, "content": "a"} for role in roles]
        with pytest.raises(
            ModelError, match=rf"roles {', '.join(roles)}: roles must alternate.*out of the data"
        ):
            encode_prompt(tokenizer, messages)
    assert encode_prompt(tokenizer, ASK)


def test_a_folder_without_a_tokenizer(tmp_path):
    transformers.LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="its tokenizer included"):
        load_tokenizer(ModelConfig(name=str(tmp_path)))


# Sampling and log-probabilities


def slow_sample(model, prompt, noise, eos):
    """One row, without cache, mask or batch, through the model's own forward."""
    ids, total = list(prompt), 0.0
    for uniform in noise:
        logits = model(input_ids=torch.tensor([ids])).logits[:, -1]
        token = choose_tokens(logits, uniform[None], TEMPERATURE).item()
        total += (logits / TEMPERATURE).log_softmax(-1)[0, token].item()
        ids.append(token)
        if token == eos:
            break
    return ids[len(prompt) :], total


@torch.no_grad()
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_sampling_is_the_models_own_forward(exact, family, quantization):
    config = dataclasses.replace(family[1], quantization=quantization)
    tokenizer, policy = load_tokenizer(config), moved(load_policy(config, 4, 8, seed=0))
    prompts = [encode_prompt(tokenizer, messages) for messages in DIALOGUES * 4]
    noise = sampling_noise(1, len(prompts), 20)
    drawn = sample(policy, tokenizer, prompts, noise, TEMPERATURE, batch_size=5)
    log_probs, _ = completion_logprobs(
        policy, prompts, drawn.completion_ids, TEMPERATURE, tokenizer.pad_token_id
    )
    assert set(drawn.finished) == {True, False}, "both endings must be seen"
    for row, prompt in enumerate(prompts):
        ids, total = slow_sample(policy, prompt, noise[row], tokenizer.eos_token_id)
        assert drawn.completion_ids[row] == ids
        assert log_probs[row].item() == pytest.approx(total, abs=1e-3)
    with policy.disable_adapter():
        reference, _ = completion_logprobs(
            policy, prompts, drawn.completion_ids, TEMPERATURE, tokenizer.pad_token_id
        )
    assert (reference - log_probs).abs().max() > 0.1, "the adapters had no part in it"


# Scoring


@torch.no_grad()
@pytest.mark.parametrize("labels", [1, 10])
def test_the_score_is_read_at_the_last_real_token(exact, family, labels):
    config = family[1]
    tokenizer = load_tokenizer(config)
    model = moved(load_reward_base(config, labels, 4, 8, first_layer=1, seed=0))
    rows = [
        encode_dialogue(tokenizer, messages, answer, finished)
        for messages, answer in zip(DIALOGUES, ["red", "the blue and the red", ""], strict=True)
        for finished in (True, False)
    ]
    base = model.base_model.model
    head = base.score.modules_to_save["default"]
    head.weight.mul_(20)  # scores of the size that training gives them
    last = torch.stack(
        [head(base.model(input_ids=torch.tensor([row])).last_hidden_state[0, -1]) for row in rows]
    )
    assert (last[0::2] - last[1::2]).abs().max(-1).values.min() > 1e-3, "the end token is read"
    for multiple in (1, 32, 128):
        together = model(input_ids=pad_right(rows, tokenizer.pad_token_id, multiple)).logits
        assert together.shape == (len(rows), labels)
        torch.testing.assert_close(together, last, atol=2e-4, rtol=1e-4)


# Biases


def biases_of(model):
    return {n: p for n, p in model.named_parameters() if n.endswith("bias") and "lora" not in n}


def test_biases_survive_four_bits_and_their_expansion(family):
    name, config = family
    ids, logits = torch.arange(24).reshape(2, 12), {}
    for expand in (True, False):
        chosen = dataclasses.replace(config, expand_4bit=expand)
        model = load_policy(chosen, 4, 8, seed=0)
        assert models.is_expanded(model) == expand
        assert len(biases_of(model)) == {"llama": 14, "qwen2": 6, "mistral": 0}[name]
        with torch.no_grad():
            logits[expand] = model(input_ids=ids.to(model.device)).logits.float()
            if expand:
                for bias in biases_of(model).values():
                    bias.zero_()
                without = model(input_ids=ids.to(model.device)).logits.float()
    distance = (logits[True] - logits[False]).norm() / logits[True].norm()
    assert distance < 0.05
    if name != "mistral":
        assert (without - logits[True]).norm() / logits[True].norm() > 0.2


def test_merged_lora_keeps_biases(exact, family, monkeypatch):
    config = family[1]
    merged = moved(load_policy(config, 4, 8, seed=0))
    monkeypatch.setattr(models, "merged_lora", lambda lora: lora)
    plain = load_policy(config, 4, 8, seed=0)
    plain.load_state_dict(merged.state_dict())
    for model, kind in ((merged, "MergedLoraLinear"), (plain, "Linear")):
        assert {type(m).__name__ for m in model.modules() if hasattr(m, "lora_A")} == {kind}
    ids = torch.arange(24).reshape(2, 12)
    gradients, logits = [], []
    for model in (merged, plain):
        found = model(input_ids=ids).logits
        found.log_softmax(-1)[..., 5].sum().backward()
        logits.append(found)
        trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert not set(trained) & set(biases_of(model)), "biases stay frozen"
        gradients.append(trained)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-4, rtol=1e-4)
    assert len(gradients[0]) == 2 * 2 * 7
    for key, gradient in gradients[0].items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, gradients[1][key], atol=1e-4, rtol=1e-3)


# Refusals

LIKE_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.2,
}


def saved(folder, config_class, **options):
    """Save a random model with the tokenizer of `qwen2`."""
    tokenizer = make_tokenizer(*FAMILIES["qwen2"][:3])
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(vocab_size=len(tokenizer), **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return ModelConfig(name=str(folder))


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        ("Gemma2Config", LIKE_LLAMA | {"head_dim": 16, "final_logit_softcapping": 3.0}, "body and"),
        ("CohereConfig", LIKE_LLAMA, "body and output layer alone"),
        ("GraniteConfig", LIKE_LLAMA, "Unrecognized configuration class"),
        ("MambaConfig", {"hidden_size": 64, "num_hidden_layers": 2}, "Error"),
        ("BloomConfig", {"hidden_size": 64, "n_layer": 2, "n_head": 4}, "Error"),
        ("GPT2Config", {"n_embd": 64, "n_layer": 2, "n_head": 4}, "Error"),
    ],
)
@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_models_that_fail_the_first_try(tmp_path, quantization, config_class, options, message):
    config = saved(tmp_path, config_class, **options)
    with pytest.raises(ModelError, match=rf"first try.*{message}.*decoder-only chat model"):
        try_model(dataclasses.replace(config, quantization=quantization), 0)


@pytest.mark.parametrize(
    "config_class",
    ["LlamaConfig", "Qwen2Config", "Qwen3Config", "MistralConfig", "Phi3Config", "GemmaConfig"],
)
def test_models_that_pass_the_first_try(tmp_path, config_class):
    options = {"head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    try_model(saved(tmp_path, config_class, **LIKE_LLAMA, **options), 1)


def test_a_head_of_another_name_fails_the_first_try(tmp_path, monkeypatch):
    config = saved(tmp_path, "LlamaConfig", **LIKE_LLAMA)

    def renamed(*args, **options):
        model = load_reward_base(*args, **options)
        inner = model.base_model.model
        inner.score, inner.classifier = None, inner.score
        return inner

    monkeypatch.setattr(architecture, "load_reward_base", renamed)
    with pytest.raises(ModelError, match="first try"):
        try_model(config, 0)


def test_a_cache_that_forgets_fails_the_first_try(tmp_path, monkeypatch):
    config = saved(tmp_path, "LlamaConfig", **LIKE_LLAMA)

    def forgetful(policy, tokenizer, prompts, noise, temperature):
        drawn = sample(policy, tokenizer, prompts, noise, temperature)
        last = sample(policy, tokenizer, [drawn.completion_ids[0][:1]], noise, temperature)
        drawn.completion_ids[0][1] = last.completion_ids[0][0]
        return drawn

    monkeypatch.setattr(architecture, "sample", forgetful)
    with pytest.raises(ModelError, match="with a cache it takes other tokens"):
        try_model(config, 0)


@pytest.mark.parametrize(
    ("config_class", "options", "message"),
    [
        ("T5Config", {}, "is an encoder-decoder model"),
        ("BartConfig", {}, "is an encoder-decoder model"),
        ("Gemma3Config", {}, "reads more than text"),
        (
            "LlamaConfig",
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"quantised already \(gptq\)",
        ),
    ],
)
def test_configurations_that_do_not_suit(tmp_path, config_class, options, message):
    getattr(transformers, config_class)(**options).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"{message}.*decoder-only chat model"):
        check_config(profile_of(ModelConfig(name=str(tmp_path))))


def test_a_model_that_needs_its_own_code(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}'
    )
    (tmp_path / "own.py").write_text("raise SystemExit('this code must not run')\n")
    with pytest.raises(ModelError, match="no code of its own"):
        check_config(profile_of(ModelConfig(name=str(tmp_path))))


def profile_of(config, prompt=100, completion=28, length=128, first_layer=0):
    smoke = PROFILES["smoke"]
    return dataclasses.replace(
        smoke,
        model=config,
        data=dataclasses.replace(smoke.data, max_prompt_length=prompt, max_length=length),
        reinforce=dataclasses.replace(smoke.reinforce, max_completion_length=completion),
        reward=dataclasses.replace(smoke.reward, first_layer=first_layer),
    )


def test_texts_longer_than_the_model_reads(family):
    name, config = family
    check_config(profile_of(config, length=256))
    with pytest.raises(ModelError, match=r"^data\.max_length = 257 tokens.*positions for 256"):
        check_config(profile_of(config, length=257))
    with pytest.raises(ModelError, match=r"max_completion_length = 257 tokens.*256"):
        check_config(profile_of(config, prompt=200, completion=57))
    if name == "mistral":
        with pytest.raises(ModelError, match=r"= 129 tokens.*only the last 128"):
            check_config(profile_of(config, completion=29))
    else:
        check_config(profile_of(config, completion=156))


def test_every_profile_fits_its_model():
    for profile in PROFILES.values():
        if "/" not in profile.model.name:
            check_config(profile)


def test_adapters_above_the_last_layer(family):
    with pytest.raises(ModelError, match=r"reward\.first_layer = 2, but .* has 2 layers"):
        check_config(profile_of(family[1], first_layer=2))


# Names


@pytest.mark.parametrize("revision", [None, "v1.0"])
def test_a_name_on_the_hub(monkeypatch, tmp_path, revision):
    asked = []
    monkeypatch.setattr(weights, "model_snapshot", lambda *a: asked.append(a) or tmp_path)
    found = weights.weights_path(ModelConfig(name="some-owner/Model-1.5B", revision=revision))
    assert (found, asked) == (tmp_path, [("some-owner/Model-1.5B", revision)])


@pytest.mark.parametrize("name", ["gpt2", "./model", "../model", "a/b/c", "owner/", "/model", ""])
def test_a_name_that_is_neither_folder_nor_hub(monkeypatch, tmp_path, name):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "model_snapshot", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(ModelError, match=r"no folder with a config\.json.*owner/name"):
        weights.weights_path(ModelConfig(name=name))


def test_a_folder_comes_before_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "model_snapshot", lambda *_: pytest.fail("the hub was asked"))
    folder = tmp_path / "owner" / "name"
    transformers.LlamaConfig().save_pretrained(folder)
    assert weights.weights_path(ModelConfig(name="owner/name")) == folder
    (folder / "config.json").unlink()
    with pytest.raises(ModelError, match="no folder with a config"):
        weights.weights_path(ModelConfig(name="owner/name"))
