"""Generate the protobuf and gRPC stubs from ``proto/`` (``python -m pdspec.wire.stubs``); needs grpcio-tools.

The virtual path ``pdspec/wire=proto`` gives the descriptors unique names: a package called ``proto`` would
collide with proto-plus.
"""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROTO = "pdspec/wire/pdspec.proto"
STUBS = ("pdspec_pb2.py", "pdspec_pb2.pyi", "pdspec_pb2_grpc.py")


def generate(out: Path) -> None:
    """Write the stubs to ``out/pdspec/wire``. Raises RuntimeError when protoc refuses the file."""
    from grpc_tools import protoc

    args = [
        "protoc", f"-Ipdspec/wire={ROOT / 'proto'}",
        f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", PROTO,
    ]  # fmt: skip
    status = protoc.main(args)
    if status != 0:
        raise RuntimeError(f"protoc ended with status {status} on {PROTO}")


if __name__ == "__main__":
    generate(ROOT)
