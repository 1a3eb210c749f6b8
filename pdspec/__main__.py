"""``python -m pdspec``: the same as the ``pdspec`` command."""

from pdspec.cli.app import main

main()
