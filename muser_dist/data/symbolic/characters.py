"""What the bytes of a patch mean, for those who write patches and for the towers that read them."""

PAD, BOS, EOS, MASK = range(4)
"""Bytes that are no characters. Each patch begins with BOS, ends with EOS and is filled up with PAD; MASK hides one in
the encoder's own pretraining."""

CHARACTERS = 128
"""Values of a byte: ASCII, but for those four."""

PATCH_BYTES = 64
"""Bytes of a patch, BOS and EOS among them."""
