"""The in-place safetensors layout, held against the safetensors library."""

import json

import pytest
import safetensors.torch
import torch

from sonoforge_trainer.checkpoint.staging import HostBuffer
from sonoforge_trainer.checkpoint.tensorfile import DTYPES, TensorFileError, deal, layout, parse


def _tensors():
    draw = torch.Generator().manual_seed(0)
    return {
        "a.transposed": torch.randn(5, 3, generator=draw).T,
        "b.scalar": torch.tensor(3.5),
        "c.empty": torch.empty(0, 4),
        "d.half": torch.randn(3, generator=draw).half(),
        "e.brain": torch.randn(7, generator=draw).bfloat16(),
        "f.bytes": torch.arange(5, dtype=torch.uint8),
        "g.flags": torch.tensor([True, False, True]),
        "h.counts": torch.tensor([1, 2**40]),
        "i.double": torch.tensor([0.1], dtype=torch.float64),
    }


def _same(left, right):
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert (tensor.dtype, tensor.shape) == (right[name].dtype, right[name].shape), name
        assert torch.equal(tensor, right[name]), name


def test_the_safetensors_library_reads_what_is_staged():
    tensors = _tensors()
    file_u8 = HostBuffer(torch.device("cpu")).begin(tensors)
    _same(safetensors.torch.load(file_u8.numpy().tobytes()), tensors)


def test_what_the_safetensors_library_writes_is_read():
    tensors = {name: tensor.contiguous() for name, tensor in _tensors().items()}
    data = safetensors.torch.save(tensors, metadata={"format": "pt"})
    _same(parse(torch.frombuffer(bytearray(data), dtype=torch.uint8)), tensors)


def test_staging_and_parsing_are_inverse_without_a_second_copy():
    tensors = _tensors()
    file_u8 = HostBuffer(torch.device("cpu")).begin(tensors)
    parsed = parse(file_u8)
    _same(parsed, tensors)
    first, last = file_u8.data_ptr(), file_u8.data_ptr() + file_u8.numel()
    assert all(first <= tensor.data_ptr() < last for tensor in parsed.values() if tensor.numel())


def test_the_host_buffer_is_used_again_for_the_next_checkpoint():
    buffer = HostBuffer(torch.device("cpu"))
    first = buffer.begin({"a": torch.ones(1000)}).data_ptr()
    assert buffer.begin({"a": torch.zeros(1000)}).data_ptr() == first


def test_a_file_without_tensors_is_a_file():
    file_u8 = HostBuffer(torch.device("cpu")).begin({})
    assert parse(file_u8) == {}
    assert safetensors.torch.load(file_u8.numpy().tobytes()) == {}


def test_types_that_safetensors_lacks_are_refused_by_name():
    with pytest.raises(TypeError, match=r"'phase' has type torch\.complex64"):
        layout({"phase": torch.zeros(1, dtype=torch.complex64)})


def test_every_type_of_a_training_state_is_known():
    assert {"F32", "BF16", "F16", "I64", "BOOL"} <= DTYPES.keys()


def _file(header: object, data: bytes) -> torch.Tensor:
    text = json.dumps(header).encode()
    return torch.frombuffer(bytearray(len(text).to_bytes(8, "little") + text + data), dtype=torch.uint8)


def _entry(**changes):
    return {"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4], **changes}}


@pytest.mark.parametrize(
    ("file_u8", "fault"),
    [
        (torch.zeros(3, dtype=torch.uint8), "too few"),
        (torch.full((64,), 255, dtype=torch.uint8), "longer than the file"),
        (_file(_entry(), b"abc"), "end at byte"),
        (_file(_entry(), b"abcde"), "end at byte"),
        (_file(_entry(shape=[5]), b"abcd"), "size of their shape"),
        (_file(_entry(shape=[-2, -2]), b"abcd"), "malformed"),
        (_file(_entry(dtype="F31"), b"abcd"), "malformed"),
        (_file(_entry(data_offsets=[1, 5]), b"abcde"), "holes"),
        (_file({**_entry(), "b": _entry()["a"]}, b"abcd"), "overlap"),
        (_file([1, 2], b""), "malformed"),
        (_file({"a": 5}, b""), "malformed"),
    ],
)
def test_malformed_files_are_refused(file_u8, fault):
    with pytest.raises(TensorFileError, match=fault):
        parse(file_u8)


def test_tensors_are_dealt_by_bytes_and_rank_0_gets_less_for_writing_the_teacher():
    sizes = {"a": 60, "b": 50, "c": 40, "d": 30, "e": 20, "f": 10, "g": 0}
    assert deal(sizes, 1) == (("a", "b", "c", "d", "e", "f", "g"),)
    assert deal(sizes, 2) == (("a", "d", "e"), ("b", "c", "f", "g"))
    hands = deal(sizes, 3, first_load=60)
    assert sorted(name for hand in hands for name in hand) == sorted(sizes)
    assert [sum(sizes[name] for name in hand) for hand in hands] == [30, 90, 90]


def test_more_ranks_than_tensors_leaves_some_with_nothing():
    assert deal({"a": 1, "b": 2}, 3) == (("b",), ("a",), ())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device to copy from")
def test_staging_from_a_gpu_sees_all_work_queued_before_and_none_after():
    weight = torch.zeros(1 << 22, device="cuda")
    for _ in range(100):
        weight += 1
    buffer = HostBuffer(weight.device)
    file_u8 = buffer.begin({"weight": weight, "steps": torch.tensor(3)})
    buffer.finish()
    weight.zero_()
    torch.cuda.synchronize()
    assert file_u8.is_pinned()
    parsed = parse(file_u8)
    assert parsed["weight"].unique().tolist() == [100.0]
    assert parsed["steps"].item() == 3
