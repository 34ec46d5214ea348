"""The merged LoRA layer against peft's own, in values and in gradients."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear as PeftLoraLinear
from torch import nn

from utils.models.lora import MergedLoraLinear, merged_lora


class Body(nn.Module):
    """Two linear layers; the second is reached by the gradient of the first's factors."""

    def __init__(self, bias=False):
        super().__init__()
        self.first = nn.Linear(6, 8, bias=bias)
        self.second = nn.Linear(8, 4, bias=bias)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def lora_config():
    return LoraConfig(r=3, lora_alpha=6, target_modules=["first", "second"])


def both(bias=False, dtype=torch.float32):
    """Return the merged model and peft's own, with the same random factors."""
    torch.manual_seed(0)
    body = Body(bias).to(dtype)
    merged = get_peft_model(copy.deepcopy(body), merged_lora(lora_config()))
    stock = get_peft_model(copy.deepcopy(body), lora_config())
    for name, parameter in merged.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    stock.load_state_dict(merged.state_dict())
    return merged, stock


def inputs():
    return torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(1))


def factors(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def test_the_layers_are_the_expected_ones():
    merged, stock = both()
    assert type(merged.base_model.model.first) is MergedLoraLinear
    assert type(stock.base_model.model.first) is PeftLoraLinear
    assert len(factors(merged)) == 4


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_equal_pefts(bias):
    merged, stock = both(bias)
    gradients = []
    for model in (merged, stock):
        x = inputs().requires_grad_()
        out = model(x)
        out.square().sum().backward()
        gradients.append((out, x.grad, {n: p.grad for n, p in factors(model).items()}))
    (out, grad_x, grads), (out_peft, grad_x_peft, grads_peft) = gradients
    torch.testing.assert_close(out, out_peft, msg=lambda m: f"output (bias={bias}): {m}")
    torch.testing.assert_close(grad_x, grad_x_peft)
    torch.testing.assert_close(grads, grads_peft)
    for model in (merged, stock):
        frozen = [p for n, p in model.named_parameters() if "base_layer" in n]
        assert all(p.grad is None for p in frozen)


def test_gradients_are_right_by_finite_differences():
    merged, _ = both()
    x = inputs()[0, :2]
    merged(x).square().sum().backward()
    b = merged.base_model.model.first.lora_B["default"].weight
    with torch.no_grad():
        values = []
        for shift in (1e-2, -2e-2):
            b[1, 2] += shift
            values.append(merged(x).square().sum().item())
    assert b.grad[1, 2].item() == pytest.approx((values[0] - values[1]) / 2e-2, rel=2e-2)


@pytest.mark.parametrize(
    "options", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=lambda o: str(o)
)
def test_the_merged_weight_follows_the_optimiser(options):
    merged, stock = both()
    optimisers = [
        torch.optim.AdamW(factors(m).values(), lr=0.05, **options) for m in (merged, stock)
    ]
    for _ in range(3):
        for model, optimiser in zip((merged, stock), optimisers, strict=True):
            optimiser.zero_grad()
            model(inputs()).square().sum().backward()
            optimiser.step()
        out, expected = merged(inputs()), stock(inputs())
        torch.testing.assert_close(out, expected, msg=lambda m: f"stale merged weight: {m}")


@pytest.mark.parametrize("assign", [False, True])
def test_the_merged_weight_follows_load_state_dict(assign):
    merged, stock = both()
    for factor in (-1, 2):  # assigned tensors are new each time and count their versions from 0
        before = merged(inputs())
        state = {name: value.clone() for name, value in merged.state_dict().items()}
        state |= {name: factor * value for name, value in state.items() if "lora_B" in name}
        merged.load_state_dict(state, assign=assign)
        stock.load_state_dict(state)
        after = merged(inputs())
        assert not torch.allclose(before, after), "the merged weight is stale"
        torch.testing.assert_close(after, stock(inputs()))


def test_the_merged_weight_is_kept_while_nothing_changes():
    merged, _ = both()
    layer = merged.base_model.model.first
    assert layer.merged_weight() is layer.merged_weight()


def test_a_disabled_adapter_is_exactly_the_base():
    torch.manual_seed(0)
    for bias in (False, True):
        body = Body(bias)
        expected = body(inputs())
        merged = get_peft_model(body, merged_lora(lora_config()))
        assert torch.equal(merged(inputs()), expected), "a fresh adapter must change nothing"
        for parameter in factors(merged).values():
            nn.init.normal_(parameter)
        assert not torch.allclose(merged(inputs()), expected)
        with merged.disable_adapter():
            assert torch.equal(merged(inputs()), expected)
        assert not torch.allclose(merged(inputs()), expected), "the adapter must be on again"


def test_a_fresh_adapter_is_exactly_the_identity_in_bf16():
    torch.manual_seed(0)
    body, x = Body().bfloat16(), inputs().bfloat16()
    expected = body(x)
    assert torch.equal(get_peft_model(body, merged_lora(lora_config()))(x), expected)


def test_factors_and_their_gradients_stay_fp32_over_bf16_weights():
    half, _ = both(dtype=torch.bfloat16)
    exact, _ = both()
    exact.load_state_dict(half.state_dict())
    for model, x in ((half, inputs().bfloat16()), (exact, inputs())):
        model(x).float().square().sum().backward()
    for found, expected in zip(factors(half).values(), factors(exact).values(), strict=True):
        assert found.dtype == found.grad.dtype == torch.float32
        error = (found.grad - expected.grad).norm() / expected.grad.norm()
        assert error < 0.03, f"relative error {error:.3f}"


def test_a_saved_adapter_is_plain_lora_to_others(tmp_path):
    merged, _ = both()
    merged.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = PeftModel.from_pretrained(Body(), tmp_path)
    assert type(other.base_model.model.first) is PeftLoraLinear
    torch.testing.assert_close(other(inputs()), merged(inputs()))


@pytest.mark.parametrize("merge", ["merge_adapter", "merge_and_unload"])
def test_merging_is_refused_and_changes_nothing(merge):
    """It would count the adapter twice, and leave it in when it is disabled."""
    merged, stock = both()
    with pytest.raises(NotImplementedError, match="merge their adapter by themselves"):
        getattr(merged, merge)()
    torch.testing.assert_close(merged(inputs()), stock(inputs()))
    with merged.disable_adapter():
        assert torch.equal(
            merged(inputs()),
            stock.base_model.model.second.base_layer(
                torch.tanh(stock.base_model.model.first.base_layer(inputs()))
            ),
        )


def test_two_active_adapters_are_refused():
    merged, _ = both()
    merged.add_adapter("second", merged_lora(lora_config()))
    merged.base_model.set_adapter(["default", "second"])
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="one adapter can be"):
            merged(inputs())
