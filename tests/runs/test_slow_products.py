"""Products of 16-bit matrices on a processor without instructions for them."""

import threading

import pytest
import tiny
import torch
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

from optimum_fwdprune import FwdPruner
from optimum_fwdprune.evaluation import benchmark
from optimum_fwdprune.loading.state import evaluating
from optimum_fwdprune.recovery import RecoveryArguments
from optimum_fwdprune.runs import products
from optimum_fwdprune.runs.products import FEWEST_ROWS, products_as_served, products_in_float32


PRODUCTS = ("::mm", "::addmm", "::bmm", "::baddbmm", "::linear", "::matmul", "attention")
DTYPES = [torch.bfloat16, torch.float16]
IDS = torch.arange(64).remainder(50).view(2, 32)
CALIBRATION = torch.arange(4 * 64).remainder(50).view(4, 64)


class Products(TorchDispatchMode):
    """Records the dtypes of the matrices that are multiplied, with at least `rows` rows."""

    def __init__(self, rows=FEWEST_ROWS):
        super().__init__()
        self.rows, self.dtypes = rows, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if any(part in name for part in PRODUCTS):
            factors = args[1:3] if "add" in name else args[:2]
            if factors[0].ndim > 1 and factors[0].shape[-2] >= self.rows:
                self.dtypes.append(factors[0].dtype)
        return function(*args, **(kwargs or {}))


@pytest.fixture
def without_instructions(monkeypatch):
    monkeypatch.setattr(products, "has_instructions_for", lambda dtype: dtype not in DTYPES)


def numbers(*shape, dtype):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.usefixtures("without_instructions")
def test_products_are_those_of_float32_rounded(dtype):
    values, weight, bias = numbers(2, 32, 48, dtype=dtype), numbers(24, 48, dtype=dtype), numbers(24, dtype=dtype)
    heads = numbers(2, 4, 32, 8, dtype=dtype)
    mask = numbers(2, 1, 32, 32, dtype=dtype)
    rows = values.flatten(0, 1)
    calls = [
        (functional.linear, (values, weight)),
        (functional.linear, (values, weight, bias)),
        (torch.matmul, (values, weight.T)),
        (torch.Tensor.matmul, (values, weight.T)),
        (lambda a, b: a @ b, (values, weight.T)),
        (torch.mm, (rows, weight.T)),
        (torch.Tensor.mm, (rows, weight.T)),
        (torch.addmm, (bias, rows, weight.T)),
        (torch.Tensor.addmm, (bias, rows, weight.T)),
        (torch.bmm, (values, values.mT)),
        (torch.Tensor.bmm, (values, values.mT)),
        (torch.baddbmm, (mask[:, 0], values, values.mT)),
        (torch.Tensor.baddbmm, (mask[:, 0], values, values.mT)),
        (lambda q, m: functional.scaled_dot_product_attention(q, q, q, attn_mask=m), (heads, mask)),
    ]
    for function, arguments in calls:
        expected = function(*(argument.float() for argument in arguments)).to(dtype)
        with Products() as seen, products_in_float32():
            got = function(*arguments)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
        assert seen.dtypes
        assert all(seen_dtype == torch.float32 for seen_dtype in seen.dtypes)


@pytest.mark.usefixtures("without_instructions")
def test_large_weights_are_converted_in_parts(monkeypatch):
    values, weight, bias = (numbers(*shape, dtype=DTYPES[0]) for shape in ((32, 8), (20, 8), (20,)))
    with products_in_float32():
        whole = functional.linear(values, weight, bias), functional.linear(values, weight)
    monkeypatch.setattr(products, "LARGEST_PART", 7 * 8)
    with Products() as seen, products_in_float32():
        parts = functional.linear(values, weight, bias), functional.linear(values, weight)
    assert len(seen.dtypes) == 2 * 3
    torch.testing.assert_close(parts, whole, rtol=0, atol=0)


@pytest.mark.usefixtures("without_instructions")
def test_gradients_are_in_the_dtype_of_the_weights():
    values, weight = numbers(32, 8, dtype=DTYPES[0]), numbers(20, 8, dtype=DTYPES[0]).requires_grad_()
    with Products() as seen, products_in_float32():
        functional.linear(values, weight).float().square().sum().backward()
    assert weight.grad.dtype == DTYPES[0]
    assert set(seen.dtypes) == {torch.float32}


class Quantized(torch.Tensor):
    """In the place of weights of other packages, which multiply by themselves."""

    multiplied = 0

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(cls, values.shape, dtype=values.dtype)

    def __init__(self, values):
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.multiplied += function is torch.ops.aten.mm.default
        return function(*(value.values if isinstance(value, cls) else value for value in args), **(kwargs or {}))


@pytest.mark.usefixtures("without_instructions")
def test_weights_of_other_classes_multiply_by_themselves():
    values, weight = numbers(32, 8, dtype=DTYPES[0]), Quantized(numbers(8, 20, dtype=DTYPES[0]))
    with Products() as seen, products_in_float32():
        product = torch.mm(values, weight)
    assert Quantized.multiplied == 1
    assert seen.dtypes == DTYPES[:1]
    assert torch.equal(product, values @ weight.values)


@pytest.mark.usefixtures("without_instructions")
def test_what_pytorch_refuses_is_refused_and_what_it_returns_is_returned():
    values, weight = numbers(32, 8, dtype=DTYPES[0]), numbers(8, 4, dtype=DTYPES[0])
    with products_in_float32():
        with pytest.raises(RuntimeError):
            values @ weight.half()
        assert functional.linear(values[:, :0], weight.T[:, :0]).shape == (32, 4)
        written = torch.zeros(32, 4, dtype=DTYPES[0])
        assert torch.matmul(values, weight, out=written) is written
        assert torch.equal(written, values @ weight)
        vector = numbers(8, dtype=DTYPES[0])
        assert (values @ vector).shape == (32,)
        assert functional.linear(values, vector).shape == (32,)


@pytest.mark.usefixtures("without_instructions")
def test_threads_have_contexts_of_their_own():
    values, weight, seen = numbers(32, 8, dtype=DTYPES[0]), numbers(8, 4, dtype=DTYPES[0]), []

    def multiply():
        with Products() as own, products_in_float32():
            torch.mm(values, weight)
        seen.extend(own.dtypes)

    with products_in_float32(), products_as_served():
        thread = threading.Thread(target=multiply)
        thread.start()
        thread.join()
    assert seen == [torch.float32]


@pytest.mark.usefixtures("without_instructions")
def test_what_is_kept_for_gradients_stays_in_16_bit():
    kept = []
    values, weight = numbers(32, 8, dtype=DTYPES[0]).requires_grad_(), numbers(20, 8, dtype=DTYPES[0])
    with products_in_float32(), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        functional.linear(values, weight).sum().backward()
    assert {each.dtype for each in kept} == {DTYPES[0]}


@pytest.mark.usefixtures("without_instructions")
def test_boolean_masks_of_attention():
    heads, mask = numbers(2, 4, 32, 8, dtype=DTYPES[0]), torch.ones(32, 32, dtype=torch.bool).tril()
    expected = functional.scaled_dot_product_attention(*[heads.float()] * 3, attn_mask=mask).to(DTYPES[0])
    with products_in_float32():
        assert torch.equal(functional.scaled_dot_product_attention(*[heads] * 3, attn_mask=mask), expected)


@pytest.mark.usefixtures("without_instructions")
def test_few_rows_and_float64_stay_as_they_are():
    with Products(rows=1) as seen, products_in_float32():
        functional.linear(numbers(FEWEST_ROWS - 1, 8, dtype=DTYPES[0]), numbers(20, 8, dtype=DTYPES[0]))
        assert (numbers(32, 8, dtype=torch.float64) @ numbers(8, 4, dtype=torch.float64)).dtype == torch.float64
    assert seen.dtypes == [DTYPES[0], torch.float64]


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 0), (DTYPES[0], 1)])
def test_models_in_float32_run_without_the_context(dtype, count):
    model = tiny.make_model("llama_gqa_biases", dtype=dtype)
    with evaluating(model):
        assert len(_get_current_dispatch_mode_stack()) == count


def test_a_processor_with_instructions_multiplies_as_it_is(monkeypatch):
    monkeypatch.setattr(products, "has_instructions_for", lambda dtype: True)
    with Products() as seen, products_in_float32():
        functional.linear(numbers(32, 8, dtype=DTYPES[0]), numbers(20, 8, dtype=DTYPES[0]))
    assert seen.dtypes == DTYPES[:1]


@pytest.mark.usefixtures("without_instructions")
def test_contexts_inside_each_other_and_times_of_the_model_itself():
    values, weight = numbers(32, 8, dtype=DTYPES[0]), numbers(20, 8, dtype=DTYPES[0])
    with Products() as seen:
        with products_in_float32(), products_in_float32():
            with products_as_served(), products_as_served():
                functional.linear(values, weight)
            functional.linear(values, weight)
        functional.linear(values, weight)
    assert seen.dtypes == [DTYPES[0], torch.float32, DTYPES[0]]


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_model_that_is_evaluated(attention):
    model = tiny.make_model("llama_gqa_biases", dtype=DTYPES[0])
    model.set_attn_implementation(attention)
    with torch.no_grad(), Products() as seen, evaluating(model):
        logits = model(IDS).logits
    assert logits.dtype == DTYPES[0]
    assert DTYPES[0] not in seen.dtypes


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize("preset", ["fast", "best"])
def test_no_product_of_pruning_is_in_16_bit(preset):
    pruner = FwdPruner(tiny.make_model("llama_gqa_biases", dtype=DTYPES[0]))
    with Products() as seen:
        pruner.prune(preset, CALIBRATION, sparsity=0.4, skip_layers=[])
    assert pruner.model.dtype == DTYPES[0]
    assert seen.dtypes
    assert DTYPES[0] not in seen.dtypes


@pytest.mark.usefixtures("without_instructions")
@pytest.mark.parametrize(
    ("mode", "options"),
    [("lora", {}), ("lora", {"gradient_checkpointing": True}), ("distill", {}), ("block_distill", {})],
)
def test_no_product_of_recovery_is_in_16_bit(mode, options, tmp_path):
    dense, model = (tiny.make_model("llama_gqa_biases", dtype=DTYPES[0]) for _ in range(2))
    pruner = FwdPruner(model)
    pruner.prune("fast", CALIBRATION, sparsity=0.4, skip_layers=[])
    teacher = {} if mode == "lora" else {"teacher": dense}
    args = RecoveryArguments(
        tmp_path / "out",
        mode=mode,
        max_steps=1,
        max_length=32,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        **options,
    )
    with Products() as seen:
        pruner.recover({"input_ids": CALIBRATION.tolist()}, args, **teacher)
    assert seen.dtypes
    assert DTYPES[0] not in seen.dtypes


@pytest.mark.usefixtures("without_instructions")
def test_times_are_those_of_the_model_itself_and_said_to_be_slow(caplog):
    model = tiny.make_model("llama_gqa_biases", dtype=DTYPES[0])
    with Products() as seen:
        benchmark([model], prompt_tokens=(32,), new_tokens=1, repeats=1)
    assert DTYPES[0] in seen.dtypes
    assert "no instructions for bfloat16" in caplog.text
    caplog.clear()
    benchmark([tiny.make_model("llama_gqa_biases")], prompt_tokens=(32,), new_tokens=1, repeats=1)
    assert "no instructions" not in caplog.text
