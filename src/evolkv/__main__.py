"""`python -m evolkv`, which is the command `evolkv` of this interpreter."""

from evolkv.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
