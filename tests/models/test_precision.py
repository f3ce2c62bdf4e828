"""The names of precisions, and what `auto` becomes on a machine."""

import pytest
import torch

from lavis_evlgen.models import precision as freezing
from lavis_evlgen.models.precision import auto_precision, check_precision, processor_flags

X86 = "processor\t: 0\nflags\t\t: fpu sse avx512_bf16 avx512f\n"


@pytest.mark.parametrize("text, flag", [(X86, "avx512_bf16"), ("Features\t: fp asimd bf16\n", "bf16")])
def test_flags_are_read_as_linux_writes_them(tmp_path, text, flag):
    file = tmp_path / "cpuinfo"
    file.write_text(text)
    assert flag in processor_flags(str(file)) and "processor" not in processor_flags(str(file))


def test_a_system_without_cpuinfo_has_no_flags(tmp_path):
    assert processor_flags(str(tmp_path / "none")) == frozenset()


@pytest.mark.parametrize("flags, precision", [({"sse", "amx_bf16"}, "bf16"), ({"sse", "avx512f"}, "fp32")])
def test_auto_follows_the_processor_where_there_is_no_gpu(monkeypatch, flags, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(freezing, "processor_flags", lambda: frozenset(flags))
    assert auto_precision() == check_precision("auto", "llm_precision") == precision


@pytest.mark.parametrize("native, precision", [(True, "bf16"), (False, "fp32")])
def test_auto_follows_the_gpu_where_there_is_one(monkeypatch, native, precision):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    assert auto_precision() == precision


def test_an_unknown_precision_is_refused_by_its_key():
    with pytest.raises(ValueError, match="vit_precision: 'fp8' is not one of fp32, fp16, bf16, auto"):
        check_precision("fp8", "vit_precision")
