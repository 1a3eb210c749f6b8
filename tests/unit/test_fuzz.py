"""``pdspec chaos fuzz`` in short, and the findings of its long runs."""

from __future__ import annotations

import msgpack
import pytest
import yaml

from pdspec.config import ClusterConfig
from pdspec.errors import ConfigError
from pdspec.settings import MAX_FILE_BYTES
from pdspec.study import chaos_fuzz, fuzz_inputs
from pdspec.transfer.frames import DraftStart, parse_frame
from pdspec.transfer.wireformat import encode_frame


def test_no_crash_no_hang_no_leak():
    report = chaos_fuzz.run(cases=1500, seed=11)
    assert report["ok"], report["crashes"] or report
    assert report["cases"] == 1500
    reasons = {name: target["reasons"] for name, target in report["targets"].items()}
    assert reasons["frames"] > 100 and reasons["requests"] > 20 and reasons["config"] > 10, reasons


def test_a_bug_is_found():
    def buggy(data: bytes) -> str:
        return "taken" if len(data) < 1000 else parse_frame(data).nothing

    mutator = fuzz_inputs.Mutator(0, fuzz_inputs.frame_corpus(), lambda pick: b"x" * pick.randint(0, 2000))
    report = chaos_fuzz._fuzz((buggy, ()), mutator, 200, lambda seconds: None)
    assert report["crashes"] and "TransferDamaged" in report["crashes"][0]["error"]


def test_a_start_without_rows_has_none():
    header = {"kind": "draft_start", "epoch": 1, "seq": 0, "token_ids": b"", "log_q": b"", "score": b""}
    start = parse_frame(encode_frame(header))
    assert isinstance(start, DraftStart) and dict(start.rows) == {}
    assert msgpack.packb(header)


@pytest.mark.parametrize(
    "text", ["a: 2001-99-99\n", "a: " + "[" * 3000, "port: " + "9" * 5000, "#" * (MAX_FILE_BYTES + 1)]
)
def test_settings_that_do_not_parse_are_refused(tmp_path, text):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.load(path)
    assert caught.value.field in ("config", "port") and len(str(caught.value)) < 1000


def test_a_refusal_does_not_spell_out_a_value_that_refers_to_itself_a_billion_times(tmp_path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)
    ]
    path = tmp_path / "c.yaml"
    path.write_text("\n".join(lines) + "\nnamespace: *a9\n")
    with pytest.raises(ConfigError) as caught:
        ClusterConfig.from_mapping({"namespace": yaml.safe_load(path.read_text())["namespace"]})
    assert len(str(caught.value)) < 1000
