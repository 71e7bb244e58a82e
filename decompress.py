"""Restore pictures: `python decompress.py checkpoint=... input=... output=...`."""

from nvae.cli import decompress_command

if __name__ == "__main__":
    decompress_command()
