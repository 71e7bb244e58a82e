"""Compress pictures without loss: `python compress.py checkpoint=... input=... output=...`."""

from nvae.cli import compress_command

if __name__ == "__main__":
    compress_command()
