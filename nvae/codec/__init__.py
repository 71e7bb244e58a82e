"""Lossless compression by bits-back coding: the negative ELBO as a file's size.

:class:`nvae.codec.codec.Codec` is the door.
"""
