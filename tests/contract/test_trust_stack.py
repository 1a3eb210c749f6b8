"""TLS and tokens in a whole deployment, with real certificates made here."""

from __future__ import annotations

from pdspec.study import chaos_tls


def test_strangers_are_refused_on_every_port():
    report = chaos_tls.run()
    assert report["ok"], report
    assert report["refused"]["router"]["wrong token"] == report["refused"]["router"]["old token"] == "UNAUTHENTICATED"
    assert report["refused"]["decode"]["member with a user's token"] == "UNAUTHENTICATED"
    assert report["member"]["router"] == report["member"]["decode"] == "OK"
