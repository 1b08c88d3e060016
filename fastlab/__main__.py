"""``python -m fastlab`` is the `fastlab` command."""

from fastlab.cli import main

raise SystemExit(main())
