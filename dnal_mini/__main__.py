"""``python -m dnal_mini`` is the ``dnal`` command."""

from dnal_mini.cli.commands import main

if __name__ == "__main__":
    raise SystemExit(main())
