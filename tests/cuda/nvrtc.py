"""NVRTC by ctypes: CUDA sources to machine code for a GPU that is not there."""

import ctypes
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def library() -> Path | None:
    """NVRTC of the wheel nvidia-cuda-nvrtc-cu12, or None."""
    spec = find_spec("nvidia.cuda_nvrtc") if find_spec("nvidia") else None
    places = [] if spec is None else list(spec.submodule_search_locations or [])
    found = [path for place in places for path in Path(place).glob("lib/libnvrtc.so.*")]
    return next((path for path in found if "alt" not in path.name), None)


@cache
def _nvrtc() -> ctypes.CDLL:
    found = library()
    if found is None:
        raise RuntimeError("NVRTC is not installed: pip install nvidia-cuda-nvrtc-cu12")
    return ctypes.CDLL(str(found))


def compiled(source: str, names: tuple[str, ...], arch: int, options: tuple[str, ...]) -> dict[str, int]:
    """Bytes of machine code for sm_`arch`, by the mangled name of each instance; RuntimeError with NVRTC's log."""
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    _checked(nvrtc.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"kernel.cu", 0, None, None), "create")
    for name in names:
        _checked(nvrtc.nvrtcAddNameExpression(program, name.encode()), name)
    given = [f"--gpu-architecture=sm_{arch}".encode(), *(option.encode() for option in options)]
    status = nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
    size = ctypes.c_size_t()
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    text = log.value.decode()
    if status or "warning" in text:
        raise RuntimeError(text)
    _checked(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)), "cubin")
    code = ctypes.create_string_buffer(size.value)
    _checked(nvrtc.nvrtcGetCUBIN(program, code), "cubin")
    found = {}
    for name in names:
        mangled = ctypes.c_char_p()
        _checked(nvrtc.nvrtcGetLoweredName(program, name.encode(), ctypes.byref(mangled)), name)
        assert mangled.value is not None
        found[name] = code.raw.count(mangled.value)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return found


def _checked(status: int, what: str) -> None:
    if status:
        raise RuntimeError(f"NVRTC: error {status} at {what}")
