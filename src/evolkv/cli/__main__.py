"""``python -m evolkv.cli``."""

from __future__ import annotations

import sys

from evolkv.cli.app import main

sys.exit(main())
