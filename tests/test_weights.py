"""Weights from files: hostile and wrong ones are refused, and none runs code."""

from __future__ import annotations

import io
import os
import pickle
import re
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor, nn

from captioning.encoders.weights import load_into, load_state_dict
from captioning.errors import CapstanError

PARAM = "encoder_settings.resnet50.weights"


def torch_bytes(value: object, zipped: bool = True) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


def small_state() -> dict[str, Tensor]:
    return {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2), "steps": torch.tensor(7)}


def written(folder: Path, content: bytes, name: str = "weights.pth") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@settings(max_examples=60, deadline=None)
@given(
    wrapper=st.sampled_from([None, "state_dict", "model", "model_state_dict"]),
    prefixes=st.lists(st.sampled_from(["module.", "_orig_mod."]), max_size=3),
    kind=st.sampled_from(["zip", "legacy", "safetensors"]),
    parameters=st.booleans(),
)
def test_wrappings_do_not_change_what_is_read(wrapper, prefixes, kind, parameters):
    state = {"".join(prefixes) + name: value for name, value in small_state().items()}
    if parameters and kind != "safetensors":
        state = {n: nn.Parameter(v, requires_grad=v.is_floating_point()) for n, v in state.items()}
    with tempfile.TemporaryDirectory() as folder:
        if kind == "safetensors":
            path = written(Path(folder), save(state), "weights.safetensors")
        else:
            value = {"epoch": 3, wrapper: state} if wrapper else state
            path = written(Path(folder), torch_bytes(value, zipped=kind == "zip"))
        found = load_state_dict(path, PARAM)
    assert same(found, small_state())
    assert not any(value.requires_grad for value in found.values())


def test_a_prefix_that_only_some_names_have_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    assert load_state_dict(written(tmp_path, torch_bytes(state)), PARAM).keys() == {"module.a", "b"}


KINDS = {
    "zip.pth": torch_bytes(small_state()),
    "legacy.pth": torch_bytes(small_state(), zipped=False),
    "weights.safetensors": save(small_state()),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_cut_is_refused(name, tmp_path):
    whole = KINDS[name]
    assert same(load_state_dict(written(tmp_path, whole, name), PARAM), small_state())
    for length in sorted({0, 1, 4, 8, len(whole) - 1, *range(0, len(whole), max(1, len(whole) // 60))}):
        with pytest.raises(CapstanError, match=f"{name}.*{PARAM}.*truncated"):
            load_state_dict(written(tmp_path, whole[:length], name), PARAM)


@settings(max_examples=150, deadline=None)
@given(name=st.sampled_from(sorted(KINDS)), flips=st.lists(st.tuples(st.floats(0, 0.999), st.integers(1, 255))))
def test_damaged_bytes_give_tensors_or_a_users_error(name, flips):
    damaged = bytearray(KINDS[name])
    for where, bits in flips:
        damaged[int(where * len(damaged))] ^= bits
    with tempfile.TemporaryDirectory() as folder:
        path = written(Path(folder), bytes(damaged), name)
        try:
            state = load_state_dict(path, PARAM)
        except CapstanError as error:
            assert str(path) in str(error) and PARAM in str(error)
        else:
            assert all(isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items())


class Malice:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("wrap", ["alone", "zip", "legacy", "beside weights"])
@pytest.mark.parametrize("name", ["weights.pth", "weights.safetensors"])
def test_pickled_code_is_refused_and_not_run(wrap, name, tmp_path):
    trace = tmp_path / "code ran"
    content = {
        "alone": lambda: pickle.dumps(Malice(trace)),
        "zip": lambda: torch_bytes(Malice(trace)),
        "legacy": lambda: torch_bytes(Malice(trace), zipped=False),
        "beside weights": lambda: torch_bytes({"state_dict": small_state(), "extra": Malice(trace)}),
    }[wrap]()
    with pytest.raises(CapstanError, match="holds more than tensors.*Nothing in it was run"):
        load_state_dict(written(tmp_path, content, name), PARAM)
    assert not trace.exists()
    if wrap == "alone":
        pickle.loads(content)
        assert trace.exists()  # it was live


def edited(source: bytes, edit: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(source)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for member in old.namelist():
            new.writestr(member, edit.get(member.partition("/")[2], old.read(member)))
    return buffer.getvalue()


def test_a_small_file_cannot_ask_for_much_memory(tmp_path):
    plain = torch_bytes({"w": torch.zeros(1 << 20)})
    bomb = edited(plain, {}, zipfile.ZIP_DEFLATED)
    assert len(bomb) < len(plain) / 100 and torch.load(io.BytesIO(bomb))["w"].numel() == 1 << 20  # torch would read it
    with pytest.raises(CapstanError, match=r"compressed: 4,19\d,\d+ bytes in a file of"):
        load_state_dict(written(tmp_path, bomb), PARAM)


def test_a_tensor_cannot_reach_beyond_its_record(tmp_path):
    """A tensor that claims more numbers than the file holds would show this process's memory."""
    plain = torch_bytes({"w": torch.zeros(1 << 20)})
    with pytest.raises(CapstanError, match="cannot be read as weights"):
        load_state_dict(written(tmp_path, edited(plain, {"data/0": bytes(16)})), PARAM)


class Subclass(Tensor):
    """Its operations could be anybody's."""


ODD = {
    "number": lambda: {"w": 1.0},
    "text": lambda: {"w": "x"},
    "none": lambda: {"w": None},
    "list": lambda: [torch.ones(2)],
    "tensor": lambda: torch.ones(2),
    "empty": dict,
    "names are numbers": lambda: {1: torch.ones(2)},
    "meta": lambda: {"w": torch.ones(2, device="meta")},
    "sparse": lambda: {"w": torch.ones(2).to_sparse()},
    "quantised": lambda: {"w": torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8)},
    "nested": lambda: {"w": torch.nested.nested_tensor([torch.ones(2)])},
    "subclass": lambda: {"w": torch.ones(2).as_subclass(Subclass)},
    "deep": lambda: {"state_dict": {"state_dict": {"state_dict": {"state_dict": {"w": torch.ones(2)}}}}},
}


@pytest.mark.filterwarnings("ignore:.*(sparse tensor|uantized tensor|nested tensor|TypedStorage)")
@pytest.mark.parametrize("kind", ODD)
def test_anything_but_named_plain_tensors_is_refused(kind, tmp_path):
    path = written(tmp_path, torch_bytes(ODD[kind]()))
    with torch.serialization.safe_globals([Subclass]):  # as a library that is imported beside us may do
        with pytest.raises(CapstanError, match=f"weights.pth .{PARAM}. is not a state dict"):
            load_state_dict(path, PARAM)


def test_a_mapping_that_holds_itself_ends(tmp_path):
    state: dict[str, object] = {}
    state["state_dict"] = state
    with pytest.raises(CapstanError, match="not a state dict"):
        load_state_dict(written(tmp_path, torch_bytes(state)), PARAM)


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "absent.pth", tmp_path):
        with pytest.raises(CapstanError, match=f"{re.escape(str(path))} is missing: {PARAM}"):
            load_state_dict(path, PARAM)


# Into a network


class Network(nn.Module):
    def __init__(self, classes: int = 5, width: int = 4) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, classes)

    def regions(self, pixels: Tensor) -> Tensor:
        return self.norm(self.conv(pixels))


def varied(network: nn.Module, seed: int) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in network.state_dict().values():
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return network.eval()


def filled(state: dict[str, Tensor]) -> Network:
    network = Network().eval()
    load_into(network, state, "w.pth", PARAM, head="fc.")
    return network


@pytest.mark.parametrize("classes", [5, 2, 1000, None])
def test_another_number_of_classes_gives_the_same_regions(classes):
    source = varied(Network(classes or 5), 1)
    state = {n: v for n, v in source.state_dict().items() if classes or not n.startswith("fc.")}
    pixels = torch.rand(2, 3, 6, 6)
    assert torch.equal(filled(state).regions(pixels), source.regions(pixels))


def test_weights_of_another_kind_of_number_are_converted():
    state = varied(Network(), 1).state_dict()
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        found = filled({n: v.to(dtype) if v.is_floating_point() else v for n, v in state.items()})
        assert torch.equal(found.conv.weight, state["conv.weight"].to(dtype).float())


def without_batch_counts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {n: v for n, v in state.items() if "num_batches_tracked" not in n}


def test_files_older_than_the_count_of_batches_are_read():
    state = varied(Network(), 1).state_dict()
    assert torch.equal(filled(without_batch_counts(state)).norm.running_var, state["norm.running_var"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s | {"more": torch.ones(1)}, r"0 tensors missing \[\], 1 unknown \[more\], 0 of another shape"),
        (lambda s: {"fc.weight": s["fc.weight"]}, r"6 tensors missing \[conv.weight, conv.bias, …\]"),
        (lambda s: Network(width=8).state_dict(), r"6 of another.*\(conv.weight: float \(8, 3, 3, 3\), expected float"),
        (
            lambda s: s | {"conv.bias": torch.ones(4).int()},
            r"1 of another .*\(conv.bias: integer \(4,\), expected float",
        ),
        (lambda s: s | {"conv.bias": torch.ones(4, dtype=torch.complex64)}, "conv.bias: complex"),
        (lambda s: s | {"conv.bias": torch.zeros(1).expand(10**12)}, "1000000000000"),
        (lambda s: s | {"x" * 10**6: torch.ones(1)}, "1 unknown"),
    ],
)
def test_another_architecture_shows_both_sides_and_changes_nothing(change, message):
    network = varied(Network(), 2)
    before = {n: v.clone() for n, v in network.state_dict().items()}
    with pytest.raises(CapstanError, match=f"w.pth .{PARAM}. holds another architecture: .*{message}") as caught:
        load_into(network, change(varied(Network(), 1).state_dict()), "w.pth", PARAM, head="fc.")
    assert len(str(caught.value)) < 600
    assert same(network.state_dict(), before)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(sorted(n for n, v in Network().state_dict().items() if v.is_floating_point())),
    where=st.floats(0, 0.999),
    bad=st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e300]),
)
def test_numbers_that_are_not_finite_are_refused_wherever_they_are(name, where, bad):
    state = {n: v.double() if v.is_floating_point() else v for n, v in varied(Network(), 1).state_dict().items()}
    state[name].view(-1)[int(where * state[name].numel())] = bad  # 1e300 is finite until it is a float32
    if name.startswith("fc."):
        filled(state)  # the head is dropped
        return
    with pytest.raises(CapstanError, match=rf"w.pth .{PARAM}.: 1 tensors hold numbers that are not finite \[{name}\]"):
        filled(state)


def test_densenets_old_names(tmp_path):
    from torchvision.models import DenseNet

    def build() -> DenseNet:
        return DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=3)

    source = varied(build(), 1)
    old = {
        re.sub(r"(denselayer\d+\.(?:norm|conv))([12]\.)", r"\1.\2", n): v
        for n, v in without_batch_counts(source.state_dict()).items()
    }
    assert "features.denseblock1.denselayer1.norm.1.weight" in old
    path = written(tmp_path, torch_bytes(old, zipped=False))  # as torchvision's file is
    network = build()
    load_into(network, load_state_dict(path, PARAM), str(path), PARAM, head="classifier.")
    pixels = torch.rand(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.eval().features(pixels), source.features(pixels))
